"""The engine that a Ray cluster is: its workers read, decode and extract photos, one model each, with Ray Data.

Only this process lists photos and writes to the database, whichever database it is: workers need neither its address
nor its secrets, the embedded one works, and bulk import too. Where one writer is not enough, `--shard` gives each part
one of its own.

Exactly once: each photo's outcome is taken once, whatever Ray ran twice, and the rows that it is written to have keys
that depend on its id alone.

A worker that dies is started anew, without a limit, for machines come and go; what it had at hand is done again. So a
photo that kills its worker each time has to be found out: an actor, `_Attempts`, counts how often each block of photos
is begun. From the second time on it is done photo by photo, and a photo that was begun alone twice already, and not
ended, is given up. Those before it in its block were ended each time, however often they were begun.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from delf_milvus.errors import ClusterError, DelfMilvusError, InputError, ModelError, UsageError, one_line
from delf_milvus.features import Fingerprint
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.ingestion.pipeline import Here, Outcome, Outcomes, Work, photos_here
from delf_milvus.model.environment import prepare_environment
from delf_milvus.model.spec import NAMED, fingerprint_of, resolve
from delf_milvus.settings import RaySettings, Settings

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

_BLOCK, _GPU_BLOCK = 16, 64
"""Photos that a worker takes at a time, at most: one with a GPU extracts many together."""

_WINDOW = 200_000
"""Photos that are handed to a cluster at a time: a row of each is in its object store, and one in this process."""

_BLOCKS_EACH = 4
"""Blocks for each worker, at least: the last one to end is not long alone."""

_TOGETHER, _ALONE = 1, 2
"""Times that a block is begun as a whole, and then each of its photos alone, before that photo is given up."""

_STARTS = 5
"""Attempts to start a cluster: it gives itself 15 seconds, in which a busy machine may not have loaded its programs."""

_KNOCK_SECONDS = 10.0

_SHORT = 24
"""Characters of the path of a folder for temporary files, at most, that still leave room for the names of sockets."""


class OnRay:
    """The engine for photos on a Ray cluster: see `Engine`. fingerprint: of the model that the settings name.

    The cluster is the one that this process is connected to already, else that of the settings or of RAY_ADDRESS, else
    one that is started on this machine for the run and listens on its loopback address alone (in a program that has
    imported Ray before, as Ray would do by itself).

    Raises UsageError where Ray is not installed.
    """

    def __init__(self, settings: Settings, fingerprint: Fingerprint, *, dry_run: bool = False) -> None:
        self._address = settings.ray.address or os.environ.get("RAY_ADDRESS", "")
        self._ray = _imported(own=not self._address)
        self._wanted = settings.ray
        name = settings.model
        # What a worker needs and no more: no address of a database, no secrets.
        own = Settings(
            model=name if name in NAMED else str(Path(name).absolute()),
            decode=settings.decode,
            extract=settings.extract,
            ingest=settings.ingest,
        )
        self._arguments = (own, fingerprint, dry_run)

    def __call__(self, works: Iterable[Work], /) -> Outcomes:
        """See `Engine`. Raises ClusterError, ModelError where a worker has not this model, UsageError."""
        rest = iter(works)
        some = list(islice(rest, _WINDOW))
        if not some:
            return
        with self._connected():
            while some:
                yield from self._outcomes(some)
                some = list(islice(rest, _WINDOW))

    def _outcomes(self, works: Sequence[Work]) -> Outcomes:
        left = {work.photo.image_id: work for work in works}
        failures = self._ray.data.exceptions
        with closing(self._said(works)) as answers:
            try:
                for said in answers:
                    if isinstance(said.outcome, DelfMilvusError) and not isinstance(said.outcome, InputError):
                        raise said.outcome
                    work = left.pop(said.image_id, None)
                    if work is not None:
                        yield work.photo, said.outcome
            except (
                self._ray.exceptions.RayError,
                failures.SystemException,
                failures.ExecutionTimeoutError,
            ) as error:
                # Of a traceback in a worker, the error.
                raise ClusterError(
                    f"The Ray cluster failed at work ({_line(error, -1)}): run the same command again."
                ) from error
        if left:
            raise ClusterError(f"The Ray cluster gave no answer for {len(left)} photos: run the same command again.")

    @contextmanager
    def _connected(self) -> Iterator[None]:
        ray = self._ray
        if ray.is_initialized():
            yield
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        # Reports of dead workers would be printed on stdout, among the data.
        ray._private.worker._worker_logs_enabled = False
        if self._address:
            _knock(self._address)
        with _own_folder() as folder:
            try:
                try:
                    with _unheard():
                        if self._address:
                            ray.init(address=self._address, **quiet)
                        else:
                            self._start(folder, quiet)
                except Exception as error:
                    if self._address:
                        raise _unreachable(self._address, error) from error
                    raise ClusterError(f"A Ray cluster cannot be started here ({_line(error, 0)}).") from error
                for name in ("ray", "ray.data"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
                yield
            finally:
                ray.shutdown()

    def _start(self, folder: str | None, quiet: dict[str, Any]) -> None:
        for attempt in Retrying(
            stop=stop_after_attempt(_STARTS), retry=retry_if_exception_type(Exception), reraise=True
        ):
            with attempt:
                self._ray.init(address="local", include_dashboard=False, _temp_dir=folder, **quiet)

    def _said(self, works: Sequence[Work]) -> Generator[_Said, None, None]:
        ray = self._ray
        actors = self._wanted.actors or _room(ray.cluster_resources(), self._wanted)
        most = _GPU_BLOCK if self._wanted.gpus else _BLOCK
        blocks = min(len(works), max(_BLOCKS_EACH * actors, -(-len(works) // most)))
        attempts = ray.remote(_Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        # A worker that is killed while it starts is no reason to end the run.
        context.max_consecutive_actor_init_deaths = 2 * actors
        with ray.data.DataContext.current(context):
            # What is made here keeps the context that it was made in.
            done = ray.data.from_items([{"work": work} for work in works], override_num_blocks=blocks).map_batches(
                _Worker,
                fn_constructor_args=(attempts, *self._arguments),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=self._wanted.cpus,
                num_gpus=self._wanted.gpus or None,
            )
        try:
            for row in done.iter_rows():
                yield row["said"]
        finally:
            ray.kill(attempts)


@dataclass(frozen=True)
class _Said:
    """What a worker says of a photo; an error that is no InputError is of the worker itself."""

    image_id: str
    outcome: Outcome | InputError | DelfMilvusError


class _Attempts:
    """Counts, in an actor of its own, how often something was begun and not ended."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """The number of this attempt, from 1, among those that were not ended."""
        self._begun[what] += 1
        return self._begun[what]

    def end(self, what: str) -> None:
        """An attempt came to its end, whatever becomes of what it made."""
        self._begun[what] -= 1


class _Worker:
    """What one process of the cluster does with blocks of photos: the same as `Here` in the local pipeline."""

    def __init__(self, attempts: Any, settings: Settings, fingerprint: Fingerprint, dry_run: bool) -> None:
        prepare_environment()
        self._attempts, self._settings, self._fingerprint, self._dry_run = attempts, settings, fingerprint, dry_run
        self._engine: Here[RgbImage] | None = None
        self._extractor: Extractor | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[_Said]]:
        """Ray Data's call: a column of `Work` becomes one of `_Said`."""
        works: list[Work] = list(batch["work"])
        try:
            return {"said": list(self._said(works))}
        except DelfMilvusError as error:
            return {"said": [_Said(works[0].photo.image_id, error)]}

    def _said(self, works: Sequence[Work]) -> Iterator[_Said]:
        if self._begin(f"block {works[0].photo.image_id}") <= _TOGETHER:
            yield from self._done(works)
            return
        for work in works:
            alone = f"photo {work.photo.image_id}"
            if self._begin(alone) <= _ALONE:
                yield from list(self._done([work]))
                # Not waited for: it arrives before the next one is begun.
                self._attempts.end.remote(alone)
            else:
                yield _Said(
                    work.photo.image_id,
                    InputError(
                        f"{one_line(work.photo.place)} cannot be extracted: the worker that had it alone died, "
                        f"{_ALONE} times."
                    ),
                )

    def _begin(self, what: str) -> int:
        import ray

        return int(ray.get(self._attempts.begin.remote(what)))

    def _done(self, works: Sequence[Work]) -> Iterator[_Said]:
        if self._engine is None:
            self._engine = self._made()
        return (_Said(photo.image_id, outcome) for photo, outcome in self._engine(works))

    def _made(self) -> Here[RgbImage]:
        here = fingerprint_of(resolve(self._settings.model), self._settings.extract)
        if here != self._fingerprint:
            raise ModelError(
                f"A worker of the Ray cluster has another model at {one_line(self._settings.model)} than this process: "
                "put the same file there on every machine, and install the same version of delf-milvus."
            )
        return photos_here(self._load, here, self._settings, dry_run=self._dry_run)

    def _load(self) -> Extractor:
        if self._extractor is None:
            from delf_milvus.model.extractor import Extractor

            self._extractor = Extractor(self._settings.model, self._settings.extract)
        return self._extractor


def _imported(*, own: bool) -> Any:
    """Ray, set up before its first import: nothing is reported to anybody, its own log stays in its files."""
    defaults = {"RAY_USAGE_STATS_ENABLED": "0"}
    if own and "ray" not in sys.modules:
        # Off, Ray takes the loopback address for that of this machine; the name tells of the systems that it was made
        # for. The token keeps out others on this machine, and is never on its disk.
        defaults |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
        defaults["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
        import ray.data.exceptions
    except ImportError as error:
        raise UsageError(
            f"The engine ray needs {error.name}, which is not installed: run `pip install 'delf-milvus[ray]'`."
        ) from error
    # What its core has to say of workers that died stays in its files.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    return ray


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing is printed on stderr meanwhile: Ray's core says there how much it will say."""
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _knock(address: str) -> None:
    """Raise ClusterError where nothing listens at an address of the form host:port: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"The Ray cluster at {one_line(address)} cannot be reached ({_line(error, 0)}): check ray.address, or "
        "RAY_ADDRESS."
    )


def _own_folder() -> Any:
    """A folder for a cluster's files that nobody else can open; None, Ray's own choice, where its path would be too
    long for sockets."""
    if len(tempfile.gettempdir()) > _SHORT:
        return nullcontext(None)
    return tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)


def _room(there: dict[str, float], wanted: RaySettings) -> int:
    """Workers that a cluster with these resources has room for; raises UsageError for none."""
    fits = [(there.get("CPU", 0.0), wanted.cpus), (there.get("GPU", 0.0), wanted.gpus)]
    room = int(min(has / each + 1e-9 for has, each in fits if each))
    if room < 1:
        raise UsageError(
            f"The Ray cluster has {there.get('CPU', 0):g} processors and {there.get('GPU', 0):g} GPUs, too few for a "
            f"worker with ray.cpus = {wanted.cpus:g} and ray.gpus = {wanted.gpus:g}: lower these, or say with "
            "ray.actors how many workers it grows to."
        )
    return room


def _line(error: Exception, number: int) -> str:
    """A line of what an error says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[number][:300]).rstrip(". ") if lines else type(error).__name__
