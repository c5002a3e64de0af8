"""Where the time of a forward pass goes: convolutions, matrix products, attention, gathering, the rest.

    python benchmarks/time_by_kind.py --models detr-resnet-50 deformable-detr
    python benchmarks/time_by_kind.py --models detr-resnet-50 --sides torch transformers onnx --repeats 5

PyTorch's profiler adds up the time spent in each operator itself, without the operators that it calls;
onnxruntime's and OpenVINO's give the time of each node of the exported graph. Beside it stands what the
model's multiply-adds take in large matrix products on this machine: what lies between is time that is not
spent in arithmetic. CSV columns: ``model``, ``side``, the pass's ``total_ms`` and ``limit_ms``, milliseconds
of each kind, and the configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from detrkit.benchmark import machine, models
from detrkit.benchmark.report import append_csv, least_seconds
from detrkit.benchmark.sides import Settings, Side, detrkit_side, transformers_side
from detrkit.checkpoints.loading import load_pretrained
from detrkit.checkpoints.registry import REGISTRY
from detrkit.cli.benchmark import parse_size
from detrkit.common.terminal import quiet_libraries
from detrkit.engines.export import export_model
from engines import RESULTS, say

# Kind -> what names of its operators hold, the first that fits.
KINDS = {
    "deformable attention": ("detrkit::deformable_attention", "embedding_bag", "grid_sampler"),
    "attention": ("scaled_dot_product", "_softmax", "softmax"),
    "convolution": ("convolution", "conv2d", "mkldnn_conv"),
    "matrix product": ("addmm", "aten::mm", "bmm", "linear", "matmul", "mkl_linear"),
    "gather and copy": (
        "copy_",
        "aten::to",
        "contiguous",
        "clone",
        "cat",
        "gather",
        "index",
        "take",
        "reorder",
        "to_dense",
    ),
    "norm": ("norm",),
    "pooling, resizing": ("pool", "upsample", "interpolate"),
    "compiled": ("cpp_fused", "triton", "compiledfx", "torch-compiled", "torchdynamo"),
    "elementwise": (
        "aten::add",
        "aten::mul",
        "aten::sub",
        "aten::div",
        "relu",
        "clamp",
        "threshold",
        "sigmoid",
        "aten::sin",
        "aten::cos",
        "aten::exp",
        "aten::pow",
        "sqrt",
        "floor",
        "where",
        "fill_",
        "zero_",
        "cumsum",
        "masked",
        "aten::lt",
        "aten::gt",
        "aten::ge",
        "aten::le",
        "aten::log",
    ),
}
# Kind -> the types of nodes that exported graphs have, in small letters; others are matched as above.
NODES = {
    "deformable attention": ("gridsample",),
    "convolution": ("conv", "fusedconv"),
    "matrix product": ("gemm", "fusedgemm", "fullyconnected", "fusedmatmul"),
    "gather and copy": (
        "transpose",
        "reorder",
        "concatenation",
        "stridedslice",
        "slice",
        "split",
        "reshape",
        "expand",
        "broadcast",
        "tile",
        "cast",
        "convert",
        "gatherelements",
        "scatternd",
        "scatterndupdate",
    ),
    "norm": ("mvn", "layernormalization", "skiplayernormalization"),
    "elementwise": (
        *("eltwise", "subgraph", "add", "subtract", "sub", "multiply", "mul", "divide"),
        *("div", "maximum", "max", "minimum", "min", "neg", "exp", "sin"),
        *("cos", "power", "sqrt", "floor", "clip", "clamp", "greater", "less"),
        *("equal", "select", "where", "logicaland", "logicalor", "isinf", "isnan", "reducesum"),
        *("reducemean", "relu", "sigmoid"),
    ),
}
SIDES: dict[str, Callable[[Settings], Side]] = {
    "torch": detrkit_side,
    "compile": detrkit_side,
    "transformers": transformers_side,
}


def main() -> None:
    args = parse_arguments()
    quiet_libraries()
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            models.save_random(model, Path(folder))
            cost = models.cost_of(folder, (args.height, args.width))
            limit = 1e3 * least_seconds(cost, machine.matrix_rate(args.threads))
            for side in args.sides:
                # A process each: detrkit's Detector sets the allocator of its own.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    rows.append(pool.submit(measure, model, side, folder, limit, args).result())
    append_csv(args.csv, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=REGISTRY, default=["detr-resnet-50"])
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, "onnx", "openvino"], default=["torch"])
    parser.add_argument("--size", default="800x1066", help="height x width in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--csv", type=Path, default=RESULTS / "time_by_kind.csv", help="add the rows to this file"
    )
    args = parser.parse_args()
    args.height, args.width = parse_size(args.size)
    return args


def measure(model: str, side: str, folder: str, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    quiet_libraries()
    torch.set_num_threads(args.threads)
    say(f"{model}, {side}")
    milliseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    profiled = {"onnx": profile_onnx, "openvino": profile_openvino}.get(side, profile_torch)
    for operator, count, spent in profiled(side, folder, args):
        kind = kind_of(operator)
        milliseconds[kind] += spent / args.repeats
        calls[kind] += count / args.repeats
    total = sum(milliseconds.values())
    print(f"{model}, {side}, {args.height}x{args.width}: {total:.0f} ms, limit {limit:.0f} ms")
    for kind, spent in sorted(milliseconds.items(), key=lambda item: -item[1]):
        print(f"  {kind:22}{spent:9.1f} ms{100 * spent / total:6.1f} %{calls[kind]:8.0f} calls")
    print(f"  {'not in arithmetic':22}{total - limit:9.1f} ms{100 * (1 - limit / total):6.1f} %")
    return {
        "model": model,
        "side": side,
        "total_ms": round(total),
        "limit_ms": round(limit),
        **{kind: round(milliseconds[kind]) for kind in [*KINDS, "other"]},
        "height": args.height,
        "width": args.width,
        "repeats": args.repeats,
        **machine.columns(args.threads),
    }


def profile_torch(side: str, folder: str, args: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """Operators with their calls and milliseconds, in all repeats together."""
    settings = Settings(
        maker="",
        model=folder,
        engine="compile" if side == "compile" else "torch",
        height=args.height,
        width=args.width,
        batch=1,
        threads=args.threads,
        threshold=0.0,
    )
    forward = SIDES[side](settings).forward
    for _ in range(2):
        forward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(args.repeats):
            forward()
    for event in profiler.key_averages():
        yield event.key, event.count, event.self_cpu_time_total / 1e3


def profile_onnx(side: str, folder: str, args: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """The same of an exported graph in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.enable_profiling = True
    with exported(side, folder) as path:
        options.profile_file_prefix = str(path.parent / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(2 + args.repeats):
            session.run(None, inputs(args))
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = [event["ts"] for event in events if event["name"] == "model_run"]
    first = sorted(runs)[2]  # when the one after the warm-up began
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= first:
            yield event["args"]["op_name"], 1, event["dur"] / 1e3


def profile_openvino(side: str, folder: str, args: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """The same in OpenVINO, which runs the graph made for sizes of all kinds."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    with exported(side, folder) as path:
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(path), "CPU", {**settings, "INFERENCE_NUM_THREADS": args.threads}
        )
        request = compiled.create_infer_request()
        for repeat in range(2 + args.repeats):
            request.infer(inputs(args))
            for node in request.get_profiling_info() if repeat > 1 else ():
                if node.status == openvino.ProfilingInfo.Status.EXECUTED:
                    yield node.node_type, 1, node.real_time.total_seconds() * 1e3


@contextmanager
def exported(side: str, folder: str) -> Iterator[Path]:
    model, _ = load_pretrained(folder, None)
    with tempfile.TemporaryDirectory() as work:
        export_model(model, work, side, verify=False)
        yield Path(work) / {"onnx": "model.onnx", "openvino": "model.xml"}[side]


def inputs(args: argparse.Namespace) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).standard_normal((1, 3, args.height, args.width), dtype=np.float32)
    return {"pixel_values": pixels, "pixel_mask": np.ones((1, args.height, args.width), dtype=np.int64)}


def kind_of(operator: str) -> str:
    for kind, types in NODES.items():
        if operator.lower() in types:
            return kind
    for kind, parts in KINDS.items():
        if any(part in operator.lower() for part in parts):
            return kind
    return "other"


if __name__ == "__main__":
    main()
