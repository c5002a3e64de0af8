"""Where the time of a forward pass goes: convolutions, matrix products, attention, gathering, the rest.

    python benchmarks/time_by_kind.py --models detr-resnet-50 deformable-detr
    python benchmarks/time_by_kind.py --models detr-resnet-50 --sides torch transformers --repeats 5

PyTorch's profiler adds up the time spent in each operator itself, without the operators that it calls. Beside
it stands what the model's multiply-adds take in large matrix products on this machine: what lies between is
time that is not spent in arithmetic. CSV columns: ``model``, ``side``, the pass's ``total_ms`` and
``limit_ms``, milliseconds of each kind, and the configuration.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from detrkit.benchmark import machine, models
from detrkit.benchmark.report import append_csv, least_seconds
from detrkit.benchmark.sides import Settings, detrkit_side, transformers_side
from detrkit.checkpoints.registry import REGISTRY
from detrkit.cli.benchmark import parse_size
from detrkit.cli.console import quiet_libraries
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
    "compiled": ("cpp_fused", "triton", "CompiledFx", "Torch-Compiled", "TorchDynamo"),
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
SIDES = {"torch": detrkit_side, "compile": detrkit_side, "transformers": transformers_side}


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
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["torch"])
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
    milliseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        milliseconds[kind] += event.self_cpu_time_total / 1e3 / args.repeats
        calls[kind] += event.count / args.repeats
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


def kind_of(operator: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "other"


if __name__ == "__main__":
    main()
