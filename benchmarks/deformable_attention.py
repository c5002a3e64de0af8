"""The deformable attention operator against the one of Transformers, in one process, in turns.

    python benchmarks/deformable_attention.py
    python benchmarks/deformable_attention.py --cases encoder --repeats 9 --csv results.csv
    python benchmarks/deformable_attention.py --device cuda --dtype bfloat16

Cases: *encoder* and *decoder* of an 800x1066 image, one image; the same of 320x432 for two images, as a small
training batch. Locations lie a few pixels around each query's own place, as in a trained model. Nothing else
should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from detrkit.benchmark import machine
from detrkit.benchmark.report import append_csv
from detrkit.models.layers.deformable_attention import deformable_attention

LARGE = [(100, 134), (50, 67), (25, 34), (13, 17)]
SMALL = [(40, 54), (20, 27), (10, 14), (5, 7)]
# levels, images, queries (None: every pixel)
CASES = {
    "encoder": (LARGE, 1, None),
    "decoder": (LARGE, 1, 300),
    "small-encoder": (SMALL, 2, None),
    "small-decoder": (SMALL, 2, 300),
}
HEADS, HEAD_DIM, POINTS = 8, 32, 4


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    rows = [row for case in args.cases for row in measure(case, args)]
    for row in rows:
        print(
            f"{row['case']:14} {row['pass']:17} detrkit {row['detrkit_ms']:8.1f} ms   "
            f"transformers {row['transformers_ms']:8.1f} ms   ratio {row['ratio']:.2f} "
            f"({row['lowest']:.2f} to {row['highest']:.2f})"
        )
    if args.csv:
        common = {"device": args.device, "dtype": args.dtype, "repeats": args.repeats}
        configuration = machine.columns(args.threads, args.device)
        append_csv(args.csv, [{**row, **common, **configuration} for row in rows])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    return parser.parse_args()


def make_inputs(case: str, args: argparse.Namespace) -> list[Tensor]:
    """Value, sampling locations and attention weights."""
    shapes, batch, queries = CASES[case]
    torch.manual_seed(0)
    centres = torch.cat([pixel_centres(height, width) for height, width in shapes])
    if queries:
        centres = torch.rand(queries, 2)
    layout = (batch, len(centres), HEADS, len(shapes), POINTS)
    size = torch.tensor([(width, height) for height, width in shapes])[:, None]
    locations = centres[None, :, None, None, None] + 3 * torch.randn(*layout, 2) / size
    value = torch.randn(batch, sum(height * width for height, width in shapes), HEADS, HEAD_DIM)
    weights = torch.rand(layout).flatten(3).softmax(-1).view(layout)
    dtype = getattr(torch, args.dtype)
    return [x.to(args.device, dtype) for x in (value, locations, weights)]


def pixel_centres(height: int, width: int) -> Tensor:
    """(height x width, 2), x then y, relative."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(((columns + 0.5) / width, (rows + 0.5) / height), -1).flatten(0, 1)


def measure(case: str, args: argparse.Namespace) -> list[dict]:
    """One row for the forward pass in inference, one for forward and backward in training."""
    inputs = make_inputs(case, args)
    shapes = CASES[case][0]
    reference = MultiScaleDeformableAttention()
    sides: dict[str, Callable[..., Tensor]] = {
        "detrkit": lambda value, *where: deformable_attention(value, shapes, *where),
        "transformers": lambda value, *where: reference(value, None, shapes, None, *where, 64),
    }
    exact = [x.double().requires_grad_() for x in inputs]
    right = deformable_attention(exact[0], shapes, *exact[1:], implementation="grid_sample")
    with torch.inference_mode():
        errors = {side: relative_error([f(*inputs)], [right]) for side, f in sides.items()}
        times = in_turns({side: lambda f=f: f(*inputs) for side, f in sides.items()}, args)
    rows = [summarise(case, "forward", times, errors)]

    leaves = [x.requires_grad_() for x in inputs]
    grad = torch.randn(len(inputs[0]), inputs[1].shape[1], HEADS * HEAD_DIM).to(inputs[0])
    steps = {side: lambda f=f: torch.autograd.grad(f(*leaves), leaves, grad) for side, f in sides.items()}
    gradients = torch.autograd.grad(right, exact, grad.double())
    errors = {side: relative_error(step(), gradients) for side, step in steps.items()}
    return [*rows, summarise(case, "forward+backward", in_turns(steps, args), errors)]


def relative_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest norm of a difference, relative to what is right."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right))


def in_turns(calls: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each call, A B A B ..., after one warm-up each."""
    times: dict[str, list[float]] = {side: [] for side in calls}
    for repeat in range(args.repeats + 1):
        for side, call in calls.items():
            start = time.perf_counter()
            call()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()  # so that the next call starts on an idle card, too
            if repeat:
                times[side].append(1000 * (time.perf_counter() - start))
    return times


def summarise(case: str, what: str, times: dict[str, list[float]], errors: dict[str, float]) -> dict:
    """Medians, and the ratio of the two with its spread over the turns."""
    ratios = [theirs / mine for mine, theirs in zip(times["detrkit"], times["transformers"])]
    mine, theirs = (statistics.median(times[side]) for side in ("detrkit", "transformers"))
    return {
        "case": case,
        "pass": what,
        "detrkit_ms": round(mine, 4),
        "transformers_ms": round(theirs, 4),
        "ratio": round(theirs / mine, 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "error": errors["detrkit"],
        "transformers_error": errors["transformers"],
    }


if __name__ == "__main__":
    main()
