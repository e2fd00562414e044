"""OpenVINO computes what torch computes, in every precision, from any thread, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import agreement
from conftest import make_photo
from models import tiny_network, write_tiny_model

from delf_milvus.model.delf import Delf
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.openvino_network import OpenVinoNetwork
from delf_milvus.model.spec import ModelSpec, Selection, TrunkSpec
from delf_milvus.settings import ExtractSettings

pytest.importorskip("openvino", reason="needs OpenVINO (the extra of that name)")


def pixels_of(*seeds: int, width: int = 120, height: int = 96) -> torch.Tensor:
    return torch.from_numpy(np.stack([make_photo(seed, width, height) for seed in seeds]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.mark.parametrize("selection", ["attention", "norm"])
@pytest.mark.parametrize("layout", ["v1", "v1.5", "v2"])
@torch.inference_mode()
def test_maps_and_scores_are_those_of_the_plain_network(layout: str, selection: Selection) -> None:
    trunk = TrunkSpec(layout=layout, units=(2, 1, 1), widths=(8, 8, 16))  # type: ignore[arg-type]
    plain = tiny_network(spec=ModelSpec(trunk=trunk, dim=16, attention_channels=8))
    network = OpenVinoNetwork(plain, selection, torch.float32)
    # Sizes other than that of the conversion, among them odd ones, and more than one photo.
    for pixels in (pixels_of(0), pixels_of(1, 2, width=67, height=33), pixels_of(3, width=16, height=16)):
        expected = plain(pixels.permute(0, 3, 1, 2).float(), selection)
        for a, b in zip(network(pixels), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def with_faint_scores() -> Delf:
    network = tiny_network()
    assert network.attention is not None
    assert network.attention.conv2.bias is not None
    torch.nn.init.constant_(network.attention.conv2.bias, -15)
    return network


@torch.inference_mode()
def test_faint_scores_keep_their_order() -> None:
    plain = with_faint_scores()
    scores = OpenVinoNetwork(plain, "attention", torch.float32)(pixels_of(4))[1]
    expected = plain(pixels_of(4).permute(0, 3, 1, 2).float(), "attention")[1]
    assert expected.max() < 1e-4
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=0)


def test_converting_leaves_the_given_network_alone() -> None:
    plain = tiny_network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    OpenVinoNetwork(plain, "attention", torch.bfloat16)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_threads_are_what_was_asked_for(dtype: torch.dtype) -> None:
    import openvino

    precision = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}[dtype]
    if precision == openvino.Type.bf16 and "BF16" not in openvino.Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        pytest.skip("this processor has no bf16")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compiled = OpenVinoNetwork(tiny_network(), "norm", dtype)._compiled
    finally:
        torch.set_num_threads(threads)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == precision
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_threads_at_once_get_what_one_alone_gets(model: Path) -> None:
    extractor = Extractor(model, ExtractSettings(runtime="openvino", precision="fp32"))
    photos = [make_photo(seed, 200 + 8 * seed, 160) for seed in range(12)]
    alone = [extractor.extract(photo, 300) for photo in photos]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda photo: extractor.extract(photo, 300), photos * 3))
    for one, other in zip(alone * 3, together, strict=True):
        for field in ("locations", "scales", "attention", "descriptors"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


MEMORY = """
import ctypes
import sys
import numpy as np
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import ExtractSettings

def resident():
    # What the allocator only keeps for later, more of it on a busy machine, is no kernel.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4 / 1024

extractor = Extractor(sys.argv[1], ExtractSettings(runtime="openvino", precision="fp32", scales=(1.0,)))
for size in range(600):
    extractor.extract(np.zeros((40 + size // 20, 40 + 3 * (size % 20), 3), np.uint8), 10)
    if size == 299:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_photos_of_ever_new_sizes_do_not_fill_memory(model: Path) -> None:
    # The command line lets torch keep kernels of more sizes, and sets that for the whole process of the tests too.
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model)], env=environment, capture_output=True, text=True, check=True
    )
    # 10 MB here; 100 where every kernel is kept.
    assert float(child.stdout) < 30


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_features_of_photos_are_of_the_family_of_torch_in_fp32(shared: Path, precision: str) -> None:
    from delf_milvus.imaging.decode import decode
    from delf_milvus.settings import DecodeSettings

    photo = decode(sorted((shared / "data/landmarks").rglob("*.jpg"))[7], DecodeSettings())
    reference = Extractor(None, ExtractSettings(precision="fp32")).extract(photo, 1000)
    settings = ExtractSettings(runtime="openvino", precision=precision)  # type: ignore[arg-type]
    features = Extractor(None, settings).extract(photo, 1000)
    common, cosine = agreement(features, reference)
    assert common >= (0.998 if precision == "fp32" else 0.95)
    assert cosine >= (0.99999 if precision == "fp32" else 0.999)
    assert features.global_descriptor @ reference.global_descriptor >= 0.999
