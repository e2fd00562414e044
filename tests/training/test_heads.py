"""What classifies while the trunk is fine-tuned: the margin of ArcFace, and its whitening as a weight file has it."""

from __future__ import annotations

import math

import pytest
import torch

from delf_milvus.model.delf import Reduction, pooled
from delf_milvus.training.heads import ArcFaceHead


@pytest.fixture
def head() -> ArcFaceHead:
    torch.manual_seed(0)
    head = ArcFaceHead(channels=24, classes=5, dim=8, margin=0.3, scale=20.0)
    torch.nn.init.normal_(head.whiten.bias, std=0.2)
    return head


def test_the_margin_is_added_to_the_angle(head: ArcFaceHead) -> None:
    angles = torch.linspace(0.02, math.pi - 0.3 - 0.01, 200)
    torch.testing.assert_close(head.penalised(angles.cos()), (angles + 0.3).cos(), atol=1e-4, rtol=0)


def test_the_penalised_cosine_falls_with_the_angle_up_to_the_widest(head: ArcFaceHead) -> None:
    angles = torch.linspace(0.02, math.pi - 0.02, 500)
    penalised = head.penalised(angles.cos())
    assert (penalised.diff() < 0).all()
    assert (penalised < angles.cos()).all()


def test_only_the_photo_s_own_class_has_the_margin(head: ArcFaceHead) -> None:
    features = torch.rand(6, 24, 3, 4)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    logits, penalised = head(features, labels)
    own = torch.nn.functional.one_hot(labels, 5).bool()
    assert torch.equal(logits[~own], penalised[~own])
    assert (penalised[own] < logits[own]).all()
    cosines = (logits / head.scale).clamp(-1, 1)
    assert (cosines.abs() <= 1).all()
    # Without labels, as in validation, there is nothing to make harder.
    assert torch.equal(head(features)[1], logits)


def test_the_whitening_is_a_reduction_of_what_extraction_pools(head: ArcFaceHead) -> None:
    features = torch.rand(3, 24, 5, 4)
    reduction = Reduction(24, 8)
    mean, projection = head.reduction()
    reduction.load_state_dict({"mean": mean, "projection": projection})
    trained = head.descriptors(features)
    for number in range(3):
        cells = features[number].permute(1, 2, 0).reshape(-1, 24)
        torch.testing.assert_close(reduction(pooled([cells])[None])[0], trained[number], atol=1e-5, rtol=0)


def test_a_step_down_the_loss_brings_a_class_together(head: ArcFaceHead) -> None:
    features, labels = torch.rand(8, 24, 3, 3), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.SGD(head.parameters(), 0.05)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(features, labels)[1], labels)

    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before


def test_the_head_begins_with_whitened_descriptors_and_the_means_of_its_classes() -> None:
    torch.manual_seed(1)
    head = ArcFaceHead(channels=16, classes=4, dim=6)
    before = head.classes.detach().clone()
    vectors = torch.nn.functional.normalize(torch.rand(300, 16) + 2, dim=1)
    labels = torch.randint(0, 3, (300,))
    head.begin(vectors, labels)
    codes = head.whiten(vectors)
    torch.testing.assert_close(codes.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    covariance = torch.cov(codes.T)
    torch.testing.assert_close(covariance / covariance[0, 0], torch.eye(6), atol=1e-2, rtol=0)
    descriptors = torch.nn.functional.normalize(codes, dim=1)
    for number in range(3):
        mean = torch.nn.functional.normalize(descriptors[labels == number].mean(0), dim=0)
        torch.testing.assert_close(head.classes[number], mean, atol=1e-5, rtol=0)
    assert torch.equal(head.classes[3], before[3]), "a class that was not seen stays random"


def test_the_head_begins_with_fewer_photos_than_it_has_components() -> None:
    head = ArcFaceHead(channels=16, classes=2, dim=6)
    head.begin(torch.nn.functional.normalize(torch.rand(3, 16), dim=1), torch.tensor([0, 1, 1]))
    assert all(bool(torch.isfinite(p).all()) for p in head.parameters())
