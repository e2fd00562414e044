"""Fuzzing in child processes: whatever an input does to a process, it is found, saved and told."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("fuzz_child.py")

_START_SECONDS = 300.0


@dataclass(frozen=True)
class Finding:
    """Something that must not happen. kind: exception, sentence, memory, hang or crash. path: the input, saved."""

    kind: str
    error: str
    path: Path
    trace: str = ""

    @property
    def cause(self) -> str:
        """What findings of one cause have in common: the kind, and the last line of the package in the trace."""
        ours = [line.strip() for line in self.trace.splitlines() if "/delf_milvus/" in line]
        return f"{self.kind} {ours[-1] if ours else self.error.partition(':')[0]}"


@dataclass
class Outcome:
    """What came of fuzzing one target. findings: one of each cause, `repeated` more of the same."""

    target: str
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    repeated: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """Inputs that were read to an end or a finding."""
        return self.accepted + self.refused + self.repeated + len(self.findings)


def fuzz(
    target: str,
    folder: Path,
    *,
    seconds: float,
    inputs: int = 1 << 40,
    seed: str = "0",
    processor_seconds: float = 20.0,
    silent_seconds: float = 120.0,
    told: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Fuzz a target until `inputs` or `seconds` are over; inputs of findings are saved in `folder`.

    The same seed gives the same inputs. processor_seconds: of one input, beyond which it is a hang, as is one after
    which a process is silent for `silent_seconds`. told: called with what is known after each process.
    """
    outcome = Outcome(target)
    started = time.monotonic()
    number, last = 0, inputs
    causes: set[str] = set()
    while number < last and (left := seconds - (time.monotonic() - started)) > 0:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=f"{target}-work-"))
        arguments = [target, seed, number, last, left, processor_seconds, work]
        ended, lines, stderr = _watched([str(one) for one in arguments], work, silent_seconds)
        if not lines:
            raise RuntimeError(f"fuzzing {target} did not begin: {stderr[-3000:]}")
        number = lines[-1]["next"]
        outcome.accepted += lines[-1]["accepted"]
        outcome.refused += lines[-1]["refused"]
        found = [(one["kind"], one["error"], one.get("trace", ""), one["input"]) for one in lines if "kind" in one]
        if "end" not in lines[-1]:
            kind = "hang" if ended in ("silent", -signal.SIGPROF) else "crash"
            error = "it takes too long" if kind == "hang" else f"the process ended with {ended}"
            # What was read since the last line is lost, but for the input itself.
            found.append((kind, error, stderr[-3000:], "input"))
        for kind, error, trace, at in found:
            finding = Finding(kind, error, folder / f"{target}-{kind}-{len(causes)}", trace)
            if finding.cause in causes:
                outcome.repeated += 1
                continue
            causes.add(finding.cause)
            finding.path.write_bytes((work / at).read_bytes())
            finding.path.with_suffix(".txt").write_text(f"{target} {kind}, seed {seed}\n{error}\n{trace}\n")
            outcome.findings.append(finding)
        if "end" not in lines[-1]:
            number += 500
        shutil.rmtree(work, ignore_errors=True)
        outcome.seconds = time.monotonic() - started
        if told is not None:
            told(outcome)
    return outcome


def _watched(arguments: list[str], work: Path, silent: float) -> tuple[int | str, list[dict[str, Any]], str]:
    """Run a child; its exit code or "silent", the lines that it told, and what it wrote on stderr."""
    with (work / "stderr").open("wb") as errors:
        child = subprocess.Popen([sys.executable, str(CHILD), *arguments], stdout=subprocess.PIPE, stderr=errors)
        assert child.stdout is not None
        text = b""
        patience = max(silent, _START_SECONDS)
        ended: int | str = 0
        while True:
            ready, _, _ = select.select([child.stdout], [], [], patience)
            if not ready:
                child.kill()
                ended = "silent"
                break
            piece = os.read(child.stdout.fileno(), 1 << 16)
            if not piece:
                break
            text += piece
            patience = silent
        child.stdout.close()
        code = child.wait()
    lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
    return ended or code, lines, (work / "stderr").read_text(errors="replace")
