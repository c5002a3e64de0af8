"""A folder of pictures through ``detrkit detect`` and through Transformers' pipeline, as programs.

    python benchmarks/throughput.py ../shared/data/coco_panoptic/val2017 --limit 160
    python benchmarks/throughput.py FOLDER --model detr-resnet-50 --batch-sizes 1 --rounds 1

Each run is a program of its own, started, timed and ended as by its user; the programs take turns. A second,
short run with few pictures gives the time that starting and loading take, and what is left is the images a
second of a long run. ``--model`` is a Hub id or folder; by default DETR R50 with random weights. What the two
find is compared: the pipeline rounds boxes down to whole pixels, and in batches of different sizes it pads,
so its boxes differ from those of its own single images.

CSV columns: ``program``, ``batch``, ``images``, ``seconds`` (median of the rounds), ``start_seconds``,
``images_per_s`` (of the whole program), ``images_per_s_after_start``, ``ratio`` (images a second of the whole
program, over the pipeline's best), ``ratio_after_start``, ``peak_mb`` and ``peak_mb_start`` (of the long and
the short run: alike where memory does not grow with the number of pictures), ``same`` (share of the
detections of the pipeline's first batch size that this program has too), and the configuration.

The pipeline takes long: find its best batch size with ``--limit 24``, then measure that one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from detrkit.benchmark import machine, models
from detrkit.benchmark.report import append_csv
from detrkit.common.terminal import quiet_libraries
from engines import RESULTS, say

SUFFIXES = {".jpg", ".jpeg", ".png"}
# Scores may lie this far apart, and boxes, which the pipeline rounds down, this many pixels.
SCORE, PIXELS = 2e-3, 1.1
SHORT = 8
# Linux counts the memory of whoever starts a process as the process's own, so something small starts it.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def main() -> None:
    args = parse_arguments()
    quiet_libraries()
    if args.pipeline:
        run_pipeline(args)
        return
    pictures = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in SUFFIXES)[: args.limit]
    if len(pictures) <= SHORT:
        raise SystemExit(f"{args.folder} has {len(pictures)} pictures; {SHORT + 1} are the least")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = str(Path(folder, "model"))
            models.save_random("detr-resnet-50", Path(model))
        programs = [("detrkit", args.our_batch_size), *(("pipeline", size) for size in args.batch_sizes)]
        folders = {}
        for count in (SHORT, len(pictures)):
            folders[count] = Path(folder, str(count))
            folders[count].mkdir()
            for picture in pictures[:count]:
                (folders[count] / picture.name).symlink_to(picture.resolve())
        runs: dict[tuple[str, int, int], list[dict[str, float]]] = {}
        found = {}
        for turn in range(args.rounds):
            for program, batch in programs:
                for count, images in folders.items():
                    out = Path(folder, f"{program} {batch}.json")
                    seen = start(program, model, images, batch, out, args)
                    runs.setdefault((program, batch, count), []).append(seen)
                    say(
                        f"round {turn + 1} of {args.rounds}: {program}, batch {batch}, {count} images: "
                        f"{seen['seconds']:.1f} s, {seen['peak_mb']:.0f} MB"
                    )
                found[program, batch] = read_detections(program, out)
    rows = make_rows(programs, runs, found, len(pictures), args)
    append_csv(args.csv, rows)
    for row in rows:
        print(
            f"{row['program']:10}batch {row['batch']}: {row['images_per_s']:.2f} images/s, after start "
            f"{row['images_per_s_after_start']:.2f}; ratio to the pipeline {row['ratio']:.2f}, after start "
            f"{row['ratio_after_start']:.2f}; {row['peak_mb_start']:.0f} to {row['peak_mb']:.0f} MB; "
            f"same detections {row['same']:.4f}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of pictures")
    parser.add_argument("--model", help="Hub id or folder")
    parser.add_argument("--limit", type=int, default=160, help="pictures")
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--our-batch-size", type=int, default=1)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8], help="of the pipeline")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--csv", type=Path, default=RESULTS / "throughput.csv", help="add the rows to this file"
    )
    parser.add_argument("--pipeline", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(
    program: str, model: str, images: Path, batch: int, out: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Runs a program to its end."""
    options = ["--model", model, "--threshold", str(args.threshold)]
    if program == "detrkit":
        command = [sys.executable, "-m", "detrkit", "detect", str(images), "--batch-size", str(batch)]
        command += ["--json", str(out)]
    else:
        command = [sys.executable, __file__, str(images), "--batch-sizes", str(batch), "--pipeline", str(out)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command, *options],
        env={**plain, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{program} failed; its error is above")
    return {"seconds": seconds, "peak_mb": int(done.stdout.splitlines()[-1]) * 1024 / 1e6}


def run_pipeline(args: argparse.Namespace) -> None:
    """The other program: what a user of Transformers writes."""
    from transformers import pipeline

    detector = pipeline("object-detection", model=args.model)
    paths = sorted(str(path) for path in args.folder.iterdir())
    results = detector(paths, batch_size=args.batch_sizes[0], threshold=args.threshold)
    document = {Path(path).name: found for path, found in zip(paths, results)}
    args.pipeline.write_text(json.dumps(document), encoding="utf-8")


def read_detections(program: str, path: Path) -> dict[str, list[tuple[str, float, list[float]]]]:
    """File name -> label, score and xyxy of each detection."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if program == "pipeline":
        return {
            name: [(e["label"], e["score"], list(e["box"].values())) for e in entries]
            for name, entries in document.items()
        }
    names = {category["id"]: category["name"] for category in document["categories"]}
    files = {image["id"]: image["file_name"] for image in document["images"]}
    detections: dict[str, list[tuple[str, float, list[float]]]] = {name: [] for name in files.values()}
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        box = [x, y, x + width, y + height]
        detections[files[entry["image_id"]]].append((names[entry["category_id"]], entry["score"], box))
    return detections


def share_found(expected: dict[str, list], found: dict[str, list]) -> float:
    """Which share of the expected detections has a counterpart."""
    counterparts = total = 0
    for name, entries in expected.items():
        left = list(found[name])
        total += len(entries)
        for label, score, box in entries:
            for candidate in left:
                near = max(abs(a - b) for a, b in zip(candidate[2], box)) <= PIXELS
                if candidate[0] == label and abs(candidate[1] - score) <= SCORE and near:
                    left.remove(candidate)
                    counterparts += 1
                    break
    return counterparts / max(total, 1)


def make_rows(
    programs: list[tuple[str, int]], runs: dict, found: dict, images: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for program, batch in programs:
        long, short = runs[program, batch, images], runs[program, batch, SHORT]
        seconds, starting = (statistics.median(run["seconds"] for run in each) for each in (long, short))
        per_image = (seconds - starting) / (images - SHORT)
        rows.append(
            {
                "program": program,
                "batch": batch,
                "images": images,
                "seconds": round(seconds, 2),
                "start_seconds": round(starting - SHORT * per_image, 2),
                "images_per_s": round(images / seconds, 3),
                "images_per_s_after_start": round(1 / per_image, 3),
                "ratio": 0.0,
                "ratio_after_start": 0.0,
                "peak_mb": round(max(run["peak_mb"] for run in long)),
                "peak_mb_start": round(max(run["peak_mb"] for run in short)),
                "same": round(share_found(found["pipeline", args.batch_sizes[0]], found[program, batch]), 4),
                "model": args.model or "detr-resnet-50, random weights",
                **machine.columns(args.threads),
            }
        )
    for ratio, column in (("ratio", "images_per_s"), ("ratio_after_start", "images_per_s_after_start")):
        best = max(row[column] for row in rows if row["program"] == "pipeline")
        for row in rows:
            row[ratio] = round(row[column] / best, 3)
    return rows


if __name__ == "__main__":
    main()
