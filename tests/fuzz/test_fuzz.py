"""A short look at every reader; `python tests/fuzz/fuzz_readers.py` looks for as long as it is told to.

The inputs are the same in every run: what is found here is found again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fuzz import fuzz_runner, fuzz_targets
from fuzz.fuzz_runner import fuzz

pytestmark = pytest.mark.slow

BROKEN = Path(__file__).with_name("broken_reader.py")


@pytest.mark.parametrize("target", sorted(fuzz_targets.TARGETS))
def test_damaged_inputs_are_read_or_refused_in_one_sentence(target: str, tmp_path: Path) -> None:
    # The time bounds a slow machine's part of the suite; nothing is asked of it.
    outcome = fuzz(target, tmp_path, inputs=150, seconds=8, seed="suite")
    told = "\n\n".join(f"{one.kind}: {one.error}\n{one.trace}" for one in outcome.findings)
    assert not outcome.findings, told
    assert outcome.refused, "nothing that was damaged was refused"


@pytest.mark.skipif(sys.platform != "linux", reason="bounds of memory and processor time are those of Linux")
@pytest.mark.parametrize(
    ("input_", "kind"),
    [("raise", "exception"), ("lines", "sentence"), ("memory", "memory"), ("loop", "hang"), ("crash", "crash")],
)
def test_whatever_an_input_does_to_a_process_is_found_and_its_input_saved(
    input_: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_runner, "CHILD", BROKEN)
    monkeypatch.setenv("BROKEN_INPUT", input_)
    outcome = fuzz("broken", tmp_path, inputs=3, seconds=60, processor_seconds=4)
    assert [one.kind for one in outcome.findings] == [kind]
    assert outcome.findings[0].path.read_bytes() == input_.encode()
    assert outcome.findings[0].path.with_suffix(".txt").exists()
