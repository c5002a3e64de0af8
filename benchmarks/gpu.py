r"""What detrkit does on a GPU, beside Transformers: correctness, frames a second, training steps, memory.

    python benchmarks/gpu.py                                     # all of it: at most nine minutes on an H100
    python benchmarks/gpu.py --steps models --models detr-resnet-50 --dtypes bfloat16 --compile detr-resnet-50
    python benchmarks/gpu.py --device cpu --size 128x192 --repeats 1 --photos 8 --training-batch 2 \
        --batches 1 --dtypes bfloat16 float32 --compile          # only to try the script: minutes

It runs from the source tree (``PYTHONPATH=src``) with PyTorch, Triton, timm, torchvision and Transformers,
and without a network: weights are random, but the same on both sides. Steps, in this order:

- ``tests``: ``pytest -m gpu``.
- ``operator``: deformable attention alone, against float64 and against Transformers'.
- ``training``: a step of DETR R50 and Deformable DETR with losses of all decoder layers and AdamW.
- ``kernels``: where the time of DETR R50 and Deformable DETR goes, by kernel.
- ``images``: photos from files to boxes, images a second, against Transformers' pipeline.
- ``models``: forward passes at 800x1066, each family, type and batch; ``--compile`` adds the compiled forms
  of some models in bfloat16 at batch 1.

Both sides share one process and take turns (A B A B ...); times are medians, ratios those of the medians. The
limit is that of the multiply-adds at the rate of large matrix products, measured first; in float32 these do
not use TF32, but convolutions do by default. Rows go to ``results/gpu_*.csv`` as they come. When
``--seconds`` are used up, what is left is skipped, which the last lines say.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import deformable_attention
import detrkit
from detrkit.benchmark import machine, models
from detrkit.benchmark.report import append_csv
from detrkit.checkpoints.loading import read_model_files
from detrkit.cli.benchmark import parse_size
from detrkit.common.terminal import quiet_libraries
from detrkit.common.text import first_line

STEPS = ("tests", "operator", "training", "kernels", "images", "models")
MODELS = (
    "detr-resnet-50",
    "deformable-detr",
    "conditional-detr-resnet-50",
    "detr-resnet-50-panoptic",
    "deformable-detr-with-box-refine-two-stage",
    "detr-resnet-101",
    "detr-resnet-50-dc5",
    "deformable-detr-single-scale",
)
DTYPES = ("bfloat16", "float32", "float16")
WARM_UP = 5  # a shape gets its CUDA graph at the fourth call
OBJECTS = 8  # of an image in a training step

Call = Callable[[], Any]
Row = dict[str, Any]


class Bench:
    """The arguments, the time that is left, and what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.end = time.monotonic() + args.seconds
        self.skipped: list[str] = []
        self.failed = False
        self.table: list[str] = []
        self.costs: dict[Path, int] = {}
        self.configuration = machine.columns(args.threads, args.device)
        self.rates = {name: machine.matrix_rate(args.threads, args.device, name) for name in args.dtypes}
        for name, rate in self.rates.items():
            self.say(f"matrix products in {name}: {rate / 1e3:.2f} TFLOP/s")

    def say(self, line: str) -> None:
        """Prints a line now, and again in the table at the end."""
        print(line, flush=True)
        self.table.append(line)

    def has_time(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.skipped.append(what)
        return False

    def write(self, step: str, row: Row) -> None:
        append_csv(self.args.csv / f"gpu_{step}.csv", [{**row, **self.configuration}])

    def macs(self, saved: Path) -> int:
        """Multiply-adds of a model for one image."""
        if saved not in self.costs:
            self.costs[saved] = models.cost_of(str(saved), (self.args.height, self.args.width)).macs
        return self.costs[saved]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turns(self, calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
        """Milliseconds of each call, which have warmed up before."""
        times: dict[str, list[float]] = {side: [] for side in calls}
        for _ in range(repeats):
            for side, call in calls.items():
                self.wait()
                begin = time.perf_counter()
                call()
                self.wait()
                times[side].append(1e3 * (time.perf_counter() - begin))
        return times

    def peak(self, call: Call, own: int) -> int | None:
        """Warms a call up; its peak in 10^6 bytes, of all weights only its side's (``own`` bytes)."""
        if self.device.type != "cuda":
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        others = torch.cuda.memory_allocated(self.device) - own
        for _ in range(WARM_UP):
            call()
        self.wait()
        return round((torch.cuda.max_memory_allocated(self.device) - others) / 1e6)


def main() -> None:
    args = parse_arguments()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    args.csv.mkdir(parents=True, exist_ok=True)
    failed = False
    tested = "tests" in args.steps and args.device != "cpu"
    if tested:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        failed = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode != 0
    bench = Bench(args)
    bench.say(f"pytest -m gpu: {'FAILED' if failed else 'passed' if tested else 'not run'}")
    steps = {"operator": operator, "training": training, "kernels": kernels, "images": images}
    with tempfile.TemporaryDirectory() as folder:
        for step in args.steps:
            if step == "models":
                forward_passes(bench, Path(folder))
            elif step in steps:
                steps[step](bench, Path(folder))
    print("\n" + "\n".join(bench.table))
    if bench.skipped:
        print(f"no time was left for: {', '.join(bench.skipped)}")
    sys.exit(failed or bench.failed)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compile", nargs="*", choices=MODELS, default=["detr-resnet-50"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", default="800x1066", help="height x width in pixels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--photos", type=int, default=256, help="files of the step images")
    parser.add_argument("--training-batch", type=int, default=4)
    parser.add_argument("--kernels-shown", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=500, help="no measurement begins later")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    args.height, args.width = parse_size(args.size)
    return args


def operator(bench: Bench, _: Path) -> None:
    """Deformable attention alone: how wrong it is, and how long it takes, by case, type and pass."""
    args = bench.args
    for dtype in args.dtypes:
        for case in deformable_attention.CASES if args.device != "cpu" else ["small-decoder"]:
            if not bench.has_time(f"operator {case} {dtype}"):
                continue
            options = argparse.Namespace(device=args.device, dtype=dtype, repeats=args.repeats)
            for row in deformable_attention.measure(case, options):
                bench.write("operator", {**row, "device": args.device, "dtype": dtype})
                bench.say(
                    f"operator {case:13} {row['pass']:16} {dtype:8} {row['detrkit_ms']:7.3f} ms, "
                    f"Transformers {row['transformers_ms']:7.3f} ms: {row['ratio']:5.2f}x, "
                    f"errors {row['error']:.0e}, {row['transformers_error']:.0e}"
                )


def forward_passes(bench: Bench, folder: Path) -> None:
    """Every model in each type and batch; the types and batches that matter most come first."""
    args = bench.args
    for dtype in args.dtypes:
        for name in args.models:
            if bench.has_time(f"{name} {dtype}"):
                saved = saved_model(name, folder)
                compiled = name in args.compile and dtype == "bfloat16"
                try:
                    forward_pass(bench, name, saved, dtype, compiled)
                except RuntimeError as error:  # one side that cannot run must not cost the other models
                    bench.failed |= not isinstance(error, torch.OutOfMemoryError)
                    bench.say(f"{name} {dtype}: failed ({first_line(error)})")
                if bench.device.type == "cuda":
                    torch.cuda.empty_cache()


def forward_pass(bench: Bench, name: str, saved: Path, dtype: str, compiled: bool) -> None:
    args = bench.args
    detector = detrkit.Detector.from_pretrained(saved, device=args.device, dtype=dtype)
    theirs = load_transformers(saved).eval().to(bench.device, getattr(torch, dtype))
    sides: dict[str, Callable[[Tensor], Any]] = {
        "detrkit": runner(detector, args),
        "transformers": lambda pixels: theirs(pixel_values=pixels),
    }
    if compiled and bench.has_time(f"{name} compiled"):
        fast = torch.compile(load_transformers(saved).eval().to(bench.device, getattr(torch, dtype)))
        ours = detrkit.Detector.from_pretrained(saved, engine="compile", device=args.device, dtype=dtype)
        sides["detrkit compile"] = runner(ours, args)
        sides["transformers compile"] = lambda pixels: fast(pixel_values=pixels)
    own = {"detrkit": bytes_of(detector.model), "transformers": bytes_of(theirs)}
    macs = bench.macs(saved)
    for batch in args.batches:
        pixels = make_pixels(args, batch).to(bench.device, getattr(torch, dtype))
        wanted = {side: run for side, run in sides.items() if batch == 1 or "compile" not in side}
        with torch.inference_mode():
            calls = {side: partial(run, pixels) for side, run in wanted.items()}
            peaks = {side: bench.peak(call, own.get(side, 0)) for side, call in calls.items()}
            difference = largest_difference(calls)
            times = bench.in_turns(calls, args.repeats)
        base = statistics.median(times["transformers"])
        for side, values in times.items():
            median = statistics.median(values)
            share = 2 * macs * batch / (bench.rates[dtype] * 1e9) / (median / 1e3)
            row = {
                "model": name,
                "side": side,
                "dtype": dtype,
                "batch": batch,
                "height": args.height,
                "width": args.width,
                "median_ms": round(median, 3),
                "lowest_ms": round(min(values), 3),
                "highest_ms": round(max(values), 3),
                "images_per_s": round(1e3 * batch / median, 1),
                "ratio": round(base / median, 2),
                "share_of_limit": round(share, 3),
                "peak_mb": peaks[side] if side in own else None,
                "largest_difference": f"{difference:.1e}",
                "repeats": args.repeats,
            }
            bench.write("models", row)
            bench.say(
                f"{name:42} {dtype:8} batch {batch} {side:20} {median:8.2f} ms {row['images_per_s']:7.1f}/s "
                f"{row['ratio']:5.2f}x  {share:4.0%} of the limit  {row['peak_mb']} MB  {difference:.0e}"
            )


def runner(detector: detrkit.Detector, args: argparse.Namespace) -> Callable[[Tensor], Any]:
    """What a detector runs for a batch: the model or, with masks, those of the ten best queries."""
    if not detector.has_masks:
        return lambda pixels: detector.model(pixel_values=pixels)
    pixels = make_pixels(args, 1).to(next(detector.model.parameters()))
    with torch.inference_mode():
        logits = detector.model.detector(pixel_values=pixels).logits.float()
    scores = detector.model.object_scores(logits)[0].sort(descending=True).values
    threshold = float(scores[models.SURVIVORS - 1 : models.SURVIVORS + 1].mean())
    return lambda pixels: detector.model.segment(pixels, threshold=threshold)


def largest_difference(calls: dict[str, Call]) -> float:
    """Of the sigmoids of two sides' logits; where masks are asked for, of none."""
    logits = [calls[side]().logits.float().sigmoid() for side in ("detrkit", "transformers")]
    if logits[0].shape != logits[1].shape:
        return float("nan")
    return (logits[0] - logits[1]).abs().max().item()


def kernels(bench: Bench, folder: Path) -> None:
    """The kernels that take most of the time of a forward pass in bfloat16 at batch 1."""
    if bench.device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    runs = 10
    for name in ("detr-resnet-50", "deformable-detr"):
        if not bench.has_time(f"kernels of {name}"):
            continue
        detector = detrkit.Detector.from_pretrained(saved_model(name, folder), dtype="bfloat16")
        pixels = make_pixels(bench.args, 1).to(bench.device, torch.bfloat16)
        with torch.inference_mode():
            for _ in range(WARM_UP):
                detector.model(pixel_values=pixels)
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                for _ in range(runs):
                    detector.model(pixel_values=pixels)
                bench.wait()
        events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events) / runs
        launches = sum(event.count for event in events) // runs
        bench.say(f"kernels of {name}: {total:.0f} us, {launches} launches")
        for rank, event in enumerate(events[:40]):
            microseconds = event.self_device_time_total / runs
            row = {"model": name, "kernel": event.key[:200], "calls": event.count / runs}
            bench.write("kernels", {**row, "microseconds": round(microseconds, 1)})
            if rank < bench.args.kernels_shown:
                bench.say(f"  {microseconds:7.1f} us {event.count / runs:5.0f} x {event.key[:90]}")


def images(bench: Bench, folder: Path) -> None:
    """Photos in files through the whole of each library, DETR R50 in the first of the types."""
    args = bench.args
    photos = make_photos(folder / "photos", args.photos)
    saved = saved_model("detr-resnet-50", folder)
    for batch in args.batches:
        if not bench.has_time(f"images, batch {batch}"):
            continue
        sides = pipelines(bench, saved, photos, batch)
        for call in sides.values():
            call()
        times = bench.in_turns(sides, 2)
        base = statistics.median(times["transformers"])
        for side, values in times.items():
            median = statistics.median(values)
            rate = 1e3 * len(photos) / median
            row = {"model": "detr-resnet-50", "side": side, "dtype": args.dtypes[0], "batch": batch}
            row |= {"images": len(photos), "images_per_s": round(rate, 1), "ratio": round(base / median, 2)}
            bench.write("images", row)
            bench.say(f"photos, batch {batch} {side:14} {rate:7.1f} images/s {base / median:5.2f}x")


def pipelines(bench: Bench, saved: Path, photos: list[Path], batch: int) -> dict[str, Call]:
    detector = detrkit.Detector.from_pretrained(saved, device=bench.args.device, dtype=bench.args.dtypes[0])
    theirs = transformers.pipeline(
        "object-detection",
        model=load_transformers(saved).to(getattr(torch, bench.args.dtypes[0])),
        image_processor=transformers.AutoImageProcessor.from_pretrained(saved),
        device=bench.args.device,
    )
    return {
        "detrkit": lambda: list(detector.stream(photos, 0.5, batch)),
        "transformers": lambda: list(theirs((str(p) for p in photos), threshold=0.5, batch_size=batch)),
    }


def make_photos(folder: Path, count: int) -> list[Path]:
    """JPEG files of 640x480 whose neighbouring pixels are alike, so that decoding costs what photos do."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        small = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        noise = random.integers(-12, 13, (480, 640, 3))
        photo = np.clip(np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)) + noise, 0, 255)
        Image.fromarray(photo.astype(np.uint8)).save(path, quality=92)
    return paths


def training(bench: Bench, folder: Path) -> None:
    """Steps with forward and backward pass, losses of all decoder layers, and AdamW."""
    args = bench.args
    for dtype in [name for name in args.dtypes if name != "float16"]:
        for name in ("detr-resnet-50", "deformable-detr"):
            if not bench.has_time(f"training {name} {dtype}"):
                continue
            saved = saved_model(name, folder)
            sides, own = {}, {}
            for side, load in (("detrkit", load_detrkit), ("transformers", load_transformers)):
                model = load(saved, auxiliary_loss=True).to(bench.device).train()
                sides[side] = training_step(bench, model, dtype)
                own[side] = bytes_of(model)
            peaks = {side: bench.peak(call, 4 * own[side]) for side, call in sides.items()}
            times = bench.in_turns(sides, args.repeats)
            base = statistics.median(times["transformers"])
            for side, values in times.items():
                median = statistics.median(values)
                row = {"model": name, "side": side, "dtype": dtype, "batch": args.training_batch}
                row |= {"height": args.height, "width": args.width, "median_ms": round(median, 1)}
                row |= {"lowest_ms": round(min(values), 1), "highest_ms": round(max(values), 1)}
                row |= {"ratio": round(base / median, 2), "peak_mb": peaks[side]}
                bench.write("training", row)
                bench.say(
                    f"training {name:17} {dtype:8} batch {args.training_batch} {side:14} {median:7.1f} ms "
                    f"{base / median:5.2f}x  {row['peak_mb']} MB"
                )
            del sides, model
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def training_step(bench: Bench, model: nn.Module, dtype: str) -> Call:
    """A step as both Trainers make it: mixed precision but for float32, fused AdamW, clipped gradients."""
    args = bench.args
    freeze_stem(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=bench.device.type == "cuda")
    pixels = make_pixels(args, args.training_batch).to(bench.device)
    mask = torch.ones(args.training_batch, args.height, args.width, dtype=torch.int64, device=bench.device)
    mask[1:, :, -args.width // 8 :] = 0  # images of a batch differ in size
    generator = torch.Generator().manual_seed(0)
    labels = [
        {
            "class_labels": torch.randint(model.config.num_labels, (OBJECTS,), generator=generator),
            "boxes": torch.rand(OBJECTS, 4, generator=generator) * 0.4 + 0.2,
        }
        for _ in range(args.training_batch)
    ]
    labels = tree_map_only(Tensor, lambda x: x.to(bench.device), labels)

    def step() -> None:
        with torch.autocast(bench.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(pixel_values=pixels, pixel_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def freeze_stem(model: nn.Module) -> None:
    """Trains the same parameters on both sides: Transformers' classes leave a ResNet's stem free."""
    for name, parameter in model.named_parameters():
        if "backbone" in name and not any(f"layer{stage}" in name for stage in (2, 3, 4)):
            parameter.requires_grad_(False)


def saved_model(name: str, folder: Path) -> Path:
    """A folder with random weights of a released architecture, written once."""
    if not (folder / name).exists():
        models.save_random(name, folder / name)
    return folder / name


def load_transformers(saved: Path, **changes: Any) -> nn.Module:
    return getattr(transformers, read_model_files(str(saved)).model_class).from_pretrained(saved, **changes)


def load_detrkit(saved: Path, **changes: Any) -> nn.Module:
    return getattr(detrkit, read_model_files(str(saved)).model_class).from_pretrained(saved, **changes)


def make_pixels(args: argparse.Namespace, batch: int) -> Tensor:
    return torch.randn(batch, 3, args.height, args.width, generator=torch.Generator().manual_seed(0))


def bytes_of(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


if __name__ == "__main__":
    main()
