"""How sure an answer is: all its evidence, weighed, and compared with what photos reach that have no match.

The evidence of a candidate (see `evidence`) is weighed into one score, a logarithm of odds, together with the chance
levels of its query: the inliers and the putative matches that a good quarter of the other candidates, nearly all of
them unrelated, reach by accident. Some photos (textures, repeated windows, plain backgrounds) gather matches
everywhere, and must show more.

Two numbers follow from the score:

- `false_alarm`: the share of queries without a match whose best candidate has at least this score; for a pair, the
  share of unrelated pairs. The bar of an answer is set on it: at most 0.01 means one false alarm in a hundred queries
  without a match, however many queries have one.
- `confidence`: the probability that the answer shows the same thing, if half of all queries have a match (and half of
  all pairs show the same thing). Where matches are rarer than that, it is lower.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import ModelError
from delf_milvus.retrieval.evidence import INLIERS, NAMES, PUTATIVES

Floats = npt.NDArray[np.float64]

Chance = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Least, typical and largest chance level of a query, for inliers and for putatives."""

TAIL = 0.1
"""Share of the calibration sample, the largest scores, that an exponential tail stands for."""

TAIL_SHARES = (0.05, 0.03, 0.02, 0.015)
"""Shares whose quantiles fix the tail's slope, by their median. What lies beyond may be photos that do show the same
thing, in data that is meant to be unrelated; it does not count."""

LEVELS = 101
"""Quantiles that are kept of the rest."""

CROWD = 60
"""Candidates below which the chance level of a query cannot be told from its own candidates."""

CHANCE = 0.75
"""Quantile of the candidates that is the chance level."""

RIDGE = 1e-3
"""Pull of the weights towards zero, for columns of unit variance."""


class Assessment(NamedTuple):
    """What is thought of candidates or pairs: (N,) each. confidence: probability, false_alarm: share, of the module's
    head; without inliers 0 and 1."""

    confidence: Floats
    false_alarm: Floats


@dataclass(frozen=True)
class Survival:
    """How often a score of at least some value occurs where there is no match.

    quantiles: scores at evenly spaced shares from 0 to 1 - TAIL of the sample. tail: scale of the exponential that
    continues them.
    """

    quantiles: tuple[float, ...]
    tail: float

    @staticmethod
    def fit(sample: npt.ArrayLike) -> Survival:
        """Fit to the scores of unrelated cases, (N,); raises ValueError for fewer than 100."""
        values = np.sort(np.asarray(sample, np.float64))
        if len(values) < 100 or not np.isfinite(values).all():
            raise ValueError(f"a calibration needs at least 100 finite values, not {len(values)}")
        quantiles = np.quantile(values, np.linspace(0, 1 - TAIL, LEVELS))
        shares = np.array(TAIL_SHARES)
        beyond = np.quantile(values, 1 - shares) - quantiles[-1]
        tail = float(np.median(beyond / np.log(TAIL / shares)))
        return Survival(tuple(quantiles.round(4).tolist()), max(round(tail, 4), 1e-3))

    def __call__(self, values: npt.ArrayLike) -> Floats:
        """Share of unrelated cases with at least this score, (N,), in (0, 1]; falls with the score."""
        array = np.asarray(values, np.float64)
        shares = np.linspace(1, TAIL, len(self.quantiles))
        body = np.interp(array, self.quantiles, shares)
        beyond = np.maximum(array - self.quantiles[-1], 0)
        return np.where(beyond > 0, TAIL * np.exp(-beyond / self.tail), body)


@dataclass(frozen=True)
class Scorer:
    """Weights of the evidence, and what its scores mean.

    weights: one for each column of `evidence`, and for a search two more, for the chance levels of inliers and
    putatives. unrelated: of the best score of a search, or of a pair, without a match. slope, offset: the confidence is
    the logistic function of slope * score + offset.
    """

    weights: tuple[float, ...]
    unrelated: Survival
    slope: float
    offset: float

    def scores(self, columns: Floats) -> Floats:
        """(N,) from (N, len(weights))."""
        scores: Floats = columns @ np.array(self.weights)
        return scores

    def assess(self, columns: Floats) -> Assessment:
        """Assess rows of evidence, with the chance levels where there are weights for them."""
        scores = self.scores(columns)
        some = columns[:, INLIERS] > 0
        odds = np.clip(self.slope * scores + self.offset, -50, 50)
        return Assessment(np.where(some, 1 / (1 + np.exp(-odds)), 0.0), np.where(some, self.unrelated(scores), 1.0))


@dataclass(frozen=True)
class Calibration:
    """How a model's evidence is weighed and what unrelated photos reach.

    chance: least, typical and largest chance level of a query, for inliers and for putatives, as `evidence` has them. A
    query's own levels are kept within them, so that a collection full of true matches does not raise its own bar
    without end. answers: for the candidates of a search; pairs: for pairs that were compared on their own.
    version: of the definition of evidence; a file of another version is refused.
    """

    chance: Chance
    answers: Scorer
    pairs: Scorer
    version: int = 2

    def assess(self, evidence: Floats) -> Assessment:
        """Assess all candidates of one search, (N, len(NAMES))."""
        return self.answers.assess(with_levels(evidence, self.chance))

    def assess_pairs(self, evidence: Floats) -> Assessment:
        """Assess pairs that were compared on their own, (N, len(NAMES))."""
        return self.pairs.assess(evidence)

    def refitted(self, searches: Sequence[Floats], pairs: Floats) -> Calibration:
        """With the same weights, for other unrelated photos: the evidence of all candidates of searches without a
        match, and of unrelated pairs.

        Raises ValueError for fewer than 100 searches or pairs.
        """
        chance = chance_levels(searches)
        best = best_scores(self.answers, searches, chance)
        return replace(
            self,
            chance=chance,
            answers=replace(self.answers, unrelated=Survival.fit(best)),
            pairs=replace(self.pairs, unrelated=Survival.fit(self.pairs.scores(pairs))),
        )

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Calibration:
        """Read what `write` wrote; raises ModelError."""
        try:
            values = json.loads(path.read_text())
            if values["version"] != Calibration.version:
                raise ValueError(f"version {values['version']}, not {Calibration.version}")
            (a, b, c), (d, e, f) = (_finite(levels) for levels in values["chance"])
            answers = _scorer(values["answers"], len(NAMES) + 2)
            pairs = _scorer(values["pairs"], len(NAMES))
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ModelError(f"{path} is not a calibration of this version ({error}).") from error
        return Calibration(((a, b, c), (d, e, f)), answers, pairs)


def chance_levels(searches: Sequence[Floats]) -> Chance:
    """The `chance` of searches without a match, each the evidence of its candidates, (N, len(NAMES))."""
    levels = [np.quantile(one[:, [INLIERS, PUTATIVES]], CHANCE, axis=0) for one in searches if len(one) >= CROWD]
    least, typical, largest = np.quantile(levels or [np.zeros(2)], [0.05, 0.5, 0.95], axis=0).round(3).tolist()
    return (least[0], typical[0], largest[0]), (least[1], typical[1], largest[1])


def with_levels(evidence: Floats, chance: Chance) -> Floats:
    """The evidence of all candidates of a search, with the query's chance levels as two more columns."""
    least, typical, largest = np.array(chance).T
    level = typical
    if len(evidence) >= CROWD:
        level = np.clip(np.quantile(evidence[:, [INLIERS, PUTATIVES]], CHANCE, axis=0), least, largest)
    return np.hstack([evidence, np.broadcast_to(level, (len(evidence), 2))])


def best_scores(scorer: Scorer, searches: Sequence[Floats], chance: Chance) -> Floats:
    """The best score of each search among its candidates with inliers; where there are none, that of no evidence."""
    nothing = float(scorer.scores(with_levels(np.zeros((1, len(NAMES))), chance))[0])
    best = []
    for evidence in searches:
        columns = with_levels(evidence, chance)
        best.append(scorer.scores(columns[columns[:, INLIERS] > 0]).max(initial=nothing))
    return np.array(best)


def fit_scorer(same: Floats, other: Floats, without: Sequence[Floats], right: Sequence[Floats]) -> Scorer:
    """Weights by logistic regression, both sides counting as much, with a small ridge.

    same, other: (N, C) columns of cases that show the same thing and of cases that do not. without: of each search
    without a match the columns of its candidates, (N_i, C); right: of each search with one, those of its right
    candidates: the best of each counts.
    Raises ValueError for fewer than 100 searches without a match or none with one.
    """
    if not len(same) or not len(other):
        raise ValueError("a calibration needs photos that match, and photos that do not")
    weights, _ = _logistic(np.vstack([same, other]), np.repeat([1.0, 0.0], [len(same), len(other)]))
    weights = weights.round(4)
    best, wrong = ([float((one @ weights).max()) for one in many if len(one)] for many in (right, without))
    (slope,), offset = _logistic(np.array(best + wrong)[:, None], np.repeat([1.0, 0.0], [len(best), len(wrong)]))
    return Scorer(tuple(weights.tolist()), Survival.fit(wrong), round(float(slope), 4), round(offset, 4))


def _logistic(columns: Floats, truth: Floats, steps: int = 100) -> tuple[Floats, float]:
    """Weights and offset; Newton's method on columns of unit variance."""
    mean, spread = columns.mean(axis=0), columns.std(axis=0) + 1e-9
    design = np.column_stack([(columns - mean) / spread, np.ones(len(columns))])
    share = np.where(truth > 0, 0.5 / truth.sum(), 0.5 / (1 - truth).sum())
    pull = np.full(design.shape[1], RIDGE)
    pull[-1] = 0.0
    found = np.zeros(design.shape[1])
    for _ in range(steps):
        odds = 1 / (1 + np.exp(-np.clip(design @ found, -50, 50)))
        slope = design.T @ (share * (odds - truth)) + pull * found
        curve = (design * (share * odds * (1 - odds))[:, None]).T @ design + np.diag(pull + 1e-12)
        step = np.linalg.solve(curve, slope)
        found -= step
        if np.abs(step).max() < 1e-10:
            break
    weights = found[:-1] / spread
    return weights, float(found[-1] - weights @ mean)


def _scorer(values: dict[str, object], columns: int) -> Scorer:
    weights, unrelated = values["weights"], values["unrelated"]
    if not isinstance(weights, list) or not isinstance(unrelated, dict) or len(weights) != columns:
        raise ValueError(f"{columns} weights are needed")
    quantiles = _finite(unrelated["quantiles"])
    tail, slope, offset = _finite([unrelated["tail"], values["slope"], values["offset"]])
    if len(quantiles) < 2 or any(low > high for low, high in itertools.pairwise(quantiles)) or tail <= 0 or slope < 0:
        raise ValueError("its quantiles rise, its tail is positive and its slope is not negative")
    return Scorer(_finite(weights), Survival(quantiles, tail), slope, offset)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    """Numbers as floats; raises ValueError for one that is not finite: comparisons with it would mean nothing."""
    numbers = tuple(map(float, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers
