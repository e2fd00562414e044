"""The learnt reduction: what it reconstructs, and that distances of codes mean something."""

from __future__ import annotations

import torch
from torch import Tensor

from delf_milvus.training.autoencoder import fit


def descriptors(count: int = 3000, channels: int = 32, rank: int = 6) -> Tensor:
    """Unit vectors without negative entries, in a space of few dimensions but for noise."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.rand(count, rank, generator=generator)
    mixed = codes @ torch.rand(rank, channels, generator=generator) + 0.5
    mixed += 0.002 * torch.rand(count, channels, generator=generator)
    return torch.nn.functional.normalize(mixed, dim=1)


def test_what_has_few_dimensions_is_reconstructed() -> None:
    said: list[str] = []
    found = fit(descriptors(), 6, epochs=15, say=said.append)
    assert found.projection.shape == (6, 32)
    assert found.explained > 0.9
    assert len(said) == 15


def test_distances_of_codes_are_those_of_the_descriptors_that_they_stand_for() -> None:
    data = descriptors()
    found = fit(data, 6, epochs=15, say=lambda _: None)
    codes = (data - found.mean) @ found.projection.T
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:200]
    ratio = torch.pdist(codes[some]) / torch.pdist(data[some])
    assert 0.8 < ratio.median() < 1.2
    assert ratio.quantile(0.95) / ratio.quantile(0.05) < 1.5


def test_the_same_descriptors_give_the_same_fit() -> None:
    data = descriptors(600)
    first, second = (fit(data, 4, epochs=2, seed=1, say=lambda _: None) for _ in range(2))
    assert torch.equal(first.projection, second.projection)
    assert not torch.equal(first.projection, fit(data, 4, epochs=2, seed=2, say=lambda _: None).projection)


def test_each_epoch_is_logged_with_a_falling_loss() -> None:
    logged: list[dict[str, float]] = []
    fit(descriptors(), 6, epochs=8, say=lambda _: None, log=lambda **values: logged.append(values))
    assert [line["epoch"] for line in logged] == list(range(1, 9))
    assert logged[-1]["loss"] < logged[0]["loss"]
