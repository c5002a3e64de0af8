"""Pre-processing: detrkit's image processor against both of Transformers', from decoded image to tensor.

The three take turns in one process (A B C B C A ...), so that a change of the machine's speed meets all.

    python benchmarks/processing.py                               # as many threads as there are cores
    python benchmarks/processing.py --threads 1 --repeats 41 --out benchmarks/results/processing.csv

Nothing else should run on the machine meanwhile. The images are noise drawn over a smooth picture: what they
show does not change the work.
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

import numpy as np
import PIL
import PIL.Image
import torch
import transformers

from detrkit import DetrImageProcessor

OURS, TORCHVISION, PILLOW = "detrkit", "transformers torchvision", "transformers pil"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    processors = {
        OURS: DetrImageProcessor(),
        TORCHVISION: transformers.DetrImageProcessor(),
        PILLOW: transformers.DetrImageProcessorPil(),
    }
    rows = []
    for case, images in make_cases().items():
        repeats = max(3, args.repeats // 4) if isinstance(images, list) else args.repeats
        rows.append(measure(case, images, processors, repeats, args.threads))
        print_row(rows[-1])
    if args.out:
        write_csv(args.out, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--repeats", type=int, default=31, help="runs of a single image; batches get a quarter"
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args()


def make_cases() -> dict[str, Any]:
    wide, tall = picture(640, 480), picture(480, 640)
    pil_batch = [wide, tall] * 8
    arrays = [np.array(image) for image in pil_batch]
    tensors = [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]
    return {
        "PIL 640x480": wide,
        "PIL 480x640": tall,
        "NumPy 640x480": arrays[0],
        "torch 640x480": tensors[0],
        "16 PIL, 640x480": [wide] * 16,
        "16 PIL, both": pil_batch,
        "16 NumPy, both": arrays,
        "16 torch, both": tensors,
    }


def picture(width: int, height: int) -> PIL.Image.Image:
    """A smooth picture with noise over it."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1) * 200
    noise = np.random.default_rng(0).integers(0, 56, smooth.shape)
    return PIL.Image.fromarray((smooth + noise).astype(np.uint8))


def measure(
    case: str, images: Any, processors: dict[str, Callable[..., Any]], repeats: int, threads: int
) -> dict[str, Any]:
    for processor in processors.values():  # the first run pays for caches and allocations
        processor(images, return_tensors="pt")
    times: dict[str, list[float]] = {name: [] for name in processors}
    names = list(processors)
    for turn in range(repeats):
        # Whoever follows the Pillow backend finds the caches full of its arrays, so the order rotates.
        for name in names[turn % 3 :] + names[: turn % 3]:
            processor = processors[name]
            start = time.perf_counter()
            processor(images, return_tensors="pt")
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    # The ratio of each turn, so that its spread does not hold the machine's own drift.
    ratios = sorted(
        min(torchvision, pillow) / ours
        for ours, torchvision, pillow in zip(times[OURS], times[TORCHVISION], times[PILLOW])
    )
    return {
        "case": case,
        "threads": threads,
        "repeats": repeats,
        **{f"{name} ms": round(value, 2) for name, value in medians.items()},
        "ratio": round(min(medians[TORCHVISION], medians[PILLOW]) / medians[OURS], 2),
        "ratio lower quartile": round(ratios[len(ratios) // 4], 2),
        "ratio upper quartile": round(ratios[3 * len(ratios) // 4], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def print_row(row: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {row[f'{name} ms']:7.2f} ms" for name in (OURS, TORCHVISION, PILLOW))
    spread = f"{row['ratio lower quartile']:.2f} to {row['ratio upper quartile']:.2f}"
    print(f"{row['case']:16s} threads {row['threads']}  {times}  ratio {row['ratio']:.2f} ({spread})")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
