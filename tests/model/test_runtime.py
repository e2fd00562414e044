"""The prepared network computes what the plain one computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from agreement import agreement
from models import TINY, tiny_network, write_tiny_model

from delf_milvus.errors import UsageError
from delf_milvus.imaging.decode import decode
from delf_milvus.model.delf import Delf
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.runtime import computes_bf16_fast, prepare, resolve_device, resolve_dtype
from delf_milvus.model.spec import ModelSpec, TrunkSpec, fingerprint_of
from delf_milvus.settings import DecodeSettings, ExtractSettings

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
def test_a_batchnorm_of_any_sign_is_folded_into_the_convolution_behind_it() -> None:
    plain = tiny_network()
    for name, module in plain.trunk.named_modules():
        if name.startswith("stages") and name.endswith("bn1"):
            module.weight.copy_(torch.linspace(-1, 1, len(module.weight)))
            module.weight[::7] = 0
            module.weight[3] = 1e-42  # its bound is no number of fp32
            module.bias.copy_(torch.linspace(0.5, -0.5, len(module.bias)))
    fast = prepare(plain, CPU, torch.float32)
    pixels = torch.rand(1, 3, 96, 64) * 255
    for a, b in zip(plain(pixels), fast(pixels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_batch_gives_what_its_photos_give_alone() -> None:
    fast = prepare(tiny_network(), CPU, torch.float32)
    pixels = torch.randint(0, 256, (3, 64, 80, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    together = fast(pixels)
    for index in range(3):
        for a, b in zip(fast(pixels[index : index + 1]), together, strict=True):
            torch.testing.assert_close(a[0], b[index], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_preparing_leaves_the_given_network_alone() -> None:
    plain = tiny_network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    prepare(plain, CPU, torch.bfloat16)
    after = plain.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_keeps_the_directions_of_descriptors(dtype: torch.dtype) -> None:
    plain = tiny_network()
    pixels = torch.rand(1, 3, 128, 128) * 255
    cells = [network(pixels)[0].float() for network in (plain, prepare(plain, CPU, dtype))]
    cosine = torch.nn.functional.cosine_similarity(*cells, dim=1)
    assert cosine.mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32_so_that_their_order_is_not_chance(dtype: torch.dtype) -> None:
    network: Delf = prepare(tiny_network(), CPU, dtype)
    with torch.inference_mode():
        for selection in ("attention", "norm"):
            scores = network(torch.rand(1, 3, 256, 256) * 255, selection)[1]
            assert scores.dtype == torch.float32
            assert len(scores.unique()) > 0.95 * scores.numel()


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
    assert resolve_dtype("fp16", CPU) == torch.float16
    assert TINY.selection == "attention"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_the_features_of_fp32_in_a_photo(shared: Path, precision: str) -> None:
    photo = decode(sorted((shared / "data/landmarks").rglob("*.jpg"))[7], DecodeSettings())
    reference, half = (
        Extractor(None, ExtractSettings(precision=p)).extract(photo, 1000)  # type: ignore[arg-type]
        for p in ("fp32", precision)
    )
    common, cosine = agreement(half, reference)
    assert common >= 0.95
    assert cosine >= 0.999
    assert half.global_descriptor @ reference.global_descriptor >= 0.999


def test_library_device_and_precision_are_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    plain = fingerprint_of(model, ExtractSettings())
    for settings in (
        ExtractSettings(runtime="openvino"),
        ExtractSettings(device="cuda"),
        ExtractSettings(precision="bf16"),
        ExtractSettings(precision="fp16"),
    ):
        assert fingerprint_of(model, settings) == plain


def test_without_openvino_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    with pytest.raises(UsageError, match=r"pip install 'delf-milvus\[openvino\]'"):
        Extractor(model, ExtractSettings(runtime="openvino"))


def test_the_device_cpu_is_never_overruled_and_a_missing_gpu_is_said() -> None:
    assert resolve_device("cpu") == CPU
    if torch.cuda.is_available():
        assert resolve_device("cuda").type == resolve_device("auto").type == "cuda"
    else:
        assert resolve_device("auto") == CPU
        with pytest.raises(UsageError, match="no GPU"):
            resolve_device("cuda")
