"""How sure an answer is: its evidence compared with what photos without a match reach.

The evidence of a candidate is the logarithm of its inliers against the chance level of its query: what a good quarter
of the other candidates, nearly all of them unrelated, reach by accident. Some photos (textures, repeated windows)
gather chance inliers everywhere, and must show more.

The confidence of an answer is the share of queries without a match whose best candidate has less evidence; that of a
pair, the share of unrelated pairs. It is not the probability that the answer is right, which would need to know how
many queries have a match at all; it is what a false-alarm rate can be read off: answering only at a confidence of at
least 0.99 gives one false alarm in a hundred queries without a match.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import ModelError

Floats = npt.NDArray[np.float64]

TAIL = 0.1
"""Share of the calibration sample, the largest evidence, that an exponential tail stands for."""

FAR_TAIL = 0.02
"""Share that fixes the tail's slope. What lies beyond may be pairs that do show the same thing, in data that is meant
to be unrelated; it does not count."""

LEVELS = 101
"""Quantiles that are kept of the rest."""

CROWD = 20
"""Candidates below which the chance level of a query cannot be told from its own candidates."""

CHANCE = 0.75
"""Quantile of the candidates' inliers that is the chance level."""


@dataclass(frozen=True)
class Survival:
    """How often evidence of at least some value occurs where there is no match.

    quantiles: evidence at evenly spaced shares from 0 to 1 - TAIL of the sample. tail: scale of the exponential that
    continues them.
    """

    quantiles: tuple[float, ...]
    tail: float

    @staticmethod
    def fit(sample: npt.ArrayLike) -> Survival:
        """Fit to the evidence of unrelated cases, (N,); raises ValueError for fewer than 100."""
        values = np.sort(np.asarray(sample, np.float64))
        if len(values) < 100 or not np.isfinite(values).all():
            raise ValueError(f"a calibration needs at least 100 finite values, not {len(values)}")
        quantiles = np.quantile(values, np.linspace(0, 1 - TAIL, LEVELS))
        tail = (np.quantile(values, 1 - FAR_TAIL) - quantiles[-1]) / np.log(TAIL / FAR_TAIL)
        return Survival(tuple(quantiles.round(4).tolist()), max(round(float(tail), 4), 1e-3))

    def __call__(self, values: npt.ArrayLike) -> Floats:
        """Share of unrelated cases with at least this evidence, (N,), in (0, 1]; falls with the evidence."""
        array = np.asarray(values, np.float64)
        shares = np.linspace(1, TAIL, len(self.quantiles))
        body = np.interp(array, self.quantiles, shares)
        beyond = np.maximum(array - self.quantiles[-1], 0)
        return np.where(beyond > 0, TAIL * np.exp(-beyond / self.tail), body)


@dataclass(frozen=True)
class Calibration:
    """What unrelated photos reach: the best of a search's candidates, and a single pair.

    chance: least, typical and largest chance level of a query, inliers. A query's own level is kept within them, so
    that a collection full of true matches does not raise its own bar without end.
    version: of the definition of evidence; a file of another version is refused.
    """

    chance: tuple[float, float, float]
    answers: Survival
    pairs: Survival
    version: int = 1

    @staticmethod
    def fit(searches: Sequence[npt.ArrayLike], pairs: npt.ArrayLike) -> Calibration:
        """Fit to the inliers of all candidates of each search without a match, and of unrelated pairs.

        Raises ValueError for fewer than 100 searches or pairs.
        """
        crowds = [np.asarray(inliers, np.float64) for inliers in searches]
        levels = [np.quantile(inliers, CHANCE) for inliers in crowds if len(inliers) >= CROWD]
        least, typical, largest = np.quantile(levels, [0.05, 0.5, 0.95]).round(2).tolist() if levels else (0, 0, 0)
        chance = (float(least), float(typical), float(largest))
        nothing = float(_evidence(0, typical))
        best = [_evidence(inliers, _level(inliers, chance)).max(initial=nothing) for inliers in crowds]
        return Calibration(chance, Survival.fit(best), Survival.fit(_evidence(pairs, typical)))

    def confidence(self, inliers: npt.ArrayLike) -> Floats:
        """Confidence of all candidates of one search, (N,), by their inliers."""
        counts = np.asarray(inliers, np.float64)
        return np.where(counts > 0, 1 - self.answers(_evidence(counts, _level(counts, self.chance))), 0.0)

    def pair_confidence(self, inliers: npt.ArrayLike) -> Floats:
        """Confidence of pairs that were compared on their own, (N,)."""
        counts = np.asarray(inliers, np.float64)
        return np.where(counts > 0, 1 - self.pairs(_evidence(counts, self.chance[1])), 0.0)

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
            least, typical, largest = map(float, values["chance"])
            answers, pairs = (
                Survival(tuple(map(float, values[name]["quantiles"])), float(values[name]["tail"]))
                for name in ("answers", "pairs")
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path} is not a calibration of this version ({error}).") from error
        return Calibration((least, typical, largest), answers, pairs)


def _level(inliers: Floats, chance: tuple[float, float, float]) -> float:
    """Inliers that the query's candidates reach by chance."""
    least, typical, largest = chance
    if len(inliers) < CROWD:
        return typical
    return float(np.clip(np.quantile(inliers, CHANCE), least, largest))


def _evidence(inliers: npt.ArrayLike, level: float) -> Floats:
    """Logarithm of the inliers against a level; the constants keep small counts from swinging it."""
    return np.log((np.asarray(inliers, np.float64) + 1) / (level + 2))
