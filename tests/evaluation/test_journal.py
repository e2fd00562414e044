"""What a killed run leaves is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from delf_milvus.errors import InputError
from delf_milvus.evaluation.journal import Journal, digest_of


def test_what_was_added_is_there_in_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "results.jsonl"
    with Journal(path) as journal:
        assert journal.get("a") is None
        journal.add("a", {"value": 1})
        journal.add("b", {"value": "\u2028 é\n"})
        journal.add("a", {"value": 2})
        assert journal.get("a") == {"key": "a", "value": 2}
    with Journal(path) as journal:
        assert journal.get("a") == {"key": "a", "value": 2}
        assert journal.get("b") == {"key": "b", "value": "\u2028 é\n"}


@pytest.mark.parametrize("cut", range(1, 23))
def test_a_torn_last_line_is_forgotten_and_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"value": 1})
        journal.add("b", {"value": 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path) as journal:
        assert journal.get("a") is not None
        assert journal.get("b") is None
        journal.add("c", {"value": 3})
    with Journal(path) as journal:
        assert [journal.get(key) is not None for key in "abc"] == [True, False, True]


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b"\0\0", b"\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"key": "a"}\n' + line + b'\n{"key": "b"}\n')
    with pytest.raises(InputError, match="line 2, is no result"):
        Journal(path)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "file" / "results.jsonl")
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path)


def test_a_digest_depends_on_every_value_and_on_no_order() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": 1, "b": [1, 2]}) != digest_of({"a": 1, "b": [2, 1]})
