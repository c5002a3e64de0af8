"""What detectors find on a GPU, prepared for it, is what they find on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrkit import DetrForObjectDetection
from detrkit.engines import fused_cuda, start
from tests.engines.test_torch_engine import BACKBONES
from tests.tiny import FAMILIES, padded_batch, shake, tiny_config

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Relative to the largest number: float32 without TF32, and the spacing of half precision times the depth.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def conv(dtype: torch.dtype, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(24, 40, kernel, stride=stride, padding=kernel // 2, groups=groups)
    return layer.to(dtype=dtype).requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("leading", [(2, 5), (3,), ()], ids=str)
def test_a_product_with_relu_is_the_linear_layer_and_its_relu(leading: tuple[int, ...]) -> None:
    layer, x = nn.Linear(6, 4), torch.randn(*leading, 6)
    with torch.inference_mode():
        torch.testing.assert_close(fused_cuda.CudaLinear(layer)(x), F.relu(layer(x)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_a_product_of_single_pixels_is_the_convolution(relu: bool, stride: int) -> None:
    layer = conv(torch.bfloat16, kernel=1, stride=stride)
    fused = fused_cuda.CudaConvolution(layer, relu)
    assert fused.is_product
    x = torch.randn(2, 24, 5, 7, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    expected = F.relu(layer(x)) if relu else layer(x)
    found = fused(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


class TestOnTheGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 4}, {"kernel": 1}], ids=str)
    @pytest.mark.parametrize("relu", [True, False])
    def test_a_convolution_and_what_follows_it(self, dtype, options, relu, without_tf32) -> None:
        layer = conv(dtype, **options).cuda()
        fused = fused_cuda.CudaConvolution(layer, relu, sums=True)
        x = torch.randn(2, 24, 13, 9, device="cuda", dtype=dtype)
        plain = layer.double()(x.double())
        total = torch.randn_like(plain).to(dtype)
        before = total.clone()
        layer.to(dtype)
        expected = F.relu(plain + total) if relu else plain + total
        torch.testing.assert_close(
            fused.add_to(total, x, owned=False).double(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
        )
        assert torch.equal(total, before)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_results_do_not_depend_on_what_memory_held_before(self, dtype: torch.dtype) -> None:
        fused = fused_cuda.CudaConvolution(conv(dtype).cuda(), relu=True)
        x = torch.randn(2, 24, 32, 32, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        for poison in (float("nan"), float("inf")):
            held = [torch.full((2, 40, 32, 32), poison, device="cuda", dtype=dtype) for _ in range(20)]
            del held  # the allocator hands this memory out again
            assert fused(x).isfinite().all()

    def test_what_is_not_a_number_stays_so(self) -> None:
        fused = fused_cuda.CudaConvolution(conv(torch.float32).cuda(), relu=True)
        x = torch.full((1, 24, 4, 4), float("nan"), device="cuda").to(memory_format=torch.channels_last)
        assert fused(x).isnan().all()

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", [(2, 7, 256), (5, 20), (1, 300, 288)], ids=str)
    def test_a_sum_and_its_norm(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x, update = (3 * torch.randn(*shape, device="cuda", dtype=dtype) + 1 for _ in range(2))
        norm = shake(nn.LayerNorm(shape[-1])).cuda()
        expected = norm.double()(x.double() + update.double())
        found = fused_cuda.add_and_norm(x, update, norm.to(dtype))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "not-padded"])
    @pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
    def test_every_family_gives_what_the_cpu_gives(self, family, padded, dtype, without_tf32) -> None:
        model = family.detector()
        pixels, mask = padded_batch()
        inputs = {"pixel_values": pixels} | ({"pixel_mask": mask} if padded else {})
        with torch.inference_mode():
            expected = model(**inputs)
            ours = start(model, "torch", torch.device("cuda"), dtype)
            inputs = {k: v.cuda().to(dtype) if v.is_floating_point() else v.cuda() for k, v in inputs.items()}
            for _ in range(6):  # the last ones are replayed
                found = ours(**inputs)
        limit = TOLERANCE[dtype]
        if family.proposes and dtype != torch.float32:
            # Proposals of near-equal scores change places; their scores do not.
            pairs = [(found.enc_outputs_class.float().cpu(), expected.enc_outputs_class)]
        else:
            pairs = [(found[name].float().cpu(), expected[name]) for name in ("logits", "pred_boxes")]
        for mine, right in pairs:
            torch.testing.assert_close(mine, right, rtol=0, atol=limit * float(right.abs().max()))

    @pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES)
    def test_every_backbone_gives_what_the_cpu_gives(self, options, without_tf32) -> None:
        model = shake(DetrForObjectDetection(tiny_config(**options))).eval()
        pixels, mask = padded_batch()
        with torch.inference_mode():
            expected = model(pixels, mask).logits
            ours = start(model, "torch", torch.device("cuda"), torch.float32)
            for _ in range(6):
                found = ours(pixels.cuda(), mask.cuda()).logits.cpu()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
