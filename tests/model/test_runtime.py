"""The prepared network computes what the plain one computes."""

from __future__ import annotations

import pytest
import torch
from models import TINY, tiny_network

from delf_milvus.model.delf import Delf
from delf_milvus.model.runtime import computes_bf16_fast, prepare, resolve_dtype
from delf_milvus.model.spec import ModelSpec, TrunkSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", ["v1", "v1.5", "v2"])
@torch.inference_mode()
def test_folding_changes_nothing_but_rounding(layout: str) -> None:
    trunk = TrunkSpec(layout=layout, units=(2, 1, 1), widths=(8, 8, 16))  # type: ignore[arg-type]
    plain = tiny_network(spec=ModelSpec(trunk=trunk, dim=16, attention_channels=8))
    fast = prepare(plain, CPU, torch.float32)
    pixels = torch.rand(2, 3, 96, 64) * 255
    for a, b in zip(plain(pixels), fast(pixels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_preparing_leaves_the_given_network_alone() -> None:
    plain = tiny_network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    prepare(plain, CPU, torch.bfloat16)
    after = plain.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@torch.inference_mode()
def test_bf16_keeps_the_directions_of_descriptors() -> None:
    plain = tiny_network()
    pixels = torch.rand(1, 3, 128, 128) * 255
    cells = [network(pixels)[0].float() for network in (plain, prepare(plain, CPU, torch.bfloat16))]
    cosine = torch.nn.functional.cosine_similarity(*cells, dim=1)
    assert cosine.mean() > 0.999


def test_scores_are_fp32_so_that_their_order_is_not_chance() -> None:
    network: Delf = prepare(tiny_network(), CPU, torch.bfloat16)
    with torch.inference_mode():
        for selection in ("attention", "norm"):
            assert network(torch.rand(1, 3, 64, 64) * 255, selection)[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("processor", "fast"),
    [
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 avx512_fp16", False),
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("", False),
    ],
)
def test_bf16_is_taken_where_its_instructions_are_the_faster_ones(processor: str, fast: bool) -> None:
    assert computes_bf16_fast(processor) == fast


def test_precision_fp32_is_never_overruled() -> None:
    assert resolve_dtype("fp32", CPU) == torch.float32
    assert resolve_dtype("bf16", CPU) == torch.bfloat16
    assert TINY.selection == "attention"
