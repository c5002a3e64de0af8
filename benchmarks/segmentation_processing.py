"""Panoptic post-processing: detrkit's image processor against Transformers', from outputs to segments.

Both take turns in one process (A B B A ...), so that a change of the machine's speed meets both.

    python benchmarks/segmentation_processing.py                  # as many threads as there are cores
    python benchmarks/segmentation_processing.py --threads 1 --out benchmarks/results/segmentation.csv

Nothing else should run on the machine meanwhile. The outputs are drawn: 100 queries of which ten survive,
each with a mask that is a soft ellipse, at a stride of 4 of an image of 800x1066, brought to 480x640.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.detr.modeling_detr import DetrSegmentationOutput

from detrkit import DetrImageProcessor

QUERIES, SURVIVORS, LABELS = 100, 10, 250
MASK_SIZE, PROCESSED_SIZE, TARGET_SIZE = (200, 267), (800, 1066), (480, 640)
REFERENCE = "transformers post_process_panoptic_segmentation"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    calls = make_calls(make_outputs())
    with torch.inference_mode():
        rows = measure(calls, args.repeats, args.threads)
    for row in rows:
        spread = f"{row['ratio lower quartile']:.1f} to {row['ratio upper quartile']:.1f}"
        time_and_ratio = f"{row['ms']:7.2f} ms  ratio {row['ratio']} ({spread})"
        print(f"{row['call']:60s} threads {row['threads']}  {time_and_ratio}")
    if args.out:
        write_csv(args.out, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args()


def make_outputs() -> DetrSegmentationOutput:
    """Outputs for one image, with things and stuff, one stuff class of them twice."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, QUERIES, LABELS + 1, generator=generator)
    logits[..., -1] = 12
    survivors = torch.randperm(QUERIES, generator=generator)[:SURVIVORS]
    labels = torch.tensor([1, 1, 3, 17, 44, 62, 119, 184, 184, 200])
    logits[0, survivors, labels] = 18
    y, x = (torch.linspace(0, 1, length) for length in MASK_SIZE)
    centres, radii = torch.rand(QUERIES, 2, generator=generator), torch.rand(QUERIES, 2, generator=generator)
    distances = [
        ((axis - centre[:, None]) / (0.1 + radius[:, None] * 0.3)) ** 2
        for axis, centre, radius in zip((y, x), centres.T, radii.T)
    ]
    masks = 6 * (1 - distances[0][:, :, None] - distances[1][:, None, :]).clamp(min=-3)
    return DetrSegmentationOutput(
        logits=logits,
        pred_masks=masks[None] + torch.randn(1, QUERIES, *MASK_SIZE, generator=generator),
        pred_boxes=torch.rand(1, QUERIES, 4, generator=generator),
    )


def make_calls(outputs: Any) -> dict[str, Callable[[], Any]]:
    theirs, ours = transformers.DetrImageProcessor(), DetrImageProcessor()
    targets, processed = [TARGET_SIZE], [PROCESSED_SIZE]
    return {
        REFERENCE: lambda: theirs.post_process_panoptic_segmentation(outputs, target_sizes=targets),
        "detrkit post_process_panoptic_segmentation": (
            lambda: ours.post_process_panoptic_segmentation(outputs, target_sizes=targets)
        ),
        "detrkit the same, with processed_sizes (as the original)": (
            lambda: ours.post_process_panoptic_segmentation(
                outputs, target_sizes=targets, processed_sizes=processed
            )
        ),
        "detrkit post_process_panoptic, with its PNG": (
            lambda: ours.post_process_panoptic(outputs, processed, targets)
        ),
    }


def measure(calls: dict[str, Callable[[], Any]], repeats: int, threads: int) -> list[dict[str, Any]]:
    for call in calls.values():  # the first run pays for caches and allocations
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    reference = statistics.median(times[REFERENCE])
    rows = []
    for name, values in times.items():
        # The ratio of each turn, so that its spread does not hold the machine's own drift.
        ratios = sorted(theirs / ours for theirs, ours in zip(times[REFERENCE], values))
        rows.append(
            {
                "call": name,
                "threads": threads,
                "repeats": repeats,
                "ms": round(statistics.median(values), 2),
                "ratio": round(reference / statistics.median(values), 1),
                "ratio lower quartile": round(ratios[len(ratios) // 4], 1),
                "ratio upper quartile": round(ratios[3 * len(ratios) // 4], 1),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "machine": platform.processor() or platform.machine(),
            }
        )
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
