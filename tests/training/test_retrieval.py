"""Validation by retrieval while training: when it judges, what is kept, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from conftest import make_photo, save_photo
from training.samples import metrics, write_classes, write_places, write_trunk

from delf_milvus.errors import InputError, UsageError
from delf_milvus.model import weights
from delf_milvus.model.spec import read_header
from delf_milvus.settings import Settings

pytest.importorskip("delf_milvus.training.vision", reason="needs torchvision (extra: train)")

from delf_milvus.evaluation import validation
from delf_milvus.evaluation.validation import RetrievalValidation
from delf_milvus.model.extractor import Extractor
from delf_milvus.training.attention import AttentionConfig, train_attention
from delf_milvus.training.finetune import FinetuneConfig, finetune
from delf_milvus.training.reduction import ReductionConfig, fit_reduction

SETTINGS = Settings(extract={"preset": "fast"})  # type: ignore[arg-type] # validated by pydantic


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_places(tmp_path_factory.mktemp("places") / "places")


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trunk(tmp_path_factory.mktemp("initial") / "trunk.safetensors")


@pytest.fixture(scope="module")
def judge(places: Path) -> RetrievalValidation:
    return RetrievalValidation(places, 6, SETTINGS)


def config(data: Path, initial: Path, out: Path) -> FinetuneConfig:
    return FinetuneConfig(
        data=(data,), out=out, init=initial, epochs=3, batch=8, load=64, crop=48, learning_rate=0.02, validate_every=6
    )


@dataclass
class Falling:
    """A judge for whom the weights of one epoch are the best, and later ones ever worse."""

    best: int
    photos: frozenset[Path] = frozenset()
    seen: list[dict[str, torch.Tensor]] = field(default_factory=list)
    stop: int | None = None

    def __call__(self, model: Path) -> Mapping[str, float]:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(weights.read(model)[1])
        return {"retrieval_map": 1 / (1 + abs(len(self.seen) - 1 - self.best))}


@pytest.fixture(scope="module")
def run(
    data: Path, initial: Path, judge: RetrievalValidation, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    said: list[str] = []
    out = tmp_path_factory.mktemp("run")
    finetune(config(data, initial, out), say=said.append, validation=judge)
    return out, said


def test_weights_are_judged_before_the_first_epoch_and_after_each(run: tuple[Path, list[str]]) -> None:
    out, said = run
    log = metrics(out)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    for line in log:
        assert 0 < line["retrieval_map"] <= 1
        assert 0 < line["retrieval_map_global"] <= 1
    assert any(line.startswith("before training: retrieval map 0.") or "map 1" in line for line in said)
    assert not (out / "moment.safetensors").exists()


def test_tensorboard_shows_the_figures_of_retrieval(run: tuple[Path, list[str]]) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard (extra: train)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(run[0] / "tensorboard"))
    curves.Reload()
    found = [(point.step, point.value) for point in curves.Scalars("finetune/retrieval_map")]
    assert found == [(line["epoch"], pytest.approx(line["retrieval_map"])) for line in metrics(run[0])]


def test_the_initial_weights_are_what_is_judged_first(
    run: tuple[Path, list[str]], initial: Path, data: Path, judge: RetrievalValidation, tmp_path: Path
) -> None:
    other = finetune(
        replace(config(data, initial, tmp_path), epochs=1, keep_initial=1.0), say=lambda _: None, validation=judge
    )
    log = metrics(other.parent)
    # With nothing but the initial weights in the export, an epoch changes nothing.
    assert log[0]["retrieval_map"] == pytest.approx(log[1]["retrieval_map"], abs=1e-3)
    assert log[0]["retrieval_map"] == metrics(run[0])[0]["retrieval_map"]


@pytest.mark.parametrize("best", [0, 2])
def test_the_best_weights_are_exported_on_request(data: Path, initial: Path, tmp_path: Path, best: int) -> None:
    judge = Falling(best)
    path = finetune(replace(config(data, initial, tmp_path), keep="best"), say=lambda _: None, validation=judge)
    _, tensors, notes = weights.read(path)
    assert len(judge.seen) == 4
    for name, value in tensors.items():
        assert torch.equal(value, judge.seen[best][name]), name
    assert not torch.equal(tensors["trunk.conv1.weight"], judge.seen[3]["trunk.conv1.weight"])
    assert notes["training"]["1 finetune"]["kept"] == {"epoch": best, "retrieval_map": 1.0}
    # The run goes on, with the last weights this time.
    last = finetune(replace(config(data, initial, tmp_path), keep="last"), say=lambda _: None, validation=judge)
    assert torch.equal(weights.read(last)[1]["trunk.conv1.weight"], judge.seen[3]["trunk.conv1.weight"])


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(data: Path, initial: Path, tmp_path: Path) -> None:
    whole = replace(config(data, initial, tmp_path / "whole"), precision="fp32")
    killed = replace(whole, out=tmp_path / "killed")
    expected = finetune(whole, say=lambda _: None, validation=Falling(1))
    with pytest.raises(KeyboardInterrupt):
        finetune(killed, say=lambda _: None, validation=Falling(1, stop=2))
    path = finetune(killed, say=lambda _: None, validation=Falling(1))
    for name, value in weights.read(expected)[1].items():
        torch.testing.assert_close(weights.read(path)[1][name], value, atol=1e-6, rtol=1e-5)
    assert [line["epoch"] for line in metrics(killed.out)] == [0, 1, 2, 3]


def test_attention_is_judged_and_kept_too(data: Path, initial: Path, tmp_path: Path) -> None:
    judge = Falling(1)
    settings = AttentionConfig(
        data=(data,), out=tmp_path, init=initial, epochs=2, batch=8, longest=64, views=1, hidden=8, keep="best"
    )
    _, tensors, notes = weights.read(train_attention(settings, say=lambda _: None, validation=judge))
    assert [line["epoch"] for line in metrics(tmp_path)] == [0, 1, 2]
    assert torch.equal(tensors["attention.conv1.weight"], judge.seen[1]["attention.conv1.weight"])
    assert notes["training"]["1 attention"]["kept"]["epoch"] == 1


def test_photos_do_not_train_and_validate(data: Path, initial: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would train and validate"):
        finetune(config(data, initial, tmp_path), validation=RetrievalValidation(data, 5, SETTINGS))
    with pytest.raises(UsageError, match="--keep best chooses by validation"):
        finetune(replace(config(data, initial, tmp_path), keep="best"))
    assert not list(tmp_path.iterdir())


def test_global_figures_are_those_of_the_model_s_own_descriptors(
    data: Path, initial: Path, places: Path, judge: RetrievalValidation, tmp_path: Path
) -> None:
    """A finished model is judged with its own reductions; the plain way to rank by cosine gives the same."""
    model = fit_reduction(
        ReductionConfig((data,), tmp_path, initial, selection="norm", dim=8, global_dim=6), say=lambda _: None
    )
    from delf_milvus.evaluation.metrics import average_precision
    from delf_milvus.imaging.decode import decode
    from delf_milvus.settings import DecodeSettings

    extractor = Extractor(model, SETTINGS.extract)
    vectors = {
        path.relative_to(places).as_posix(): extractor.extract(decode(path, DecodeSettings()), 300).global_descriptor
        for path in sorted(places.rglob("*.png"))
    }
    expected = []
    for query in judge._queries:
        ranking = sorted(vectors, key=lambda name, own=vectors[query.name]: -float(vectors[name] @ own))
        same = {name for name in vectors if name.split("/")[0] == query.name.split("/")[0]} - {query.name}
        expected.append(average_precision(ranking, same, {query.name}))
    found = judge.precisions(model)
    assert found["retrieval_map_global"].tolist() == pytest.approx(expected)
    assert found["retrieval_map"].mean() > 0.7


def test_a_validation_folder_is_bounded_and_has_folders(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(RetrievalValidation(places, 100, SETTINGS).photos) == 12
    monkeypatch.setattr(validation, "MOST_PHOTOS", 11)
    with pytest.raises(InputError, match="has 12 photos, and is searched after every epoch"):
        RetrievalValidation(places, 5, SETTINGS)
    save_photo(tmp_path / "loose.png", make_photo(1))
    with pytest.raises(InputError, match="no folder with two photos"):
        RetrievalValidation(tmp_path, 5, SETTINGS)


def test_arcface_exports_its_whitening_through_all_stages(
    data: Path, initial: Path, judge: RetrievalValidation, tmp_path: Path
) -> None:
    arc = replace(config(data, initial, tmp_path / "f"), head="arcface", global_dim=12, learning_rate=0.001)
    trunk = finetune(arc, say=lambda _: None, validation=judge)
    log = metrics(trunk.parent)
    # Three colours are told apart from the first epoch on, by what the head begins with.
    assert log[1]["training_accuracy"] > 0.8
    assert log[-1]["validation_accuracy"] > 0.8
    spec, learnt, _ = weights.read(trunk)
    assert (spec.global_dim, learnt["global_reduction.projection"].shape) == (12, (12, 64))
    attended = train_attention(
        AttentionConfig((data,), tmp_path / "a", trunk, epochs=1, batch=8, longest=64, views=1, hidden=8),
        say=lambda _: None,
    )
    made = ReductionConfig((data,), tmp_path / "m", attended, dim=8, keep_global=True)
    model = fit_reduction(made, say=lambda _: None)
    spec, tensors, notes = weights.read(model)
    assert (spec.global_dim, spec.dim, spec.selection) == (12, 8, "attention")
    assert torch.equal(tensors["global_reduction.projection"], learnt["global_reduction.projection"])
    features = Extractor(model, SETTINGS.extract).extract(make_photo(3, 96, 80), 50)
    assert features.global_descriptor.shape == (12,)
    assert list(notes["training"]) == ["1 finetune", "2 attention", "3 reduction"]
    # Fitted anew on request, as for any trunk.
    fitted = fit_reduction(replace(made, out=tmp_path / "p", keep_global=False, global_dim=5), say=lambda _: None)
    assert read_header(fitted)[0].global_dim == 5


def test_a_mixed_trunk_has_no_learnt_whitening(data: Path, initial: Path, tmp_path: Path) -> None:
    mixed = replace(config(data, initial, tmp_path), head="arcface", global_dim=12, keep_initial=0.5, epochs=1)
    spec, tensors, _ = weights.read(finetune(mixed, say=lambda _: None))
    assert spec.global_dim == 0
    assert not any("reduction" in name for name in tensors)
    with pytest.raises(UsageError, match="has 64 channels; give --global-dim 64 or less"):
        finetune(replace(mixed, out=tmp_path / "wide", global_dim=65), say=lambda _: None)
