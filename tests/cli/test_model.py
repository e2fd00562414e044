"""`model` as a user meets it; what needs TensorFlow is in tests/model/test_official.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from test_commands import call

from delf_milvus.model.spec import BUNDLED


def test_show_tells_what_is_in_the_bundled_file(tmp_path: Path) -> None:
    shown = call(tmp_path, "--json", "model", "show")
    assert (shown.returncode, shown.stderr) == (0, "")
    told = json.loads(shown.stdout)
    assert told["sha256"] == hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    assert (told["spec"]["trunk"]["stride"], told["spec"]["dim"], told["spec"]["pyramid"]) == (16, 40, "area")
    named = call(tmp_path, "--json", "--model", BUNDLED, "model", "show")
    given = call(tmp_path, "--json", "--model", "missing.safetensors", "model", "show", BUNDLED)
    assert named.stdout == given.stdout == shown.stdout
    table = call(tmp_path, "model", "show").stdout.splitlines()
    assert ["spec.trunk.layout", "v2"] in [line.split() for line in table]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("model", "show", "missing.safetensors"), 4, "There is no model file"),
        (("model", "show", "text.safetensors"), 4, "not a delf-milvus weight file"),
        (("--model", "missing.safetensors", "model", "show"), 4, "There is no model file"),
        (("model", "import-official", ".", "--out", "model.npz"), 2, "must end in .safetensors"),
    ],
)
def test_what_cannot_be_shown_or_written_is_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "text.safetensors").write_text("text")
    refused = call(tmp_path, *arguments)
    assert refused.returncode == code
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
