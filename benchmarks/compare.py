"""detrkit against Transformers, side by side: forward pass and end to end, on this machine.

Each side runs in a process of its own, as its user would run it, and the two take turns (A B A B ...), so
that a change of the machine's speed meets both. Two rows a model: *as is*, where detrkit's Detector sets the
allocator and Transformers has the default, and *tuned*, where the environment sets it for both.

    python benchmarks/compare.py                         # DETR R50, R101 and R50-DC5
    python benchmarks/compare.py --models all
    python benchmarks/compare.py --models r50 --repeats 9 --csv benchmarks/results/compare.csv
    python benchmarks/compare.py --models r50-panoptic --repeats 3    # 16 GB of memory, for Transformers

Nothing else should run on the machine meanwhile. Weights are random but the same on both sides. End to end is
from a 640x480 picture to boxes in pixels, for panoptic models to a map of segments of the ten best queries.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Name -> family and options of its configuration.
MODELS = {
    "r50": ("Detr", {"backbone": "resnet50"}),
    "r101": ("Detr", {"backbone": "resnet101"}),
    "r50-dc5": ("Detr", {"backbone": "resnet50", "dilation": True}),
    "conditional": ("ConditionalDetr", {}),
    "deformable-single-scale": ("DeformableDetr", {"num_feature_levels": 1}),
    "deformable": ("DeformableDetr", {}),
    "two-stage": ("DeformableDetr", {"with_box_refine": True, "two_stage": True}),
    "r50-panoptic": ("Detr", {"backbone": "resnet50", "num_labels": 250}),
}
SURVIVORS = 10
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
SIDES = ("detrkit", "transformers")


def main() -> None:
    args = parse_arguments()
    if args.worker:
        serve(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS if args.models == ["all"] else args.models:
            checkpoint = Path(folder) / model
            save_random_checkpoint(checkpoint, model)
            for setting, extra in (("as is", {}), ("tuned", TUNED)):
                rows += compare(model, setting, extra, checkpoint, args)
    print_table(rows, args)
    if args.csv:
        write_csv(rows, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "all"], default=["r50", "r101", "r50-dc5"])
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def class_name(model: str) -> str:
    task = "Segmentation" if model.endswith("panoptic") else "ObjectDetection"
    return f"{MODELS[model][0]}For{task}"


def save_random_checkpoint(folder: Path, model: str) -> None:
    import torch

    import detrkit

    torch.manual_seed(0)
    family, options = MODELS[model]
    config = getattr(detrkit, f"{family}Config")(**{"num_labels": 91, **options})
    getattr(detrkit, class_name(model))(config).save_pretrained(folder)
    getattr(detrkit, f"{family}ImageProcessor")().save_pretrained(folder)


def compare(model: str, setting: str, extra: dict, checkpoint: Path, args: argparse.Namespace) -> list[dict]:
    """Alternates the two sides; one row for each side and stage."""
    workers = {side: start(side, model, checkpoint, extra, args) for side in SIDES}
    times: dict = {(side, stage): [] for side in SIDES for stage in ("forward", "end to end")}
    outputs = {}
    try:
        for stage in ("forward", "end to end"):
            for repeat in range(-2, args.repeats):  # two rounds to warm up
                for side in SIDES:
                    answer = ask(workers[side], stage)
                    outputs[side, stage] = answer["checksum"]
                    if repeat >= 0:
                        times[side, stage].append(answer["seconds"])
        memory = {side: ask(workers[side], "memory")["megabytes"] for side in SIDES}
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    difference = abs(outputs["detrkit", "forward"] - outputs["transformers", "forward"])
    if difference > 1e-3 * abs(outputs["transformers", "forward"]):
        raise SystemExit(f"{model}: the two sides do not compute the same")
    return [
        {
            "model": model,
            "setting": setting,
            "stage": stage,
            **{f"{side} s": statistics.median(times[side, stage]) for side in SIDES},
            "ratio": statistics.median(times["transformers", stage])
            / statistics.median(times["detrkit", stage]),
            "ratio min": min(t / d for t, d in pairs(times, stage)),
            "ratio max": max(t / d for t, d in pairs(times, stage)),
            **{f"{side} peak MB": memory[side] for side in SIDES},
        }
        for stage in ("forward", "end to end")
    ]


def pairs(times: dict, stage: str) -> list[tuple[float, float]]:
    return list(zip(times["transformers", stage], times["detrkit", stage]))


def start(side: str, model: str, checkpoint: Path, extra: dict, args: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", side, "--folder", str(checkpoint)]
    command += ["--models", model]
    command += ["--height", str(args.height), "--width", str(args.width), "--threads", str(args.threads)]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**plain, "HF_HUB_OFFLINE": "1", **extra},
    )


def ask(worker: subprocess.Popen, what: str) -> dict:
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a worker stopped; its error is above")
    return json.loads(line)


def serve(args: argparse.Namespace) -> None:
    """The worker: one timed run for each line on stdin, its seconds as JSON on stdout."""
    import resource

    import numpy as np
    import torch
    from PIL import Image

    side, folder, height, width = args.worker, args.folder, args.height, args.width
    (name,) = args.models
    panoptic = name.endswith("panoptic")
    torch.set_num_threads(args.threads)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, height, width, dtype=torch.long)
    if side == "detrkit":
        from detrkit import Detector

        detector = Detector.from_pretrained(folder)
        model = detector.model

        def end_to_end(threshold: float) -> float:
            if panoptic:
                return float(len(detector.segment(picture, threshold)))
            return float(detector(picture, threshold).scores.sum())
    else:
        import transformers

        model = getattr(transformers, class_name(name)).from_pretrained(folder).eval()
        processor = getattr(transformers, f"{MODELS[name][0]}ImageProcessor").from_pretrained(folder)

        def end_to_end(threshold: float) -> float:
            inputs = processor(images=picture, return_tensors="pt")
            with torch.inference_mode():
                outputs = model(**inputs)
            sizes = [picture.size[::-1]]
            if panoptic:
                found = processor.post_process_panoptic_segmentation(outputs, threshold, target_sizes=sizes)
                return float(len(found[0]["segments_info"]))
            return float(
                processor.post_process_object_detection(outputs, threshold, sizes)[0]["scores"].sum()
            )

    def forward() -> float:
        with torch.inference_mode():
            return float(model(pixel_values=pixels, pixel_mask=mask).logits.abs().sum())

    threshold = 0.0
    if panoptic:
        # Both sides find the same one: between the scores of the last survivor and the next query.
        import detrkit

        inputs = detrkit.DetrImageProcessor()(images=picture, return_tensors="pt")
        detector_alone = model.detector if side == "detrkit" else model.detr
        with torch.inference_mode():
            scores = detector_alone(**inputs).logits.softmax(-1)[0, :, :-1].amax(-1).sort().values
        threshold = float(scores[-SURVIVORS - 1 : -SURVIVORS + 1].mean())

    for line in sys.stdin:
        what = line.strip()
        if what == "memory":
            answer = {"megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
        else:
            begin = time.perf_counter()
            checksum = forward() if what == "forward" else end_to_end(threshold)
            answer = {"seconds": time.perf_counter() - begin, "checksum": checksum}
        print(json.dumps(answer), flush=True)


def print_table(rows: list[dict], args: argparse.Namespace) -> None:
    print(configuration(args))
    print(
        f"{'model':25}{'allocator':11}{'stage':12}{'detrkit':>9}{'transformers':>14}{'ratio':>7}{'spread':>14}"
        f"{'peak MB':>14}"
    )
    for row in rows:
        print(
            f"{row['model']:25}{row['setting']:11}{row['stage']:12}{row['detrkit s']:8.3f}s"
            f"{row['transformers s']:13.3f}s{row['ratio']:7.2f}"
            f"{row['ratio min']:8.2f}-{row['ratio max']:.2f}"
            f"{row['detrkit peak MB']:8}/{row['transformers peak MB']}"
        )


def configuration(args: argparse.Namespace) -> str:
    from importlib.metadata import version

    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "timm"))
    return (
        f"{args.height}x{args.width}, batch 1, fp32, {args.threads} threads, medians of {args.repeats}; "
        f"{platform.machine()}, Python {platform.python_version()}, {packages}"
    )


def write_csv(rows: list[dict], args: argparse.Namespace) -> None:
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], "date", "configuration"])
        if new:
            writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(
                {**rounded, "date": time.strftime("%Y-%m-%d"), "configuration": configuration(args)}
            )


if __name__ == "__main__":
    main()
