"""Which transforms are worth refining: what single matches and pairs of matches propose, scored against all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.fitting import allowed
from delf_milvus.retrieval.frame import MAX_SCALE, ComplexArray, IntArray, Matched, square

SINGLES = 192
"""Matches, the most similar ones, each of which proposes an upright transform."""

PAIRED = 56
"""Matches, the most similar ones, of which every two propose a rotated transform."""

MIN_DISTANCE = 40.0
"""Distance (pixels of the frame, in both photos) of two matches below which a rotation through them is all noise."""

PAIR_SCALE = 1.6
"""Factor between the scale that two matches propose and the one their own scales do: a bit above half an octave, the
step of the pyramid. Where keypoints have no scales, any factor up to MAX_SCALE will do."""

REFINED = 8
"""Proposals that are refined."""

_PAIRS = np.stack(np.tril_indices(PAIRED, -1))  # the first n (n - 1) / 2 are all pairs of the first n


def propose(matched: Matched, residual: float) -> ComplexArray:
    """(N, REFINED, 3), rows (a, b = 0, t): the best similarities of each pair of photos, best first.

    Where there are fewer, the best one is repeated. residual: as of `verify`.
    """
    q, x, ratio, weight, counts, _ = matched
    singles = np.arange(min(q.shape[1], SINGLES))
    pair, single = np.nonzero(singles < counts[:, None])
    turned, i, turn = _rotations(matched)
    order = np.argsort(np.concatenate([pair, turned]), kind="stable")
    proposer = np.concatenate([single, i])[order]
    pair = np.concatenate([pair, turned])[order]
    a = np.concatenate([ratio[:, singles][singles < counts[:, None]].astype(np.complex128), turn])[order]
    t = x[pair, proposer] - a * q[pair, proposer]

    # |a q + t - x|^2 - residual^2 is linear in what depends on the match, so that one product gives the agreement of
    # every proposal with every match: 1 for a perfect one, 0 at the residual.
    qx, ones = q * x.conj(), np.ones(q.shape)
    of_match = np.stack([square(q), ones, square(x), q.real, q.imag, qx.real, qx.imag, x.real, x.imag], axis=1)
    ta, most = t.conj() * a, -allowed(a, np.zeros(len(a)), residual)
    of_proposal = [square(a), square(t) + most, np.ones(len(a)), 2 * ta.real, -2 * ta.imag]
    of_proposal += [-2 * a.real, 2 * a.imag, -2 * t.real, -2 * t.imag]
    left = np.empty((len(of_proposal), len(a)), np.float32)
    for column, values in zip(left, of_proposal, strict=True):
        np.divide(values, most, out=column, casting="same_kind")
    right, weight32 = of_match.astype(np.float32), weight.astype(np.float32)

    ends = np.cumsum(np.bincount(pair, minlength=len(q)))
    chosen = np.empty((len(q), REFINED), np.intp)
    for row, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        agreement = left[:, start:end].T @ right[row]
        np.maximum(agreement, 0, out=agreement)
        chosen[row] = start + _different(agreement, agreement @ weight32[row], proposer[start:end])
    return np.stack([a[chosen], np.zeros(chosen.shape), t[chosen]], axis=2)


def _different(
    agreement: npt.NDArray[np.float32], score: npt.NDArray[np.float32], proposer: IntArray
) -> npt.NDArray[np.intp]:
    """The best proposals, (REFINED,), each from a match that none before it explains; the best again for the rest."""
    chosen = np.full(REFINED, score.argmax())
    for place in range(REFINED):
        best = score.argmax()
        if score[best] < 0:
            break
        chosen[place] = best
        explained = agreement[best] > 0
        score[explained[proposer]] = -1
        score[best] = -1
    return chosen


def _rotations(matched: Matched) -> tuple[IntArray, IntArray, ComplexArray]:
    """Pair of photos, first match, and factor a (rotation and scale) of every two matches that may be right: (P,)."""
    q, x, ratio, _, counts, has_scales = matched
    i, j = _PAIRS[:, _PAIRS[0] < q.shape[1]]
    dq, dx = q[:, i] - q[:, j], x[:, i] - x[:, j]
    query_length, image_length = square(dq), square(dx)
    expected = ratio[:, i] * ratio[:, j] * query_length
    slack = np.where(has_scales, PAIR_SCALE, MAX_SCALE)[:, None] ** 2
    possible = np.minimum(query_length, image_length) >= MIN_DISTANCE**2
    possible &= (image_length <= expected * slack) & (image_length * slack >= expected)
    possible &= i < counts[:, None]
    pair, kept = np.nonzero(possible)
    return pair, i[kept], dx[possible] / dq[possible]
