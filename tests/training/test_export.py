"""Weight files tell how they were made, and so do the model cards beside them; neither tells where anything lies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_photo, save_photo
from training.samples import TRUNK, metrics, write_classes, write_trunk
from typer.testing import CliRunner

from delf_milvus.cli.main import app
from delf_milvus.errors import InputError, ModelError, UsageError
from delf_milvus.model.spec import ModelSpec, read_header
from delf_milvus.training.export import CARD, card_text

pytest.importorskip("delf_milvus.training.vision", reason="needs torchvision (extra: train)")

from delf_milvus.training.attention import AttentionConfig, train_attention
from delf_milvus.training.finetune import FinetuneConfig, finetune
from delf_milvus.training.precision import Arithmetic
from delf_milvus.training.reduction import ReductionConfig, fit_reduction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_classes(folder / "scenes")
    write_trunk(folder / "random.safetensors")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        (folder / "scenes",), folder / "run", folder / "random.safetensors", epochs=1, batch=8, load=64, crop=48
    )


@pytest.fixture(scope="module")
def trunk(folder: Path) -> Path:
    """Made by the command line, whose words are in the card."""
    options = {"--data": folder / "scenes", "--init": folder / "random.safetensors", "--out": folder / "f"}
    words = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(app, ["train", "finetune", *words, "--epochs", "1", "--batch", "8", "--seed", "3"])
    assert result.exit_code == 0, result.output
    return folder / "f" / "trunk.safetensors"


def test_the_card_of_a_model_tells_every_stage_and_no_place(folder: Path, trunk: Path) -> None:
    attended = train_attention(
        AttentionConfig((folder / "scenes",), folder / "a", trunk, epochs=1, batch=8, longest=64, views=1, hidden=8),
        say=lambda _: None,
    )
    model = fit_reduction(
        ReductionConfig((folder / "scenes",), folder / "m", attended, dim=8, global_dim=4), say=lambda _: None
    )
    card = (folder / "m" / CARD).read_text()
    assert hashlib.sha256(model.read_bytes()).hexdigest() in card
    for number, stage in enumerate(("finetune", "attention", "reduction"), 1):
        assert f"{number}. **{stage}**" in card
    assert "8-d descriptors of unit length; a 4-d descriptor of the whole photo" in card
    assert "| photos | 33 |" in card
    assert "| classes | 3 |" in card
    loss = metrics(folder / "a")[-1]["loss"]
    assert f"loss {loss}" in card
    command = "delf-milvus train finetune --data scenes --init random.safetensors --epochs 1 --batch 8 --seed 3"
    assert command in card
    assert "licence" in card
    assert str(folder) not in card
    assert str(folder) not in json.dumps(read_header(model)[1])


def test_cards_lie_beside_every_export(trunk: Path) -> None:
    card = (trunk.parent / CARD).read_text()
    assert "not reduced yet: `train reduction` makes a model of it" in card
    assert "--out" not in card


def test_names_of_folders_cannot_break_a_card() -> None:
    record = {"data": ["a|b\n# c", "`<x>`"], "photos": 1}
    card = card_text("m.safetensors", "0" * 64, ModelSpec(TRUNK), {"1 finetune": record})
    assert "| data | a\\|b\\\\n\\# c, \\`\\<x\\>\\` |" in card


def test_the_same_stage_twice_is_told_twice(config: FinetuneConfig, trunk: Path, tmp_path: Path) -> None:
    again = finetune(replace(config, out=tmp_path, init=trunk), say=lambda _: None)
    assert list(read_header(again)[1]["training"]) == ["1 finetune", "2 finetune"]


def test_an_autoencoder_is_exported_as_any_reduction(folder: Path, trunk: Path, tmp_path: Path) -> None:
    from delf_milvus.model.extractor import Extractor
    from delf_milvus.settings import ExtractSettings

    plain = ReductionConfig((folder / "scenes",), tmp_path / "pca", trunk, selection="norm", dim=8, global_dim=0)
    learnt = replace(plain, out=tmp_path / "learnt", method="autoencoder", epochs=3)
    models = [fit_reduction(one, say=lambda _: None) for one in (plain, learnt)]
    assert read_header(models[0])[0] == read_header(models[1])[0]
    photo = make_photo(1, 96, 80)
    first, second = (Extractor(model, ExtractSettings()).extract(photo, 40).descriptors for model in models)
    assert first.shape == second.shape == (40, 8)
    assert abs(first - second).max() > 0.01
    stages = [line["stage"] for line in metrics(tmp_path / "learnt")]
    assert stages == ["autoencoder"] * 3 + ["reduction"]


def test_what_cannot_be_fitted_is_refused_before_anything_is_computed(
    folder: Path, trunk: Path, tmp_path: Path
) -> None:
    plain = ReductionConfig((folder / "scenes",), tmp_path / "run", trunk, selection="norm", dim=8, global_dim=0)
    with pytest.raises(UsageError, match="has 64 channels; give --dim 64 or less"):
        fit_reduction(replace(plain, dim=65))
    with pytest.raises(ModelError, match="no global reduction to keep"):
        fit_reduction(replace(plain, keep_global=True))
    assert not plain.out.exists()


def test_a_photo_that_cannot_be_read_does_not_end_a_reduction(folder: Path, trunk: Path, tmp_path: Path) -> None:
    for seed in range(4):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed, 96, 80))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no photo")
    said: list[str] = []
    plain = ReductionConfig((tmp_path / "photos",), tmp_path / "run", trunk, selection="norm", dim=8, global_dim=2)
    assert fit_reduction(plain, say=said.append).is_file()
    assert sum(line.startswith("left out:") and "broken.png" in line for line in said) == 1
    assert metrics(tmp_path / "run")[0]["photos"] == 4


def test_a_file_that_is_no_photo_is_told_before_training(config: FinetuneConfig, tmp_path: Path) -> None:
    data = write_classes(tmp_path / "scenes", each=4)
    (data / "red" / "broken.png").write_bytes(b"no photo")
    changed = replace(config, data=(data,), out=tmp_path / "run")
    with pytest.raises(InputError, match=r"broken\.png is not a readable photo; remove it"):
        finetune(changed, say=lambda _: None)
    with pytest.raises(InputError, match=r"broken\.png"):
        train_attention(AttentionConfig((data,), tmp_path / "run", config.init, batch=8), say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_written_is_one_sentence(config: FinetuneConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot hold the run: .*; give --out a folder"):
        finetune(replace(config, out=tmp_path / "file"), say=lambda _: None)


def test_a_checkpoint_of_other_classes_or_a_damaged_one_is_one_sentence(config: FinetuneConfig, tmp_path: Path) -> None:
    data = write_classes(tmp_path / "scenes", each=6)
    changed = replace(config, data=(data,), out=tmp_path / "run")
    finetune(changed, say=lambda _: None)
    for seed in range(4):
        save_photo(data / "violet" / f"{seed}.png", make_photo(seed, 96, 80))
    with pytest.raises(UsageError, match="holds a run with other classes"):
        finetune(replace(changed, epochs=2), say=lambda _: None)
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UsageError, match="is damaged; remove it to begin again"):
        finetune(replace(changed, epochs=2), say=lambda _: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_fp32_weights(config: FinetuneConfig, tmp_path: Path, precision: str) -> None:
    from safetensors import safe_open

    chosen = replace(config, out=tmp_path, precision=precision, epochs=2, learning_rate=0.01)  # type: ignore[arg-type]
    path = finetune(chosen, say=lambda _: None)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[1] < losses[0]
    with safe_open(path, framework="pt") as file:
        assert str(file.get_tensor("trunk.conv1.weight").dtype) == "torch.float32"
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    # The loss is scaled in fp16 alone, and a resumed run goes on with the scale.
    assert ("scale" in json.loads(progress["arithmetic"])) == (precision == "fp16")
    assert (
        json.loads((tmp_path / "environment.json").read_text())["precision"]
        == {
            "fp32": "torch.float32",
            "bf16": "torch.bfloat16",
            "fp16": "torch.float16",
        }[precision]
    )


def test_a_step_whose_gradient_overflows_is_left_out() -> None:
    import torch

    arithmetic = Arithmetic("fp16", torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    arithmetic.step(weight.sum() * float("inf"), optimizer, [weight], 5.0)
    assert weight.item() == 1
    arithmetic.step(weight.sum(), optimizer, [weight], 5.0)
    assert weight.item() == pytest.approx(0.9)


def test_options_with_a_wrong_word_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    common = ["--data", str(folder / "scenes"), "--init", str(folder / "random.safetensors"), "--out", str(tmp_path)]
    for options, message in (
        (["finetune", *common, "--precision", "half"], "--precision is auto, fp32, bf16 or fp16, not half."),
        (["finetune", *common, "--global-head", "x"], "--global-head is softmax or arcface, not x."),
        (["attention", *common, "--keep", "first"], "--keep is last or best, not first."),
        (["reduction", *common, "--method", "lda"], "--method is pca or autoencoder, not lda."),
        (["attention", *common, "--least-scale", "2", "--batch", "4"], "--least-scale and --most-scale"),
    ):
        result = CliRunner().invoke(app, ["train", *options])
        assert isinstance(result.exception, UsageError), options
        assert message in str(result.exception)
