"""Confidence is a share: it rises with the evidence, and it means what it says on fresh samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import ModelError
from delf_milvus.model.spec import BUNDLED
from delf_milvus.retrieval.confidence import Calibration, Survival, chance_levels, fit_scorer, with_levels
from delf_milvus.retrieval.evidence import NAMES


def sample(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(5, 2, count)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50), st.integers(0, 50))
def test_more_evidence_never_means_less_confidence(values: list[float], seed: int) -> None:
    shares = Survival.fit(sample(seed, 500))(np.sort(values))
    assert (np.diff(shares) <= 0).all()
    assert ((shares >= 0) & (shares <= 1)).all()


@pytest.mark.parametrize("share", [0.5, 0.1, 0.05, 0.01])
def test_false_alarms_on_a_fresh_sample_are_as_many_as_promised(share: float) -> None:
    survival = Survival.fit(sample(0, 2000))
    assert np.mean(survival(sample(1, 200_000)) <= share) == pytest.approx(share, rel=0.4)


def test_the_tail_goes_on_beyond_everything_seen() -> None:
    survival = Survival.fit(sample(0, 1000))
    largest = sample(0, 1000).max()
    assert 0 < survival([largest * 1.5])[0] < survival([largest])[0] < 0.01


def test_a_few_true_matches_in_the_sample_do_not_move_the_bar() -> None:
    clean = sample(0, 1000)
    mixed = np.concatenate([clean, np.full(8, 10 * clean.max())])
    evidence = np.linspace(0, 60, 6001)
    bars = [evidence[np.argmax(Survival.fit(values)(evidence) <= 0.01)] for values in (clean, mixed)]
    assert bars[1] == pytest.approx(bars[0], rel=0.15)


def test_equal_values_and_small_samples() -> None:
    survival = Survival.fit(np.full(200, 3.0))
    assert survival([2.9])[0] == 1
    assert survival([3.1])[0] < 1e-6
    for bad in (np.zeros(5), np.full(200, np.nan)):
        with pytest.raises(ValueError, match="at least 100"):
            Survival.fit(bad)


def candidates(rng: np.random.Generator, inliers: np.ndarray, similar: float = 0.0) -> np.ndarray:
    """Evidence of candidates with these inliers; `similar` raises the share of very similar matches."""
    count = len(inliers)
    putatives = inliers * 2 + rng.poisson(20, count)
    close = rng.binomial(inliers, min(0.3 + similar, 1.0))
    distinct = rng.binomial(putatives, min(0.05 + similar / 2, 1.0))
    logs = np.log1p(np.stack([inliers, putatives, close, distinct], axis=1))
    rest = np.stack([rng.uniform(0.1, 0.3, count), rng.normal(0, 1, count), rng.uniform(0.5, 1, count)], axis=1)
    return np.hstack([logs, rest])


def searches(seed: int, count: int, images: int = 100) -> list[np.ndarray]:
    """Evidence of unrelated candidates by chance; each query has a level of its own."""
    rng = np.random.default_rng(seed)
    return [candidates(rng, rng.poisson(level, images)) for level in rng.uniform(5, 9, count)]


def matching(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return candidates(rng, rng.poisson(30, count), similar=0.3)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    without = searches(0, 800)
    chance = chance_levels(without)
    right = [with_levels(one[None], chance) for one in matching(5, 300)]
    wrong = [with_levels(one, chance) for one in without]
    answers = fit_scorer(np.concatenate(right), np.concatenate(wrong)[::20], wrong, right)
    pairs = np.concatenate(searches(1, 20))
    alone = fit_scorer(matching(6, 300), pairs, [one[None] for one in pairs], [one[None] for one in matching(7, 300)])
    return Calibration(chance, answers, alone)


def test_queries_without_a_match_are_answered_as_rarely_as_asked(calibration: Calibration) -> None:
    best = np.array([calibration.assess(one).false_alarm.min() for one in searches(2, 4000)])
    for bar in (0.1, 0.01):
        assert np.mean(best <= bar) == pytest.approx(bar, rel=0.5)


def test_confidence_is_the_share_of_right_ones_among_answers_as_sure(calibration: Calibration) -> None:
    rng = np.random.default_rng(3)
    wrong = [calibration.assess(one).confidence.max() for one in searches(3, 2000)]
    right = []
    for one, crowd in zip(matching(4, 2000), searches(4, 2000, 30), strict=True):
        right.append(calibration.assess(np.vstack([one, crowd[1:]])).confidence[0])
    sure = np.concatenate([wrong, right])
    truth = np.repeat([False, True], 2000)
    order = rng.permutation(len(sure))
    bins = np.digitize(sure[order], np.linspace(0, 1, 11)[1:-1])
    error = sum(
        abs(sure[order][bins == b].mean() - truth[order][bins == b].mean()) * np.mean(bins == b)
        for b in np.unique(bins)
    )
    assert error < 0.03


def test_the_same_inliers_mean_less_where_every_candidate_has_many(calibration: Calibration) -> None:
    rng = np.random.default_rng(0)
    quiet, loud = candidates(rng, np.full(100, 5)), candidates(rng, np.full(100, 11))
    quiet[0] = loud[0] = candidates(rng, np.array([22]))[0]
    assert calibration.assess(quiet).false_alarm[0] < calibration.assess(loud).false_alarm[0]


def test_a_collection_full_of_matches_still_answers(calibration: Calibration) -> None:
    rng = np.random.default_rng(0)
    for count in (100, 3):
        assessed = calibration.assess(candidates(rng, np.full(count, 60), similar=0.3))
        assert (assessed.false_alarm < 0.01).all()
        assert (assessed.confidence > 0.9).all()


def test_other_unrelated_photos_move_the_bar_and_not_the_weights(calibration: Calibration) -> None:
    rng = np.random.default_rng(8)
    harder = [candidates(rng, rng.poisson(14, 100), similar=0.1) for _ in range(600)]
    refitted = calibration.refitted(harder, np.concatenate(harder[:30]))
    assert refitted.answers.weights == calibration.answers.weights
    assert refitted.chance != calibration.chance
    fresh = [candidates(rng, rng.poisson(14, 100), similar=0.1) for _ in range(2000)]
    rates = [np.mean([one.assess(f).false_alarm.min() <= 0.05 for f in fresh]) for one in (calibration, refitted)]
    assert rates[1] == pytest.approx(0.05, rel=0.5)
    assert rates[0] > 2 * rates[1]


def test_weights_need_both_kinds() -> None:
    none = np.empty((0, len(NAMES)))
    with pytest.raises(ValueError, match="photos that match, and photos that do not"):
        fit_scorer(none, matching(0, 10), [matching(0, 10)], [matching(0, 10)])


def test_a_calibration_survives_its_file(calibration: Calibration, tmp_path: Path) -> None:
    calibration.write(tmp_path / "model.calibration.json")
    assert Calibration.read(tmp_path / "model.calibration.json") == calibration


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "chance": [1, 2]}', "null"])
def test_a_damaged_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.calibration.json"
    path.write_text(text)
    with pytest.raises(ModelError, match="not a calibration"):
        Calibration.read(path)


def test_a_calibration_of_another_version_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "model.calibration.json"
    replace(calibration, version=Calibration.version + 1).write(path)
    with pytest.raises(ModelError, match="version"):
        Calibration.read(path)


def test_no_inliers_are_no_confidence(calibration: Calibration) -> None:
    nothing = np.zeros((2, len(NAMES)))
    assert calibration.assess(nothing[:0]).confidence.shape == (0,)
    for assessed in (calibration.assess(nothing), calibration.assess_pairs(nothing)):
        assert assessed.confidence.tolist() == [0, 0]
        assert assessed.false_alarm.tolist() == [1, 1]


def changed_calibration(*path: str, value: object) -> str:
    """The bundled calibration with another value at a place."""
    values = json.loads(BUNDLED.with_name("delf_resnet50v2.calibration.json").read_text())
    place = values
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        changed_calibration("chance", value=[[10**400] * 3] * 2),
        changed_calibration("chance", value=[[float("nan")] * 3] * 2),
        changed_calibration("answers", "weights", value=[float("inf")] * (len(NAMES) + 2)),
        changed_calibration("answers", "slope", value=float("nan")),
        changed_calibration("answers", "slope", value=-1.0),
        changed_calibration("pairs", "unrelated", "quantiles", value=[]),
        changed_calibration("pairs", "unrelated", "quantiles", value=[3.0, 2.0, 1.0]),
        changed_calibration("pairs", "unrelated", "tail", value=0),
    ],
)
def test_a_calibration_that_would_mean_nothing_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ModelError, match="is not a calibration"):
        Calibration.read(tmp_path / "calibration.json")
