"""How sure an answer is: its evidence compared with what photos without a match reach.

The confidence of an answer is the share of queries without a match in a collection whose best candidate has less
evidence; that of a pair, the share of unrelated pairs. It is not the probability that the answer is right, which
would need to know how many queries have a match at all; it is what a false-alarm rate can be read off:
answering only at a confidence of at least 0.99 gives one false alarm in a hundred queries without a match.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import ModelError
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Verification

Floats = npt.NDArray[np.float64]

TAIL = 0.1
"""Share of the calibration sample, the largest evidence, that an exponential tail is fitted to."""

LEVELS = 101
"""Quantiles that are kept of the rest."""


def evidence(matches: Sequence[Matches], verifications: Sequence[Verification]) -> Floats:
    """The evidence of each verified pair, (N,): larger is better, 0 without inliers."""
    return np.array([v.inliers for v in verifications], np.float64)


@dataclass(frozen=True)
class Survival:
    """How often evidence of at least some value occurs where there is no match.

    quantiles: evidence at evenly spaced shares from 0 to 1 - TAIL of the sample. tail: mean excess over the last
    quantile, the scale of the exponential that continues them.
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
        excess = values[values > quantiles[-1]] - quantiles[-1]
        return Survival(tuple(quantiles.round(4).tolist()), round(float(excess.mean()), 4) if len(excess) else 1e-6)

    def __call__(self, values: npt.ArrayLike) -> Floats:
        """Share of unrelated cases with at least this evidence, (N,), in (0, 1]; falls with the evidence."""
        array = np.asarray(values, np.float64)
        shares = np.linspace(1, TAIL, len(self.quantiles))
        body = np.interp(array, self.quantiles, shares)
        beyond = np.maximum(array - self.quantiles[-1], 0)
        return np.where(beyond > 0, TAIL * np.exp(-beyond / self.tail), body)


@dataclass(frozen=True)
class Calibration:
    """The evidence that unrelated photos reach: the best of a search's candidates, and a single pair.

    version: of the definition of evidence; a file of another version is refused.
    """

    answers: Survival
    pairs: Survival
    version: int = 1

    def confidence(self, values: npt.ArrayLike) -> Floats:
        """Confidence of candidates of a search, (N,), by their evidence."""
        return 1 - self.answers(values)

    def pair_confidence(self, values: npt.ArrayLike) -> Floats:
        """Confidence of pairs that were compared on their own, (N,)."""
        return 1 - self.pairs(values)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Calibration:
        """Read what `write` wrote; raises ModelError."""
        try:
            values = json.loads(path.read_text())
            answers, pairs = (
                Survival(tuple(values[name]["quantiles"]), float(values[name]["tail"])) for name in ("answers", "pairs")
            )
            if values["version"] != Calibration.version:
                raise ValueError(f"version {values['version']}, not {Calibration.version}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path} is not a calibration of this version ({error}).") from error
        return Calibration(answers, pairs)
