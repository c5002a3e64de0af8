"""Matching and losses, forward and backward, against Transformers' own loss of the same heads.

Both sides get the same predictions of all decoder layers, as a model hands them over, and the same targets;
they take turns in one process.

    python benchmarks/losses.py
    python benchmarks/losses.py --repeats 21 --out benchmarks/results/losses.csv

Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from detrkit import DeformableDetrConfig, DetrConfig
from detrkit.losses.criterion import detection_loss

CLASSES = 91
LAYERS = 6
SIZES = [(16, 300, 20), (16, 300, 60), (2, 100, 8)]  # images, queries, objects an image

Labels = list[dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor, Labels], Tensor]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    rows = []
    for heads, (ours, theirs, logit_count) in make_sides().items():
        for size in SIZES:
            predictions, labels = make_batch(*size, logit_count)
            row = measure({"detrkit": ours, "transformers": theirs}, predictions, labels, args.repeats)
            case = dict(zip(("images", "queries", "objects"), size))
            rows.append({"heads": heads, **case, "threads": args.threads, "repeats": args.repeats, **row})
            print_row(rows[-1])
    if args.out:
        write_csv(args.out, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args()


def make_sides() -> dict[str, tuple[Loss, Loss, int]]:
    """For each kind of heads our loss, theirs, and the number of logits a query has."""
    sides = {}
    for heads, config_class, name, logit_count in (
        ("focal", DeformableDetrConfig, "DeformableDetr", CLASSES),
        ("softmax", DetrConfig, "Detr", CLASSES + 1),
    ):
        config = config_class(num_labels=CLASSES, auxiliary_loss=True)
        their_config = getattr(transformers, f"{name}Config")(
            num_labels=CLASSES, auxiliary_loss=True, class_cost=config.class_cost
        )
        # A class without a loss of its own name has the one for any object detection.
        their_loss = LOSS_MAPPING.get(f"{name}ForObjectDetection", LOSS_MAPPING["ForObjectDetection"])
        sides[heads] = (our_side(config), their_side(their_loss, their_config), logit_count)
    return sides


def our_side(config: Any) -> Loss:
    def loss(logits: Tensor, boxes: Tensor, labels: Labels) -> Tensor:
        return detection_loss(logits, boxes, labels, config)[0]

    return loss


def their_side(function: Callable[..., Any], config: Any) -> Loss:
    def loss(logits: Tensor, boxes: Tensor, labels: Labels) -> Tensor:
        return function(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[0]

    return loss


def make_batch(
    images: int, queries: int, objects: int, logit_count: int
) -> tuple[tuple[Tensor, Tensor], Labels]:
    """Predictions as of a model in training: low logits, and boxes that leave the image here and there."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, images, queries, logit_count, generator=generator) - 4
    boxes = random_boxes((LAYERS, images, queries), generator)
    labels = [
        {
            "class_labels": torch.randint(CLASSES, (objects,), generator=generator),
            "boxes": random_boxes((objects,), generator),
        }
        for _ in range(images)
    ]
    return (logits.requires_grad_(), boxes.requires_grad_()), labels


def random_boxes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Boxes (*shape, 4), cxcywh, normalised, of 0.05 to 0.5 in width and height."""
    centres = torch.rand(*shape, 2, generator=generator)
    return torch.cat([centres, 0.05 + 0.45 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def measure(
    sides: dict[str, Loss], predictions: tuple[Tensor, Tensor], labels: Labels, repeats: int
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-2, repeats):  # the first runs pay for caches and allocations
        for name, loss in sides.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(*predictions, labels), predictions)
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    # The ratio of each turn, so that its spread does not hold the machine's own drift.
    ratios = sorted(theirs / ours for ours, theirs in zip(times["detrkit"], times["transformers"]))
    return {
        **{f"{name} ms": round(value, 2) for name, value in medians.items()},
        "ratio": round(medians["transformers"] / medians["detrkit"], 2),
        "ratio lower quartile": round(ratios[len(ratios) // 4], 2),
        "ratio upper quartile": round(ratios[3 * len(ratios) // 4], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def print_row(row: dict[str, Any]) -> None:
    case = f"{row['images']} images, {row['queries']} queries, {row['objects']} objects"
    times = "  ".join(f"{name} {row[f'{name} ms']:7.1f} ms" for name in ("detrkit", "transformers"))
    spread = f"{row['ratio lower quartile']:.2f} to {row['ratio upper quartile']:.2f}"
    print(
        f"{row['heads']:8s} {case:36s} threads {row['threads']}  {times}  ratio {row['ratio']:.2f} ({spread})"
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
