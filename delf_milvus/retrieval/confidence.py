"""How sure an answer is: its evidence compared with what photos without a match reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Verification


def evidence(matches: Sequence[Matches], verifications: Sequence[Verification]) -> npt.NDArray[np.float64]:
    return np.array([v.inliers for v in verifications], np.float64)


class Calibration:
    pass
