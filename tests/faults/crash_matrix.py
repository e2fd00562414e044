"""Kills the tool, and the server under it, at many moments of every command that writes, and looks at what is left.

    python tests/faults/crash_matrix.py --database lite --kills 100 --journal lite.jsonl
    python tests/faults/crash_matrix.py --database server --kills 100 --server-kills 50 --journal server.jsonl
    python tests/faults/crash_matrix.py --report lite.jsonl server.jsonl

A third of the moments are drawn from the whole duration of the command, measured in a run that nobody disturbs; the
others are aimed at the calls that change the database and the files of an export, half of them at the very moment that
a call begins or has been answered. What must hold afterwards is written in `fault_trials.py`.

Every trial is a line of the journal; a run that ended early goes on where it was, and does what was not counted. The
exit code is 1 where anything did not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fault_material import make
from fault_trials import PATIENCE, WINDOWS, Trial, Trials, Victim
from milvus_server import WheelServer
from pymilvus.exceptions import MilvusException

from delf_milvus.errors import DatabaseError
from delf_milvus.evaluation.journal import Journal

OPERATIONS = ("ingest", "update", "relabel", "prune", "delete", "import", "export", "photos", "reindex")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=("lite", "server"), default="lite")
    parser.add_argument("--kills", type=int, default=16, help="of the tool")
    parser.add_argument("--server-kills", type=int, default=0, help="of the server, while the tool works")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--images", type=int, default=240, help="feature files")
    parser.add_argument("--photos", type=int, default=48, help="drawn photos, for what extracts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, default=Path("crashes.jsonl"))
    parser.add_argument("--report", type=Path, nargs="+", help="only print the tables of these journals")
    options = parser.parse_args()
    if options.server_kills and options.database == "lite":
        parser.error("Milvus Lite runs inside the tool: --server-kills needs --database server")
    journals = options.report or [options.journal]
    if not options.report:
        run(options)
    trials = [Trial(**values) for path in journals for values in _read(path)]
    print(report(trials))
    raise SystemExit(int(any(trial.problems for trial in trials)))


def run(options: argparse.Namespace) -> None:
    """Do the trials that the journal has not yet."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = stack.enter_context(Journal(options.journal))
        wanted: list[tuple[Victim, int]] = [("tool", number) for number in range(options.kills)]
        wanted += [("server", number) for number in range(options.server_kills)]
        wanted.sort(key=lambda one: one[1])
        left = [one for one in wanted if journal.get(_key(options, *one)) is None]
        if not left:
            return
        material = make(folder / "material", options.images, options.photos)
        server = None
        if options.database == "server":
            server = WheelServer(folder / "milvus")
            stack.callback(server.kill)
        trials = Trials(material, folder / "places", server)
        for victim, number in left:
            operation = options.operations[number % len(options.operations)]
            rng = random.Random(f"{options.seed} {victim} {number}")
            try:
                moment = trials.drawn(operation, rng, aimed=number // len(options.operations) % 3 > 0)
                # Half of the commands wait until their server is back, half give up.
                trial = trials.run(operation, victim, moment, rng.choice([0.5, PATIENCE]))
            except (DatabaseError, MilvusException) as error:
                if server is None or (server.is_alive and "service not ready" not in str(error)):
                    raise
                # On a machine so busy that its heartbeats come late, the server gives up, and ends soon after.
                print(f"{victim} {number}: {operation}: the server ended unasked, not counted", flush=True)
                server.restart()
                continue
            journal.add(_key(options, victim, number), asdict(trial))
            print(f"{victim} {number}: {operation}, {trial.phase}: {'; '.join(trial.problems) or 'holds'}", flush=True)


def report(trials: Sequence[Trial]) -> str:
    """The tables, in Markdown."""
    lines = [
        "| command | database | killed | kills | ended before | left features of no image | completed again | equal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys((one.victim, one.database, one.operation) for one in trials):
        here = [one for one in trials if (one.victim, one.database, one.operation) == kind]
        killed = [one for one in here if one.killed]
        sound = sum(not any("again" in problem for problem in one.problems) for one in killed)
        cells = (
            kind[2],
            kind[1],
            kind[0],
            len(killed),
            len(here) - len(killed),
            sum(bool(one.findings) for one in killed),
            sum(one.again in (0, 2, 5) for one in killed),
            sound,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    killed = [one for one in trials if one.killed]
    windows = Counter(WINDOWS.get(one.phase, "elsewhere") for one in killed)
    lines += ["", "| window | kills |", "| --- | --- |", *(f"| {name} | {n} |" for name, n in windows.most_common())]
    phases = Counter(one.phase for one in killed)
    lines += ["", "| last event before the kill | kills |", "| --- | --- |"]
    lines += [f"| {name} | {n} |" for name, n in phases.most_common()]
    lines += [
        "",
        *(
            f"FAILED {one.operation}, {one.database}, {one.victim} killed {one.phase}: {one.problems}"
            for one in trials
            if one.problems
        ),
    ]
    return "\n".join(lines).rstrip()


def _key(options: argparse.Namespace, victim: Victim, number: int) -> str:
    """What a trial depends on."""
    names = " ".join(options.operations)
    return f"{options.database} {victim} {options.seed} {options.images} {options.photos} {names} {number}"


def _read(path: Path) -> list[dict[str, object]]:
    values = [json.loads(line) for line in path.read_text().splitlines()]
    for one in values:
        del one["key"]
    return values


if __name__ == "__main__":
    main()
