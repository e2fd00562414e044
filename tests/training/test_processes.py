"""Several processes, started by torchrun on this machine's CPUs: the same training as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training.samples import metrics, write_classes, write_trunk

from delf_milvus.errors import UsageError
from delf_milvus.model import weights
from delf_milvus.training.processes import Processes

pytest.importorskip("delf_milvus.training.vision", reason="needs torchvision (extra: train)")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ALONE = [sys.executable, "-m"]


def train(start: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `delf-milvus train` with these options, as one process or as two; a thread each."""
    return subprocess.run(
        [*start, "delf_milvus", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_classes(folder / "scenes", each=8)
    write_trunk(folder / "trunk.safetensors")
    return folder


def finetune(folder: Path, start: list[str], name: str, *more: object) -> subprocess.CompletedProcess[str]:
    common = ("--data", folder / "scenes", "--init", folder / "trunk.safetensors", "--precision", "fp32", "--batch", 8)
    return train(start, "finetune", *common, "--out", folder / name, *more)


def test_two_processes_train_as_one_does(folder: Path) -> None:
    options = ("--epochs", 2, "--global-head", "arcface", "--global-dim", 8)
    alone, together = (finetune(folder, start, n, *options) for start, n in ((ALONE, "one"), (TORCHRUN, "two")))
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    one, two = metrics(folder / "one"), metrics(folder / "two")
    assert [line["epoch"] for line in two] == [1, 2], "written by one process"
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
        assert second["training_accuracy"] == first["training_accuracy"]
        assert second["validation_accuracy"] == first["validation_accuracy"]
    expected, found = (weights.read(folder / name / "trunk.safetensors")[1] for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)
    environment = json.loads((folder / "two" / "environment.json").read_text())
    assert (environment["processes"], environment["device"]) == (2, "cpu")
    assert together.stdout.splitlines() == [str(folder / "two" / "trunk.safetensors")]
    assert together.stderr.count("epoch 1:") == 1

    # A run of two processes is resumed by one: the checkpoint is the same.
    resumed = finetune(folder, ALONE, "two", "--epochs", 3, *options[2:])
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after epoch 2" in resumed.stderr
    assert [line["epoch"] for line in metrics(folder / "two")] == [1, 2, 3]


def test_two_processes_share_the_feature_maps_of_attention(folder: Path) -> None:
    for start, name in ((ALONE, "a1"), (TORCHRUN, "a2")):
        run = train(
            start, "attention", "--data", folder / "scenes", "--init", folder / "trunk.safetensors", "--views", 2,
            "--epochs", 2, "--batch", 8, "--longest", 96, "--precision", "fp32", "--out", folder / name,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    whole = (folder / "a1" / "training.f16").read_bytes()
    parts = [(folder / "a2" / f"training.{rank}.f16").read_bytes() for rank in (0, 1)]
    assert min(map(len, parts)) > 0
    assert sum(map(len, parts)) == len(whole)
    # The map of the first photo's first view is the first of the first part.
    starts = json.loads((folder / "a1" / "training.json").read_text())["starts"]
    length = starts[1] * 64 * 2
    mine, theirs = (np.frombuffer(part[:length], np.float16) for part in (whole, parts[0]))
    np.testing.assert_allclose(mine.astype(np.float32), theirs.astype(np.float32), atol=1e-2)
    one, two = metrics(folder / "a1"), metrics(folder / "a2")
    assert [line["epoch"] for line in two] == [1, 2]
    # BatchNorm of the head sees the cells of half a batch.
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.2)
    assert "attention.conv1.weight" in weights.read(folder / "a2" / "attention.safetensors")[1]


def test_a_batch_that_cannot_be_shared_is_one_sentence(folder: Path) -> None:
    here = Processes(torch.device("cpu"), 0, 3)
    assert here.share(12) == 4
    for batch in (8, 3):
        with pytest.raises(UsageError, match="give --batch a multiple of 3, 6 at least"):
            here.share(batch)
    refused = finetune(folder, TORCHRUN, "refused", "--batch", 7)
    assert refused.returncode != 0
    assert "Error: A batch of 7 cannot be shared by 2 processes" in refused.stderr
    assert not (folder / "refused").exists()


def test_a_reduction_is_fitted_by_one_process(folder: Path) -> None:
    refused = train(
        TORCHRUN, "reduction", "--data", folder / "scenes", "--init", folder / "trunk.safetensors", "--out",
        folder / "r", "--selection", "norm", "--dim", 8, "--global-dim", 0,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "run it without torchrun" in refused.stderr
