"""Every test that takes ``implementation`` runs for the CPU's forms here, and once more under Triton's
interpreter in a process of its own, in which the kernel is one of the implementations.
"""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrkit.kernels import deformable_attention_gather as gather
from detrkit.models.layers import deformable_attention as module
from detrkit.models.layers.deformable_attention import deformable_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
# One level larger than it is high and one higher than large, both odd; one pixel, one row, one column.
SHAPES = [(5, 7), (4, 3), (1, 1), (1, 4), (2, 1)]

implementations = pytest.mark.parametrize(
    "implementation", ["triton"] if INTERPRETED else ["gather", "grid_sample"]
)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def make(
    shapes=SHAPES, batch=2, queries=3, heads=2, head_dim=5, points=2, dtype=torch.float64, low=-0.4, seed=0
):
    """Value, locations (some of them outside, or half outside) and weights; all want gradients."""
    generator = torch.Generator().manual_seed(seed)
    layout = (batch, queries, heads, len(shapes), points)
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch, pixels, heads, head_dim, generator=generator, dtype=torch.float64)
    locations = torch.rand(*layout, 2, generator=generator, dtype=torch.float64) * (1 - 2 * low) + low
    weights = torch.randn(*layout, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (value, locations, weights)]


def by_hand(value, shapes, locations, weights):
    """The definition, pixel by pixel: every pixel counts as far as it is less than one pixel away."""
    batch, queries, heads, _, points, _ = locations.shape
    result = value.new_zeros(batch, queries, heads, value.shape[-1])
    for image, query, head in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads))).tolist():
        start = 0
        for level, (height, width) in enumerate(shapes):
            for point in range(points):
                x, y = locations[image, query, head, level, point].tolist()
                for row in range(height):
                    for column in range(width):
                        share = max(0, 1 - abs(x * width - 0.5 - column)) * max(
                            0, 1 - abs(y * height - 0.5 - row)
                        )
                        result[image, query, head] += (
                            weights[image, query, head, level, point]
                            * share
                            * value[image, start + row * width + column, head]
                        )
            start += height * width
    return result.flatten(2)


def run(inputs, shapes, implementation, grad=None):
    """Result and gradients of all inputs."""
    result = deformable_attention(inputs[0], shapes, *inputs[1:], implementation)
    grad = torch.linspace(-1, 2, result.numel(), dtype=torch.float64) if grad is None else grad
    grad = grad.to(result).view_as(result)
    return [result.detach(), *torch.autograd.grad(result, inputs, grad, allow_unused=True)]


def assert_all_close(got, expected, **tolerance):
    for name, mine, theirs in zip(("result", "value", "locations", "weights"), got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@implementations
def test_result_is_the_definition(implementation):
    inputs = [x.detach() for x in make(batch=1, points=1)]
    result = deformable_attention(inputs[0], SHAPES, *inputs[1:], implementation)
    torch.testing.assert_close(result, by_hand(inputs[0], SHAPES, *inputs[1:]))


@implementations
def test_a_pixels_centre_gives_the_pixel(implementation):
    value = torch.arange(12.0).view(1, 12, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    centres = torch.stack(((columns + 0.5) / 4, (rows + 0.5) / 3), -1).view(1, 12, 1, 1, 1, 2)
    result = deformable_attention(value, [(3, 4)], centres, torch.ones(1, 12, 1, 1, 1), implementation)
    torch.testing.assert_close(result.flatten(), torch.arange(12.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["triton"] if INTERPRETED else ["gather"])
def test_gradients_are_those_of_grid_sample(implementation):
    inputs = make(queries=5)
    assert_all_close(run(inputs, SHAPES, implementation), run(inputs, SHAPES, "grid_sample"))


@pytest.mark.parametrize("implementation", ["triton"] if INTERPRETED else ["gather"])
def test_gradients_at_pixel_centres_are_those_of_grid_sample(implementation):
    """Where the slope jumps, and where a fresh model samples: the slope is the one to the right."""
    inputs = make([(4, 8)], batch=1, queries=12)
    size = torch.tensor([8, 4])
    with torch.no_grad():  # powers of two, so that no coordinate is rounded to beside the centre
        inputs[1].copy_(((inputs[1] * size).floor().clamp(min=0) + 0.5).minimum(size - 0.5) / size)
    assert_all_close(run(inputs, [(4, 8)], implementation), run(inputs, [(4, 8)], "grid_sample"))


@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("shapes", [SHAPES, [(1, 1)], [(2, 3)]], ids=str)
def test_gradients_are_those_of_finite_differences(shapes):
    inputs = make(shapes, queries=2, head_dim=3)
    assert torch.autograd.gradcheck(
        lambda value, *where: deformable_attention(value, shapes, *where, "gather"), inputs
    )


@pytest.mark.skipif(INTERPRETED, reason="the same property, too slow in the interpreter")
@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    batch=st.integers(1, 3),
    queries=st.integers(1, 20),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    points=st.integers(1, 5),
    at_a_time=st.integers(1, 200),
    seed=st.integers(0, 2**16),
)
def test_gathering_equals_grid_sample(shapes, batch, queries, heads, head_dim, points, at_a_time, seed):
    if not any(height * width for height, width in shapes):
        shapes = [*shapes, (2, 2)]
    inputs = make(shapes, batch, queries, heads, head_dim, points, seed=seed)
    expected = run(inputs, shapes, "grid_sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "SAMPLES_FORWARD", at_a_time)
        patch.setattr(gather, "SAMPLES_BACKWARD", at_a_time)
        assert_all_close(run(inputs, shapes, "gather"), expected)


@implementations
def test_samples_off_the_map_or_without_place_count_as_zero(implementation):
    places = [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.5, -1.5]
    inputs = make(batch=1, queries=2 * len(places), heads=1)
    without = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for query, place in enumerate(places * 2):  # along x, then along y
            inputs[1][:, query, :, :, 1, query // len(places)] = place
        without[2][:, :, :, :, 1] = 0
    got, expected = run(inputs, SHAPES, implementation), run(without, SHAPES, implementation)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    for gradient, same in zip(got[2:], expected[2:]):
        assert not gradient[:, :, :, :, 1].any()
        torch.testing.assert_close(gradient[:, :, :, :, 0], same[:, :, :, :, 0])


@implementations
def test_a_level_without_pixels_contributes_nothing(implementation):
    inputs = make([(0, 3), (3, 2), (4, 0)], batch=1)
    got = run(inputs, [(0, 3), (3, 2), (4, 0)], implementation)
    middle = [
        x.detach().clone().requires_grad_()
        for x in (inputs[0], inputs[1][:, :, :, 1:2], inputs[2][:, :, :, 1:2])
    ]
    expected = run(middle, [(3, 2)], implementation)
    assert_all_close([*got[:2], got[2][:, :, :, 1:2], got[3][:, :, :, 1:2]], expected)
    assert not got[2][:, :, :, ::2].any()


@pytest.mark.parametrize("implementation", ["gather", "grid_sample"])
def test_no_level_has_pixels(implementation):
    inputs = make([(0, 3), (2, 0)])
    result = deformable_attention(inputs[0], [(0, 3), (2, 0)], *inputs[1:], implementation)
    assert result.shape == (2, 3, 10)
    assert not result.any()


@pytest.mark.parametrize("implementation", ["gather", "grid_sample"])
@pytest.mark.parametrize("none_of", ["batch", "queries"])
def test_nothing_to_do(implementation, none_of):
    inputs = make(**{none_of: 0})
    result, *gradients = run(inputs, SHAPES, implementation)
    assert result.numel() == 0
    assert not gradients[0].any()


@implementations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_only_at_the_end(implementation, dtype):
    half = make(dtype=dtype, batch=1, queries=2, heads=1)
    single = [x.detach().float().requires_grad_() for x in half]
    got, expected = run(half, SHAPES, implementation), run(single, SHAPES, "grid_sample")
    assert [x.dtype for x in got] == [dtype] * 4
    eps = torch.finfo(dtype).eps
    # The incoming gradient is rounded too, so the gradients are off by an eps of each of their terms.
    torch.testing.assert_close(got[0].float(), expected[0], rtol=eps, atol=1e-4)
    for mine, theirs in zip(got[1:], expected[1:]):
        torch.testing.assert_close(
            mine.float(), theirs, rtol=4 * eps, atol=4 * eps * theirs.abs().max().item()
        )


@implementations
def test_half_precision_values_with_exact_locations(implementation):
    """As under autocast: a half precision value, float32 locations and weights, each with its gradient."""
    value, locations, weights = make(dtype=torch.float32, batch=1, queries=2, heads=1)
    inputs = [value.detach().bfloat16().requires_grad_(), locations, weights]
    got = run(inputs, SHAPES, implementation)
    assert [x.dtype for x in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    exact = [inputs[0].detach().float(), locations.detach(), weights.detach()]
    result = deformable_attention(exact[0], SHAPES, *exact[1:], "grid_sample")
    torch.testing.assert_close(got[0].float(), result, rtol=2**-7, atol=1e-5)


@implementations
def test_inputs_may_be_views(implementation):
    inputs = make(queries=2)
    order = [(1, 3, 2, 0), (4, 0, 5, 3, 1, 2), (3, 0, 4, 1, 2)]
    views = [
        x.detach().permute(axes).contiguous().permute([axes.index(i) for i in range(x.ndim)]).requires_grad_()
        for x, axes in zip(inputs, order)
    ]
    assert not any(x.is_contiguous() for x in views)
    assert_all_close(run(views, SHAPES, implementation), run(inputs, SHAPES, "grid_sample"))


@implementations
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_gradients_that_are_wanted_come_back(implementation, wanted):
    inputs = make(batch=1, queries=2, heads=1)
    expected = run(inputs, SHAPES, "grid_sample")[1 + wanted]
    some = [x.detach().requires_grad_(position == wanted) for position, x in enumerate(inputs)]
    result = deformable_attention(some[0], SHAPES, *some[1:], implementation)
    result.backward(torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result))
    assert [x.grad is not None for x in some] == [position == wanted for position in range(3)]
    torch.testing.assert_close(some[wanted].grad, expected)


@implementations
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": [(5, 7), (3, 3)]}, r"2 levels.*\(2, 3, 2, 5, 2, 2\) has 5"),
        ({"shapes": [(5, 7), (4, 3), (1, 1), (1, 4), (2, 2)]}, r"needs 56 pixels.*\(2, 54, 2, 5\) has 54"),
        ({"shapes": [(5, 7), (4, 3), (1, 1), (-1, -4), (2, 1)]}, r"\(-1, -4\)"),
        ({"value": torch.zeros(2, 54, 10)}, r"\(batch, pixels, heads, head_dim\), not \(2, 54, 10\)"),
        ({"value": torch.zeros(2, 54, 5, 2)}, r"5 heads.*has 2 and 2"),
        ({"locations": torch.zeros(2, 3, 2, 5, 2, 3)}, r"2\), not \(2, 3, 2, 5, 2, 3\)"),
        ({"weights": torch.zeros(2, 3, 2, 10)}, r"\(2, 3, 2, 5, 2\).*not \(2, 3, 2, 10\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(implementation, change, message):
    value, locations, weights = make()
    call = {"value": value, "shapes": SHAPES, "locations": locations, "weights": weights, **change}
    with pytest.raises(ValueError, match=message):
        deformable_attention(*call.values(), implementation)


def test_an_unknown_implementation_is_named():
    inputs = make()
    with pytest.raises(ValueError, match="'cudnn'"):
        deformable_attention(inputs[0], SHAPES, *inputs[1:], "cudnn")


def test_work_is_bounded_whatever_the_number_of_queries(monkeypatch):
    samples = []
    embedding_bag = torch.nn.functional.embedding_bag

    def counted(indices, *args, **options):
        samples.append(indices.numel())
        return embedding_bag(indices, *args, **options)

    monkeypatch.setattr(gather, "SAMPLES_FORWARD", 400)
    monkeypatch.setattr(gather, "SAMPLES_BACKWARD", 300)
    monkeypatch.setattr(gather.F, "embedding_bag", counted)
    inputs = make(queries=200)
    result = deformable_attention(inputs[0], SHAPES, *inputs[1:], "gather")
    assert max(samples) <= 4 * 400
    assert sum(samples) == 4 * inputs[2].numel()
    samples.clear()
    result.sum().backward()
    assert max(samples) <= 300
    assert sum(samples) == 4 * inputs[2].numel()


def test_device_decides():
    assert module._implementation_for(torch.device("cpu")) == "gather"
    assert module._implementation_for(torch.device("mps")) == "grid_sample"


@pytest.mark.parametrize(("installed", "expected"), [(True, "triton"), (False, "grid_sample")])
def test_cuda_without_triton_falls_back(monkeypatch, installed, expected):
    monkeypatch.setattr(module, "_has_triton", lambda: installed)
    assert module._implementation_for(torch.device("cuda")) == expected


def test_a_second_derivative_is_refused():
    inputs = make(queries=1)
    result = deformable_attention(inputs[0], SHAPES, *inputs[1:], "gather")
    (gradient,) = torch.autograd.grad(result.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="deformable_attention_backward"):
        gradient.sum().backward()


class Sampler(torch.nn.Module):
    """Two feature maps in, so that the pixels of the value depend on sizes that a graph leaves open."""

    def forward(self, first, second, locations, weights):
        value = torch.cat([x.flatten(2).transpose(1, 2) for x in (first, second)], 1).unflatten(-1, (2, 3))
        return deformable_attention(value, [first.shape[-2:], second.shape[-2:]], locations, weights)


def maps(batch, queries, height, width):
    _, locations, weights = make([(1, 1)] * 2, batch, queries, dtype=torch.float32)
    first = torch.randn(batch, 6, height, width)
    return first, torch.randn(batch, 6, height - 1, width // 2), locations.detach(), weights.detach()


@pytest.mark.parametrize("strict", [False, True])
def test_exports_for_any_size_in_operators_that_other_programs_know(strict):
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    queries = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(
        Sampler(), maps(2, 3, 5, 6), dynamic_shapes=(sizes, sizes, queries, queries), strict=strict
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("grid_sampler" in target for target in targets)
    assert not any("detrkit" in target for target in targets)
    other = maps(3, 4, 8, 7)
    torch.testing.assert_close(program.module()(*other), Sampler()(*other))


def test_compiles_into_one_graph_for_any_size():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(Sampler(), fullgraph=True, dynamic=True, backend=keep)
    # No two sizes of a call are equal, or the graph would take them for one.
    for sizes in ((4, 11, 9, 14), (5, 13, 12, 20)):
        inputs = maps(*sizes)
        inputs[0].requires_grad_()
        result = compiled(*inputs)
        torch.testing.assert_close(result, Sampler()(*inputs))
        torch.testing.assert_close(
            torch.autograd.grad(result.sum(), inputs[0]),
            torch.autograd.grad(Sampler()(*inputs).sum(), inputs[0]),
        )
    assert len(graphs) == 1
    assert any("detrkit" in str(node.target) for node in graphs[0].graph.nodes)


def test_operator_keeps_the_rules_of_pytorchs_operators():
    inputs = make(queries=2)
    sizes = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(module._operator, (inputs[0], sizes, *inputs[1:], "gather"))


def test_training_warns_of_nothing():
    program = """
import torch
from detrkit.models.layers.deformable_attention import deformable_attention
value = torch.rand(1, 6, 1, 2, requires_grad=True)
locations = torch.rand(1, 2, 1, 1, 1, 2, requires_grad=True)
deformable_attention(value, [(2, 3)], locations, torch.ones(1, 2, 1, 1, 1), "gather").sum().backward()
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program], check=True, timeout=120)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it would start")
def test_triton_kernel_in_the_interpreter():
    """Runs the tests above that take an implementation, with the kernel for it."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_kernels_compile_for_a_gpu_that_is_not_there(dtype):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from detrkit.kernels import deformable_attention_triton as kernels

    constants = {"level_count": 4, "point_count": 4, "block_queries": 16, "block_channels": 32}
    constants |= {"sum_dtype": tl.float32, "value_wanted": True}
    types = dict.fromkeys(("length", "queries", "heads", "head_dim"), "i32") | {"levels": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("locations", "weights", "grad_locations", "grad_weights", "grad_value"), "*fp32")
    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, f"*{dtype}") for name in kernel.arg_names},
            constexprs={
                (kernel.arg_names.index(name),): constant
                for name, constant in constants.items()
                if name in kernel.arg_names
            },
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
        assert compiled.asm["cubin"]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 20])
def test_kernel_on_the_gpu_equals_the_cpu(dtype, head_dim):
    shapes = [(40, 54), (20, 27), (10, 14), (1, 1)]
    inputs = make(shapes, 2, 333, 8, head_dim, 4, dtype=dtype, low=-0.05)
    assert module._implementation_for(torch.device("cuda")) == "triton"
    grad = torch.randn(2 * 333 * 8 * head_dim)
    on_gpu = [x.detach().cuda().requires_grad_() for x in inputs]
    got = [x.cpu() for x in run(on_gpu, shapes, None, grad)]
    expected = run(inputs, shapes, "gather", grad)
    # The one pixel of the last level sums a thousand samples, in an order that changes from run to run;
    # rounding errors of a sum grow with the square root of its length.
    tolerance = max(math.sqrt(333 * 4) * torch.finfo(dtype).eps, 1e-12)
    for mine, theirs in zip(got, expected):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.gpu
@needs_cuda
def test_model_step_on_the_gpu_compiles():
    inputs = [x.detach().cuda().requires_grad_() for x in make(dtype=torch.float32)]
    compiled = torch.compile(
        lambda value, *where: deformable_attention(value, SHAPES, *where).square().sum(), fullgraph=True
    )
    compiled(*inputs).backward()
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    deformable_attention(plain[0], SHAPES, *plain[1:]).square().sum().backward()
    for mine, theirs in zip(inputs, plain):
        torch.testing.assert_close(mine.grad, theirs.grad)
