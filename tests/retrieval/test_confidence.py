"""Confidence is a share: it rises with the evidence, and it means what it says on fresh samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import ModelError
from delf_milvus.retrieval.confidence import Calibration, Survival


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


def searches(seed: int, count: int, images: int = 100) -> list[np.ndarray]:
    """Chance inliers of unrelated candidates; each query has a level of its own."""
    rng = np.random.default_rng(seed)
    return [rng.poisson(level, images) for level in rng.uniform(5, 9, count)]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.fit(searches(0, 800), np.concatenate(searches(1, 20)))


def test_queries_without_a_match_are_answered_as_rarely_as_asked(calibration: Calibration) -> None:
    best = np.array([calibration.confidence(inliers).max() for inliers in searches(2, 4000)])
    for bar in (0.1, 0.01):
        assert np.mean(best >= 1 - bar) == pytest.approx(bar, rel=0.5)


def test_the_same_inliers_mean_less_where_every_candidate_has_many(calibration: Calibration) -> None:
    quiet, loud = np.full(100, 5), np.full(100, 11)
    quiet[0] = loud[0] = 22
    assert calibration.confidence(quiet)[0] > calibration.confidence(loud)[0]


def test_a_collection_full_of_matches_still_answers(calibration: Calibration) -> None:
    assert (calibration.confidence(np.full(100, 60)) > 0.99).all()
    assert (calibration.confidence(np.full(3, 60)) > 0.99).all()


def test_pairs_need_less_evidence_than_the_best_of_many(calibration: Calibration) -> None:
    assert calibration.pair_confidence([16])[0] > calibration.confidence([16])[0]


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
    assert calibration.confidence(np.zeros(0)).shape == (0,)
    assert calibration.confidence([0, 0]).tolist() == [0, 0]
    assert calibration.pair_confidence([0])[0] == 0
