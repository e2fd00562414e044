"""One connection to Milvus: opened, named and closed, its failures turned into this package's errors.

- A path that ends in .db is Milvus Lite, a server that pymilvus runs inside this process and that one process at a time
  may own; anything with a scheme is a server. A client that was handed in is used and never closed.
- pymilvus leaves an embedded database running, and locked, until the process ends. Here it stops with the last of
  this process's connections to it, unless it was running before the first of them.
- Whatever pymilvus or gRPC raise becomes one sentence without the token; what they would print beside it on stderr is
  dropped, for our own calls only.
- pymilvus itself repeats calls that meet a rate limit; a server that went away it reports within milliseconds. `call`
  repeats those, for as long as the settings say: reads, and writes and deletes by key, may be repeated, because doing
  them twice is doing them once.
- Every call ends: one attempt after `timeout` (twice that, where pymilvus repeats it and then hears nothing), all of
  them after `retry_seconds` and two such attempts at most. Loading, flushing and building may take hours while the
  server answers; where it is silent, gRPC notices within some 70 seconds.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from delf_milvus.errors import CollectionError, DatabaseError, DelfMilvusError, UsageError
from delf_milvus.forking import OneProcess
from delf_milvus.settings import StoreSettings, TlsSettings
from delf_milvus.store.profiles import Backend

if TYPE_CHECKING:
    from pymilvus import MilvusClient

_CONNECT_SECONDS = 10.0
_CONNECT_FAILED = 2
_COLLECTION_NOT_FOUND = 100
_NOT_LOADED = 101
# Busy, still loading, or a node, channel or replica that moves to another place: it passes.
_PASSING = frozenset((4, 8, 12, 103, 106, 110, 202, 401, 502, 503, 901, 902, 903))
# What a server says, with a code that means anything, of some calls while it starts or ends, and of a collection whose
# properties somebody changes at that moment; of one that is gone it says something else.
_PASSING_TEXT = re.compile(r"unrecoverable error|service not ready|can't find collection name")
# Out of memory or disk, by its own count, or writing is denied: it lasts until somebody makes room.
_FULL = frozenset((3, 7, 9))
# What an embedded database says of a file that may not grow, a full disk, and an exceeded quota.
_FULL_DISK = re.compile(r"\[Errno (27|28|122)\]")
# What pymilvus says when its own patience ends, with a code that means anything.
_LATE = re.compile(r"Retry timeout: [\d.]+s$|\(DEADLINE_EXCEEDED\)")
_ATTEMPTS_PAST_DEADLINE = 2
_OLDEST_SERVER = (2, 3)
_DATABASE_NOT_FOUND = 800
_NOT_AUTHENTICATED = 1400
_NOT_PERMITTED = 1401
_LITE = "milvus_lite-"

# gRPC would send even a loopback connection through a proxy that the environment names; and it would ping the embedded
# server so often that the server, busy with a long call, hangs up on it.
_LOOPBACK = {
    "grpc.enable_http_proxy": 0,
    "grpc.keepalive_time_ms": 600_000,
    "grpc.keepalive_permit_without_calls": 0,
}

# After a long outage gRPC would wait up to two minutes before it tries again, and a new connection would wait with it.
_SERVER = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
    "grpc.use_local_subchannel_pool": 1,
}

_asking: ContextVar[bool] = ContextVar("_asking", default=False)
_embedded: dict[str, int] = {}
_embedded_guard = threading.Lock()
_write_locks: dict[str, threading.RLock] = {}
_stderr_guard = threading.RLock()
_database = OneProcess("A database was opened")


Result = TypeVar("Result")

log = logging.getLogger(__name__)


class NotLoadedError(DatabaseError):
    """A collection must be loaded before it can be read."""


class AwayError(DatabaseError):
    """The database cannot be reached or cannot serve just now: the same call may work in a moment."""


class DeadlineError(DatabaseError):
    """The database did not answer in time."""


class _NotOurs(logging.Filter):
    """Lets through what other users of pymilvus in this process cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _asking.get()


def _unimplemented(record: logging.LogRecord) -> bool:
    """Drops that the client asked Milvus Lite, in this process, for what it lacks: the client goes on without it."""
    return not (record.exc_info and record.exc_info[0] is NotImplementedError)


_not_ours = _NotOurs()
_silent = logging.NullHandler()


class Connection:
    """A connected client and what is known about its other end.

    client: the pymilvus client. backend: "lite" or "server". version: "Milvus Lite 3.2.2" or "Milvus 2.6.4".
    where: path or address for messages, without secrets. timeout: seconds for an answer. retry_seconds: how long `call`
    repeats a call. write_lock: held by one writer of an embedded database. plain: whether the client is pymilvus's own
    blocking one, which has ways to send that its public methods lack.

    Raises DatabaseError for a server that does not answer, or that is too old.
    """

    def __init__(
        self,
        client: MilvusClient,
        where: str,
        timeout: float,
        *,
        embedded: str = "",
        owned: bool,
        retry_seconds: float = 0.0,
    ) -> None:
        from pymilvus import MilvusClient as Client

        self.client = client
        self.plain = isinstance(client, Client)
        self.where = where
        self.timeout = timeout
        self.retry_seconds = retry_seconds
        self._embedded = embedded
        self._owned = owned
        self._closed = False
        self.write_lock = _write_locks.setdefault(embedded, threading.RLock()) if embedded else threading.RLock()
        with self.asking("reading its version"):
            version = str(client.get_server_version(timeout=timeout))
        with self.asking("opening it"):
            # In a database that does not exist pymilvus says of every collection merely that it is absent.
            client.list_collections(timeout=timeout)
        self.backend: Backend = "lite" if version.startswith(_LITE) else "server"
        self.version = (
            f"Milvus Lite {version.removeprefix(_LITE)}" if self.backend == "lite" else f"Milvus {version.lstrip('v')}"
        )
        found = re.match(r"v?(\d+)\.(\d+)", version)
        if self.backend == "server" and found and (int(found[1]), int(found[2])) < _OLDEST_SERVER:
            oldest = ".".join(map(str, _OLDEST_SERVER))
            raise DatabaseError(
                f"{where} is {self.version}, which is too old: update it to Milvus {oldest} or newer, best a 2.6."
            )

    @contextmanager
    def asking(self, doing: str) -> Iterator[None]:
        """Around every call of the client: raises DatabaseError or CollectionError for whatever it raises."""
        with asking_milvus(self.where, doing, self.timeout):
            yield

    def call(self, doing: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the client within the time limit; what may be repeated is repeated: see `patiently`.

        For reads, and for writes and deletes by primary key. Raises as `asking` does.
        """

        def once() -> Any:
            with self.asking(doing):
                return function(*arguments, timeout=self.timeout, **options)

        return self.patiently(once)

    def patiently(self, function: Callable[[], Result]) -> Result:
        """Call what may be called twice, with growing pauses, until it succeeds or patience ends.

        An answer that is late is waited for once more, a database that is away or busy for `retry_seconds`; then the
        last error is raised.
        """
        from tenacity import Retrying

        return Retrying(**self.patience())(function)

    def patience(self) -> dict[str, Any]:
        """When to call again, and when to give up, for tenacity's `Retrying` and `AsyncRetrying`."""
        from tenacity import RetryCallState, retry_if_exception_type, wait_exponential, wait_random

        def give_up(state: RetryCallState) -> bool:
            late = state.outcome is not None and isinstance(state.outcome.exception(), DeadlineError)
            spent = (state.seconds_since_start or 0) + state.upcoming_sleep
            if late:
                return state.attempt_number >= _ATTEMPTS_PAST_DEADLINE or spent >= self.retry_seconds + self.timeout
            return spent >= self.retry_seconds

        def tell(state: RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome is not None:
                log.warning("%s Trying again.", state.outcome.exception())

        return {
            "retry": retry_if_exception_type((AwayError, DeadlineError)),
            "wait": wait_exponential(multiplier=0.1, max=2.0) + wait_random(0, 0.1),
            "stop": give_up,
            "before_sleep": tell,
            "reraise": True,
        }

    def building(self) -> AbstractContextManager[None]:
        """Around what may build an index: keeps faiss, which Milvus Lite runs in this process, from printing."""
        return _without_clustering_warnings() if self.backend == "lite" else nullcontext()

    def close(self) -> None:
        """Close the client if it is ours, and stop the embedded database if nobody else in this process uses it."""
        # A forked process has a copy of what is still in use where it was opened.
        if self._closed or not self._owned or _database.is_elsewhere:
            return
        self._closed = True
        with _embedded_guard:
            self.client.close()
            if self._embedded in _embedded:
                _embedded[self._embedded] -= 1
                if not _embedded[self._embedded]:
                    del _embedded[self._embedded]
                    from milvus_lite.server_manager import server_manager_instance

                    with _without_clustering_warnings():
                        server_manager_instance.release_server(self._embedded)


def adopt(
    client: Any, timeout: float, where: str = "the given client's server", retry_seconds: float = 0.0
) -> Connection:
    """A connection over a client (or what acts as one) that somebody else opened and will close."""
    _silence()
    return Connection(client, where, timeout, owned=False, retry_seconds=retry_seconds)


def is_server(uri: str) -> bool:
    """Whether the uri names a server rather than the path of an embedded database."""
    return "://" in uri or uri.startswith("unix:")


def embedded_exists(uri: str) -> bool:
    """Whether there is anything at the path of an embedded database; raises as `connect` does for what is none."""
    return os.path.isdir(_checked_path(uri))


def server_options(uri: str, token: str, settings: StoreSettings) -> dict[str, Any]:
    """What the constructor of pymilvus's clients takes for this server; raises UsageError for what makes no sense."""
    if not re.match(r"(https?|tcp)://.|unix:.", uri):
        raise UsageError(f"{shown(uri)!r} is no address of a Milvus server: it starts with http:// or https://.")
    password = settings.password.get_secret_value()
    if bool(settings.user) != bool(password):
        raise UsageError("store.user and store.password belong together: set both, or a token.")
    if token and settings.user:
        raise UsageError("Give a token, or store.user and store.password, not both.")
    return {
        "uri": uri,
        "token": token,
        "user": settings.user,
        "password": password,
        "db_name": settings.db_name,
        "timeout": min(settings.timeout, _CONNECT_SECONDS),
        # Not shared with other users of pymilvus in this process, who could close it.
        "dedicated": True,
        "grpc_options": _SERVER,
        **_tls_options(uri, settings.tls),
    }


def _tls_options(uri: str, tls: TlsSettings) -> dict[str, str]:
    given = [name for name, value in tls if value]
    if not given:
        return {}
    if not uri.startswith("https://"):
        raise UsageError(f"store.tls.{given[0]} needs an address that starts with https://, not {shown(uri)!r}.")
    # pymilvus would leave an incomplete set out without a word.
    if bool(tls.cert) != bool(tls.key) or (tls.cert and not tls.ca):
        raise UsageError("A client certificate needs all of store.tls.ca, store.tls.cert and store.tls.key.")
    for name in ("ca", "cert", "key"):
        path = getattr(tls, name)
        if path is None:
            continue
        try:
            with open(path, "rb") as file:
                is_pem = b"-----BEGIN " in file.read(1_000_000)
        except OSError as error:
            raise UsageError(f"store.tls.{name}, {path}, cannot be read: {error.strerror}.") from None
        if not is_pem:
            raise UsageError(f"store.tls.{name}, {path}, is no PEM file.")
    if tls.cert:
        options = {"ca_pem_path": tls.ca, "client_pem_path": tls.cert, "client_key_path": tls.key}
    else:
        options = {"server_pem_path": tls.ca}
    return {
        **{name: str(path) for name, path in options.items() if path},
        **({"server_name": tls.server_name} if tls.server_name else {}),
    }


def server_name(uri: str, settings: StoreSettings) -> str:
    """The address and database of a server for messages, without secrets."""
    return shown(uri).rstrip("/") + (f"/{settings.db_name}" if settings.db_name else "")


def connect(uri: str, token: str, settings: StoreSettings) -> Connection:
    """Connect to a server, or start or join the embedded database at a path (it is created if absent).

    Raises UsageError for a uri that is neither and for TLS settings that do not fit together, DatabaseError for a
    server that does not answer within ten seconds (or `settings.timeout`) or refuses who asks, a path that cannot be a
    database, or one that another process has open.
    """
    from pymilvus import MilvusClient

    _silence()
    timeout = settings.timeout
    patience = min(timeout, _CONNECT_SECONDS)
    if is_server(uri):
        options, where = server_options(uri, token, settings), server_name(uri, settings)
        with asking_milvus(where, "connecting", patience):
            client = MilvusClient(**options)
        return _checked(client, where, timeout, settings.retry_seconds)
    _tls_options(uri, settings.tls)
    path = _checked_path(uri)
    with _embedded_guard:
        running = path not in _embedded and _is_locked(path)
        try:
            with asking_milvus(uri, "opening it", patience):
                client = MilvusClient(
                    path, timeout=patience, dedicated=True, db_name=settings.db_name, grpc_options=_LOOPBACK
                )
        except DatabaseError as error:
            if _is_locked(path):
                raise DatabaseError(
                    f"{uri} is open in another process; end that one first, or use a Milvus server to share."
                ) from error
            if not os.access(path, os.W_OK | os.X_OK):
                raise DatabaseError(f"{uri} cannot be written: check the permissions of that folder.") from error
            raise
        if not running:
            _embedded[path] = _embedded.get(path, 0) + 1
    return Connection(client, uri, timeout, embedded=path, owned=True)


def _checked(client: MilvusClient, where: str, timeout: float, retry_seconds: float) -> Connection:
    """A connection of our own over a client that has just been opened, which is closed if it turns out useless."""
    try:
        return Connection(client, where, timeout, owned=True, retry_seconds=retry_seconds)
    except BaseException:
        client.close()
        raise


def shown(uri: str) -> str:
    """The uri as it may be printed: without user, password, token or query."""
    return re.sub(r"//.*@", "//", uri, flags=re.DOTALL).partition("?")[0] if is_server(uri) else uri


@contextmanager
def asking_milvus(where: str, doing: str, timeout: float) -> Iterator[None]:
    """Around every call of a client, sync or async: what it raises becomes DatabaseError or CollectionError.

    Raises UsageError in a process that was forked after its parent had called one.
    """
    import grpc
    from pymilvus.exceptions import ConnectionConfigException, MilvusException

    _database.check()
    mark = _asking.set(True)
    try:
        yield
    except ConnectionConfigException as error:
        raise DatabaseError(f"{where} cannot be opened: {_sentence(error.message)}.") from None
    except MilvusException as error:
        raise _failed(error, where, doing, timeout) from None
    except grpc.RpcError as error:
        raise _refused(error, where, doing, timeout) from None
    finally:
        _asking.reset(mark)


def _failed(error: Any, where: str, doing: str, timeout: float) -> DelfMilvusError:
    """What an exception of pymilvus means."""
    import grpc

    cause, reason = error.__cause__, _sentence(error.message)
    if error.code == _CONNECT_FAILED and isinstance(cause, grpc.RpcError):
        return _refused(cause, where, doing, timeout)
    if error.code == _CONNECT_FAILED or isinstance(error.code, grpc.StatusCode):
        return AwayError(f"Cannot reach the database at {where} while {doing}: is it running?")
    if _LATE.search(error.message):
        return _late(where, doing, timeout)
    if error.code in _PASSING or _PASSING_TEXT.search(error.message):
        return AwayError(f"The database at {where} is not ready while {doing}: {reason}.")
    if error.code in _FULL or _FULL_DISK.search(error.message):
        return DatabaseError(
            f"The database at {where} takes no more while {doing}: {reason}; make room there or raise its limits, then "
            "do the same again."
        )
    return _denied(error, where, doing) or DatabaseError(f"The database at {where} failed while {doing}: {reason}.")


def _denied(error: Any, where: str, doing: str) -> DelfMilvusError | None:
    """What an exception of pymilvus means that is about one collection, one database or one user; else None."""
    if error.code == _NOT_LOADED:
        return NotLoadedError(f"A collection at {where} was released while {doing}; try again.")
    if error.code == _COLLECTION_NOT_FOUND:
        return CollectionError(
            f"A collection at {where} is gone while {doing}: somebody else dropped it; ingest again."
        )
    if error.code == _NOT_AUTHENTICATED:
        return _wrong_secret(where)
    if error.code == _NOT_PERMITTED:
        return _not_permitted(where, doing, error.message)
    if error.code == _DATABASE_NOT_FOUND or re.fullmatch(r"database '[^']*' does not exist", error.message):
        return DatabaseError(
            f"{where} cannot be used while {doing}: the server has no such database; create it, or choose another "
            "with --db."
        )
    return None


def _refused(error: Any, where: str, doing: str, timeout: float) -> DatabaseError:
    """What a failed call of gRPC means."""
    import grpc

    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return _late(where, doing, timeout)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return _wrong_secret(where)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return _not_permitted(where, doing, details)
    if code is grpc.StatusCode.UNAVAILABLE:
        if re.search(r"ssl|certificate|handshake|tls", details, re.IGNORECASE):
            return DatabaseError(
                f"No secure connection to {where} while {doing}: it does not speak TLS, or one side does not accept "
                "the other's certificate; check store.tls.ca, store.tls.cert and store.tls.server_name."
            )
        refused = "refused" in details.lower()
        hint = "" if refused or not where.startswith("http://") else ", and not waiting for https://"
        return AwayError(f"Cannot reach the database at {where} while {doing}: is it running{hint}?")
    return DatabaseError(f"The database at {where} failed while {doing}: {_sentence(details or code.name)}.")


def _late(where: str, doing: str, timeout: float) -> DeadlineError:
    return DeadlineError(f"The database at {where} did not answer within {timeout:g} s while {doing}.")


def _wrong_secret(where: str) -> DatabaseError:
    return DatabaseError(
        f"The database at {where} does not accept this token, or user and password: check --token, or store.user and "
        "store.password."
    )


def _not_permitted(where: str, doing: str, details: str) -> DatabaseError:
    privilege = re.search(r"Privilege(\w+): permission deny", details)
    wanted = f"the privilege {privilege[1]}" if privilege else "more privileges"
    return DatabaseError(f"This user may not do that at {where} while {doing}: it needs {wanted}; ask who runs it.")


def _sentence(message: str) -> str:
    """The first line of a message of pymilvus, without its stop and without the user and password of an address."""
    lines = re.sub(r"//[^/\s]*@", "//", message.strip()).splitlines()
    return lines[0].strip().rstrip(".:,") if lines else "no reason given"


def _checked_path(uri: str) -> str:
    if not uri.endswith(".db"):
        raise UsageError(
            f"{uri!r} names no database: an embedded one is a path that ends in .db, a server an http:// address."
        )
    path = Path(uri).absolute()
    if not path.parent.is_dir():
        raise DatabaseError(f"{uri} cannot be opened: the folder {path.parent} does not exist.")
    if path.exists() and not path.is_dir():
        raise DatabaseError(f"{uri} is a file, but an embedded database is a folder; choose another path.")
    return os.path.abspath(path)


def _is_locked(path: str) -> bool:
    """Whether any process, this one included, runs the embedded database at that path."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        with open(os.path.join(path, "LOCK"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _silence() -> None:
    """Keep off stderr what pymilvus and Milvus Lite log about failures that are raised to us as well."""
    for name in ("pymilvus", "pymilvus.milvus_client"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_not_ours)
    logging.getLogger("milvus_lite.server_manager").addFilter(_not_ours)
    # Milvus Lite's own threads log too: without any handler Python would print that on stderr.
    logging.getLogger("milvus_lite").addHandler(_silent)
    logging.getLogger("grpc._server").addFilter(_unimplemented)


@contextmanager
def _without_clustering_warnings() -> Iterator[None]:
    """Hold back faiss's advice about training points while Milvus Lite builds an index in this process.

    faiss prints it from C for every small segment and has no switch for it. So file descriptor 2 of the whole process,
    all its threads included, is redirected to a temporary file meanwhile; everything else that reaches it is passed on
    afterwards. In a process without stderr nothing is touched: descriptor 2 is closed, or some other file by now.
    """
    with _stderr_guard:
        kept = _duplicate_stderr()
        if kept is None:
            yield
            return
        try:
            with tempfile.TemporaryFile() as held:
                _flush_stderr()
                os.dup2(held.fileno(), 2)
                try:
                    yield
                finally:
                    _flush_stderr()
                    os.dup2(kept, 2)
                    held.seek(0)
                    for line in held:
                        if not line.startswith(b"WARNING clustering "):
                            os.write(kept, line)
        finally:
            os.close(kept)


def _duplicate_stderr() -> int | None:
    """A second descriptor of this process's stderr; None where it was started without, or has closed it."""
    try:
        # Where 2 was closed, it is soon a file that this process opened, and such files are not inheritable.
        return os.dup(2) if sys.stderr is not None and os.get_inheritable(2) else None
    except OSError:
        return None


def _flush_stderr() -> None:
    # A stream that is closed, or that cannot be written, has nothing to lose.
    with suppress(OSError, ValueError):
        sys.stderr.flush()
