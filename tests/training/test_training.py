"""Training end to end on generated photos and a tiny network: it learns, resumes, excludes, refuses what it cannot use,
and its files load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photo, save_photo
from training.samples import metrics, write_classes, write_trunk

from delf_milvus.errors import InputError, ModelError, UsageError
from delf_milvus.imaging.decode import decode
from delf_milvus.model import weights
from delf_milvus.model.delf import pooled
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import DecodeSettings, ExtractSettings

pytest.importorskip("delf_milvus.training.vision", reason="needs torchvision (extra: train)")

from delf_milvus.training.attention import AttentionConfig, AttentionPooling, _view, train_attention
from delf_milvus.training.data import PhotoDataset, labelled_photos, split
from delf_milvus.training.finetune import FinetuneConfig, finetune
from delf_milvus.training.reduction import ReductionConfig, fit_reduction


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trunk(tmp_path_factory.mktemp("initial") / "trunk.safetensors")


def config(data: Path, initial: Path, out: Path, **changes: object) -> FinetuneConfig:
    plain = FinetuneConfig(
        data=(data,), out=out, init=initial, epochs=4, batch=8, load=64, crop=48, learning_rate=0.02, validate_every=6
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trunk(data: Path, initial: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(config(data, initial, tmp_path_factory.mktemp("finetune")), say=lambda _: None)


def test_fine_tuning_learns_and_changes_every_layer(trunk: Path, initial: Path) -> None:
    log = metrics(trunk.parent)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]
    _, before, _ = weights.read(initial)
    _, after, _ = weights.read(trunk)
    trained = [n for n in before if n.endswith(("weight", "bias")) and not n.startswith("trunk.input_bn")]
    assert trained
    for name in trained:
        assert not torch.equal(before[name], after[name]), name
    # Statistics stay those of the initial network.
    for name in before:
        if "running" in name:
            assert torch.equal(before[name], after[name]), name


def test_tensorboard_shows_the_metrics(trunk: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard (extra: train)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(trunk.parent / "tensorboard"))
    curves.Reload()
    written = metrics(trunk.parent)
    for name in ("loss", "validation_accuracy"):
        found = [(point.step, point.value) for point in curves.Scalars(f"finetune/{name}")]
        assert found == [(line["epoch"], pytest.approx(line[name])) for line in written]


def test_a_resumed_run_goes_on_where_it_stopped(data: Path, initial: Path, tmp_path: Path) -> None:
    said: list[str] = []
    finetune(config(data, initial, tmp_path, epochs=1), say=said.append)
    finetune(config(data, initial, tmp_path, epochs=3), say=said.append)
    assert "resuming after epoch 1" in said
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0.5), ("exclude", ("red",)), ("seed", 7), ("batch", 4), ("crop", 32)]
)
def test_a_run_is_not_resumed_with_another_configuration(
    data: Path, initial: Path, trunk: Path, tmp_path: Path, field: str, value: object
) -> None:
    out = shutil.copytree(trunk.parent, tmp_path / "moved")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"another {field};"):
        finetune(config(data, initial, out, epochs=9, **{field: value}), say=lambda _: None)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_is_not_resumed_with_other_weights_under_the_old_name(data: Path, tmp_path: Path) -> None:
    first = write_trunk(tmp_path / "trunk.safetensors")
    finetune(config(data, first, tmp_path / "run", epochs=1), say=lambda _: None)
    write_trunk(first, seed=1)
    with pytest.raises(UsageError, match="another init_digest;"):
        finetune(config(data, first, tmp_path / "run", epochs=2), say=lambda _: None)


def test_the_configuration_of_a_moved_and_continued_run_is_the_last_one(
    data: Path, initial: Path, trunk: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trunk.parent, tmp_path / "moved")
    finetune(config(data, initial, out, epochs=5), say=lambda _: None)
    values = json.loads((out / "config.json").read_text())
    assert (values["epochs"], values["out"]) == (5, str(out))
    assert [line["epoch"] for line in metrics(out)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_without_its_configuration_is_not_resumed(
    data: Path, initial: Path, trunk: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trunk.parent, tmp_path / "moved")
    (out / "config.json").write_text("{")
    with pytest.raises(UsageError, match="no readable config"):
        finetune(config(data, initial, out), say=lambda _: None)


def test_fewer_photos_than_one_batch_are_one_sentence(data: Path, initial: Path, tmp_path: Path) -> None:
    expected = "has 30 photos to train on, fewer than one batch of {}: add photos or lower --batch"
    with pytest.raises(InputError, match=expected.format(31)):
        finetune(config(data, initial, tmp_path / "finetune", batch=31), say=lambda _: None)
    plain = AttentionConfig(data=(data,), out=tmp_path / "attention", init=initial, validate_every=6, views=2, batch=61)
    with pytest.raises(InputError, match=expected.format(61)):
        train_attention(plain, say=lambda _: None)


def test_keeping_all_of_the_initial_weights_gives_them_back(data: Path, initial: Path, tmp_path: Path) -> None:
    path = finetune(config(data, initial, tmp_path, epochs=1, keep_initial=1.0), say=lambda _: None)
    _, before, _ = weights.read(initial)
    _, after, _ = weights.read(path)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_excluded_classes_are_in_neither_part(data: Path) -> None:
    photos = labelled_photos([data], exclude=["green"])
    assert photos.classes == ["scenes/blue", "scenes/red"]
    assert not any("green" in path.parts for path in photos.paths)
    training, validation = split(photos, 5)
    assert set(training.paths).isdisjoint(validation.paths)
    assert len(training.paths) + len(validation.paths) == len(photos.paths) == 24


@pytest.mark.parametrize("clean", [False, True])
def test_the_csv_of_google_landmarks_labels_the_photos_that_are_there(tmp_path: Path, clean: bool) -> None:
    there = {"abc1": "7", "abd2": "7", "cde3": "12"}
    for photo in there:
        save_photo(tmp_path / "train" / photo[0] / photo[1] / photo[2] / f"{photo}.jpg", make_photo(0, 40, 30))
    rows = "id,url,landmark_id\nabc1,u,7\ncde3,u,12\nabd2,u,7\nfff9,u,5\n../x,u,7\n"
    if clean:
        rows = "landmark_id,images\n7,abd2 abc1 ../x\n12,cde3\n5,fff9\n"
    file = tmp_path / "train.csv"
    file.write_text(rows)
    photos = labelled_photos([file])
    assert photos.classes == ["train.csv/12", "train.csv/7"]
    assert [path.stem for path in photos.paths] == ["cde3", "abc1", "abd2"]
    assert photos.labels == [0, 1, 1]
    assert labelled_photos([file], ["7"]).classes == ["train.csv/12"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1,2\n", "columns"), ("id,landmark_id\nabc1,7\n", "None of the photos"), ("", "columns")],
)
def test_a_csv_that_labels_nothing_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        labelled_photos([tmp_path / "train.csv"])
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="Google Landmarks"):
        labelled_photos([tmp_path / "train.csv"])


def test_more_photos_than_memory_holds_are_read_when_drawn(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = labelled_photos([data])
    kept = PhotoDataset(photos, 40, lambda image: image)
    monkeypatch.setattr("delf_milvus.training.data.MOST_IN_MEMORY", 10)
    read = PhotoDataset(photos, 40, lambda image: image)
    assert (len(read.images), len(read), len(kept.images)) == (0, 36, 36)
    for index in (0, 17, 35):
        assert torch.equal(read[index][0], kept[index][0])
        assert read[index][1] == kept[index][1]


def test_a_folder_without_classes_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one a class"):
        labelled_photos([tmp_path])


@pytest.fixture(scope="module")
def attended(data: Path, trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attention")
    settings = AttentionConfig(
        data=(data,), out=out, init=trunk, epochs=6, batch=8, longest=96, views=2, hidden=16, learning_rate=0.01
    )
    return train_attention(settings, say=lambda _: None)


def test_attention_learns_on_a_frozen_trunk(attended: Path, trunk: Path) -> None:
    log = metrics(attended.parent)
    assert log[-1]["loss"] < log[0]["loss"]
    _, before, _ = weights.read(trunk)
    _, after, _ = weights.read(attended)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    assert any(name.startswith("attention.") for name in after)


def test_feature_maps_are_computed_once_for_each_trunk_and_way_to_make_them(
    data: Path, initial: Path, tmp_path: Path
) -> None:
    other = write_trunk(tmp_path / "other.safetensors", seed=1)
    photos = shutil.copytree(data, tmp_path / "scenes")
    plain = AttentionConfig(data=(photos,), out=tmp_path / "run", init=initial, epochs=1, batch=8, longest=48, hidden=8)

    def computed(changed: AttentionConfig) -> bool:
        # Without its checkpoint the folder is that of a run that was killed in its first epoch.
        (changed.out / "checkpoint.safetensors").unlink(missing_ok=True)
        said: list[str] = []
        train_attention(changed, say=said.append)
        return any("training.f16" in line for line in said)

    assert computed(plain)
    assert not computed(plain)
    assert not computed(replace(plain, learning_rate=0.5))
    maps = (plain.out / "training.f16").read_bytes()
    for change in (
        {"init": other},
        {"data": (data,)},
        {"exclude": ("red",)},
        {"views": 2},
        {"scales": (0.5, 1.0)},
        {"longest": 40},
        {"seed": 1},
    ):
        assert computed(replace(plain, **change)), change  # type: ignore[arg-type]
    assert computed(replace(plain, init=other))
    assert (plain.out / "training.f16").read_bytes() != maps
    assert computed(plain)
    assert (plain.out / "training.f16").read_bytes() == maps
    save_photo(photos / "red" / "0.png", make_photo(999, 96, 80))
    assert computed(plain)
    (plain.out / "training.json").write_text('{"sources": ')
    assert computed(plain)


def test_attention_refuses_a_file_without_the_whole_trunk(data: Path, initial: Path, tmp_path: Path) -> None:
    spec, tensors, _ = weights.read(initial)
    path = tmp_path / "part.safetensors"
    weights.save(path, {name: value for name, value in tensors.items() if "stages.1" not in name}, spec)
    with pytest.raises(ModelError, match=r"stages\.1"):
        train_attention(AttentionConfig(data=(data,), out=tmp_path / "run", init=path), say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_pooling_equals_the_plain_weighted_mean() -> None:
    torch.manual_seed(0)
    pooling = AttentionPooling(6, 4, 3).eval()
    maps = [torch.rand(n, 6) for n in (5, 1, 9)]
    photo = torch.cat([torch.full((len(m),), i) for i, m in enumerate(maps)])
    with torch.inference_mode():
        logits = pooling(torch.cat(maps), photo, 3)
        for number, cells in enumerate(maps):
            scores = pooling.head(cells.T[None, :, :, None]).reshape(-1, 1)
            mean = (torch.nn.functional.normalize(cells, dim=1) * scores).sum(0) / scores.sum()
            torch.testing.assert_close(logits[number], pooling.classifier(mean * 6**0.5))


def test_the_reduction_is_the_pca_of_the_selected_descriptors(attended: Path, data: Path, tmp_path: Path) -> None:
    settings = ReductionConfig(
        data=(data,), out=tmp_path, init=attended, dim=8, features=50, exclude=("red",), global_dim=4
    )
    model = fit_reduction(settings, say=lambda _: None)
    network = weights.load(model)
    projection = network.reduction.projection.numpy()
    np.testing.assert_allclose(projection @ projection.T, np.eye(8), atol=1e-4)
    extractor = Extractor(model, ExtractSettings())
    features = extractor.extract(make_photo(5, 96, 80), 50)
    assert features.descriptors.shape == (50, 8)
    for line in metrics(tmp_path):
        assert line["photos"] == 24
        assert 0 < line["explained_variance"] <= 1


def test_global_descriptors_are_whitened(attended: Path, data: Path, tmp_path: Path) -> None:
    fit_reduction(ReductionConfig(data=(data,), out=tmp_path, init=attended, dim=8, global_dim=4), say=lambda _: None)
    extractor = Extractor(tmp_path / "model.safetensors", ExtractSettings())
    reduction = weights.load(tmp_path / "model.safetensors").global_reduction
    assert reduction is not None
    reduced = []
    for path in sorted(data.rglob("*.png")):
        with torch.inference_mode():
            levels = [level.maps[0] for level in extractor._levels(decode(path, DecodeSettings())[None])]
        reduced.append((reduction.projection @ (pooled(levels) - reduction.mean)).numpy())
    np.testing.assert_allclose(np.cov(np.array(reduced).T, bias=True), np.eye(4), atol=0.05)


def test_too_few_photos_for_global_descriptors_are_one_sentence(attended: Path, data: Path, tmp_path: Path) -> None:
    few = ReductionConfig(data=(data,), out=tmp_path / "run", init=attended, dim=8, global_dim=36)
    with pytest.raises(InputError, match=r"36 photos are too few .* --global-dim"):
        fit_reduction(few, say=lambda _: None)
    assert not few.out.exists(), "refused before anything is computed"


def test_selection_by_attention_needs_a_head(trunk: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="attention"):
        fit_reduction(ReductionConfig(data=(data,), out=tmp_path, init=trunk), say=lambda _: None)
    model = fit_reduction(
        ReductionConfig(data=(data,), out=tmp_path, init=trunk, selection="norm", dim=8, global_dim=0),
        say=lambda _: None,
    )
    assert Extractor(model, ExtractSettings()).selection == "norm"


class Listener:
    """Keeps what a training tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.told: list[tuple[str, int, int, str]] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        self.told.append((what, done, total, unit))


def test_a_watcher_hears_how_far_a_training_is(data: Path, initial: Path, attended: Path, tmp_path: Path) -> None:
    tuning, fitting = Listener(), Listener()
    finetune(config(data, initial, tmp_path / "finetune", epochs=2), say=tuning)
    fit_reduction(ReductionConfig(data=(data,), out=tmp_path / "model", init=attended, dim=8, global_dim=0), fitting)
    for listener, what in ((tuning, "finetune"), (fitting, "reduction")):
        names, done, totals, units = zip(*listener.told, strict=True)
        assert (set(names), set(units), len(set(totals))) == ({what}, {"photos"}, 1)
        assert list(done) == sorted(set(done))
        assert done[-1] == totals[0]
        assert listener.lines


def test_views_are_rescaled_at_random_and_cropped_as_in_the_paper_on_request(data: Path, initial: Path) -> None:
    path = next(data.rglob("*.png"))  # 96 x 80
    whole = AttentionConfig((data,), data, initial, longest=48, scales=(0.5, 1.0))
    sizes = {tuple(_view(path, whole, 16, np.random.default_rng(seed)).shape[2:]) for seed in range(40)}
    assert len(sizes) > 5
    assert all(20 <= height <= 40 and 24 <= width <= 48 for height, width in sizes)
    cropped = replace(whole, crop=32, scales=(1.0, 1.0))
    views = [_view(path, cropped, 16, np.random.default_rng(seed)) for seed in range(6)]
    assert {tuple(view.shape) for view in views} == {(1, 3, 32, 32)}
    assert not torch.equal(views[0], views[1]), "the crop is drawn anew"
    # At the least a cell.
    assert _view(path, replace(cropped, scales=(0.1, 0.1)), 16, np.random.default_rng(0)).shape[2:] == (16, 16)
