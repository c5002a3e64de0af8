"""A training step of Deformable DETR against Transformers: forward, a simple loss, backward.

Both sides share one process, weights and batch, and take turns.

    python benchmarks/training_step.py --height 320 --width 427 --batch 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import torch
import transformers

import detrkit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=427)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pixels = torch.randn(args.batch, 3, args.height, args.width)
    for name, options in (("deformable", {}), ("two-stage", {"with_box_refine": True, "two_stage": True})):
        sides = make_sides(options)
        times: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(-1, args.repeats):
            for side, model in sides.items():
                seconds = step(model, pixels)
                if repeat >= 0:
                    times[side].append(seconds)
        ours, theirs = (statistics.median(times[side]) for side in ("detrkit", "transformers"))
        pairs = [t / o for t, o in zip(times["transformers"], times["detrkit"])]
        print(
            f"{name:12} batch {args.batch}, {args.height}x{args.width}, {args.threads} threads: "
            f"detrkit {ours:.3f}s, transformers {theirs:.3f}s, "
            f"ratio {theirs / ours:.2f} ({min(pairs):.2f}-{max(pairs):.2f})"
        )


def make_sides(options: dict) -> dict[str, torch.nn.Module]:
    """The same weights in both libraries, the backbone's early stages frozen in both."""
    ours = detrkit.DeformableDetrForObjectDetection(detrkit.DeformableDetrConfig(num_labels=91, **options))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.DeformableDetrForObjectDetection.from_pretrained(folder)
    for name, parameter in theirs.named_parameters():
        if "backbone" in name and not any(f"layer{i}" in name for i in (2, 3, 4)):
            parameter.requires_grad_(False)
    return {"detrkit": ours.train(), "transformers": theirs.train()}


def step(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    model.zero_grad()
    begin = time.perf_counter()
    outputs = model(pixel_values=pixels)
    (outputs.logits.square().mean() + outputs.pred_boxes.square().mean()).backward()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
