"""Every way to run a model, side by side: detrkit's engines and what Transformers offers, on this machine.

Each side runs in a process of its own, as its user would run it, and the sides take turns (A B C A B C ...),
so that a change of the machine's speed meets all. With the allocator *as is*, detrkit's Detector sets it and
the others have the default; *tuned*, the environment sets it for all that PyTorch runs.

    python benchmarks/engines.py                                            # detr-resnet-50, everything
    python benchmarks/engines.py --models detr-resnet-101 deformable-detr --sides torch transformers
    python benchmarks/engines.py --models detr-resnet-50-panoptic --one-at-a-time --repeats 3

Weights are random but the same on all sides, whose results are compared; those of ``int8`` (OpenVINO, ranges
measured on ``--calibration``) are not, since it rounds. Rows are added to a CSV file as
they come, columns as in ``detrkit.benchmark.report.make_rows``, with ``model`` and ``allocator`` first and
the configuration last. A side that fails, or runs out of memory, leaves a row that says so. Nothing else
should run on the machine meanwhile. Where that cannot be had, ``--cpu-time --threads 1`` counts the seconds
of a processor instead of those that pass; the rows then have a column ``clock``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detrkit.benchmark import machine, models
from detrkit.benchmark.report import append_csv, make_rows
from detrkit.benchmark.sides import STAGES, Settings
from detrkit.benchmark.turns import ALLOCATORS, Times, disagreement, in_turns
from detrkit.checkpoints.registry import REGISTRY
from detrkit.cli.benchmark import parse_size
from detrkit.common.terminal import quiet_libraries
from detrkit.engines.names import ENGINES, EXPORTED_ENGINES
from detrkit.errors import DetrkitError

REFERENCE = "transformers"
INT8 = "int8"
SIDES = (*ENGINES, INT8, REFERENCE, *(f"{REFERENCE}-{engine}" for engine in ("compile", *EXPORTED_ENGINES)))
RESULTS = Path(__file__).parent / "results"
EXAMPLES = Path(__file__).parents[1] / "examples"
# How far sums of outputs may lie apart.
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}


def main() -> None:
    args = parse_arguments(make_parser())
    run(args)


def make_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*REGISTRY, "all"], default=["detr-resnet-50"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--size", default="800x1066", help="height x width in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds; see above")
    parser.add_argument(
        "--calibration", type=Path, default=EXAMPLES, help="folder of pictures that int8 measures ranges on"
    )
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="no turns: one side in memory, where all do not fit"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "engines.csv", help="add the rows to this file")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.height, args.width = parse_size(args.size)
    if "all" in args.models:
        args.models = list(REGISTRY)
    return args


def run(args: argparse.Namespace) -> None:
    quiet_libraries()
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            say(f"== {name}: random weights, arithmetic, this machine's rate")
            models.save_random(name, Path(folder, "model"))
            for batch in args.batches:
                for dtype in args.dtypes:
                    for allocator in args.allocators if args.device == "cpu" else ["as is"]:
                        rows = measure(name, Path(folder), batch, dtype, allocator, args)
                        append_csv(args.csv, rows)
                        print_rows(rows)


def measure(
    name: str, folder: Path, batch: int, dtype: str, allocator: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of a model, batch, type and allocator."""
    source = str(folder / "model")
    common = {"height": args.height, "width": args.width, "batch": batch, "threads": args.threads}
    common |= {"device": args.device, "dtype": dtype, "cpu_time": args.cpu_time}
    cost = models.cost_of(source, (args.height, args.width))
    rate = machine.matrix_rate(args.threads, args.device, dtype, cpu_time=args.cpu_time)
    common["threshold"] = models.threshold_of(source, {**common, "maker": "", "model": ""})

    sides: dict[str, Settings] = {}
    failed: dict[str, Times] = {}
    for side in args.sides:
        maker, _, engine = side.rpartition("-") if side.startswith(f"{REFERENCE}-") else (side, "", "")
        if side in ENGINES:
            maker, engine = "detrkit", side
        elif side == INT8:
            maker, engine = "detrkit", "openvino"
        exported = engine in EXPORTED_ENGINES
        if exported and (allocator != "as is" or args.device != "cpu" or dtype != "float32"):
            continue  # they bring their own allocator
        function = f"detrkit.benchmark.sides:{maker}_side"
        model = source
        if exported:
            try:
                model = export(INT8 if side == INT8 else maker, source, folder, batch, args)
            except DetrkitError as error:
                say(f"{side}: {error}")
                failed[side] = Times(side, failure=str(error)[:300])
                continue
            if maker == REFERENCE:
                function = "transformers_exports:make"
        sides[side] = Settings(maker=function, model=model, engine=engine or "torch", **common)

    say(f"== {name}, batch {batch}, {dtype}, allocator {allocator}: {', '.join(sides)}")
    results = list(failed.values())
    # Where a side of a script is found, and where this process found detrkit.
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**ALLOCATORS[allocator], "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    for group in groups(sides, args.one_at_a_time):
        results += in_turns(group, args.repeats, stages=args.stages, environment=environment, report=say)
    rate = max(rate, machine.matrix_rate(args.threads, args.device, dtype, cpu_time=args.cpu_time))
    wrong = disagreement([r for r in results if r.name != INT8], TOLERANCE[dtype])
    for result in results:
        if result.name in wrong:
            result.failure = result.failure or wrong[result.name]
            say(f"{result.name}: {result.failure}")
    return make_rows(
        sorted(results, key=lambda result: SIDES.index(result.name)),
        Settings(maker="", model=source, **common),
        cost,
        rate,
        reference=REFERENCE,
        about={"model": name, "allocator": allocator} | ({"clock": "processor"} if args.cpu_time else {}),
        configuration=machine.columns(args.threads, args.device),
    )


def groups(sides: dict[str, Settings], one_at_a_time: bool) -> Iterator[dict[str, Settings]]:
    if one_at_a_time:
        yield from ({name: settings} for name, settings in sides.items())
    else:
        yield sides


def export(maker: str, source: str, folder: Path, batch: int, args: argparse.Namespace) -> str:
    """The folder of an exported model, which is written the first time."""
    if maker == INT8:
        target = folder / INT8
        if not target.exists():
            say(f"quantising, on the pictures of {args.calibration}")
            models.export(source, "openvino", target, "--int8", "--calibration", str(args.calibration))
        return str(target)
    if maker == "detrkit":
        target = folder / "onnx"  # which OpenVINO runs too
        if not target.exists():
            say("exporting")
            models.export(source, "onnx", target)
        return str(target)
    target = folder / f"{REFERENCE} {batch}"
    if not (target / "model.onnx").exists():
        say("exporting Transformers' model")
        script = str(Path(__file__).with_name("transformers_exports.py"))
        sizes = map(str, (args.height, args.width, batch))
        done = subprocess.run(
            [sys.executable, script, source, str(target), *sizes], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise DetrkitError("not exported: " + (said[-1] if said else f"status {done.returncode}"))
    return str(target)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["median_s"] is None:
            print(f"{row['model']:28}{row['side']:24}failed: {row['failure']}")
            continue
        share = row["share_of_limit"]
        print(
            f"{row['model']:28}{row['side']:24}{row['allocator']:7}{row['dtype']:9}batch {row['batch']:<3}"
            f"{row['stage']:11}{row['median_s']:9.4f} s{row['images_per_s']:9.2f} images/s"
            + (
                f"{row['ratio']:7.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
                if row["ratio"]
                else ""
            )
            + (f"{share:6.2f} of the limit" if share else "")
            + f"{row['peak_mb'] or 0:8} MB {row['failure']}"
        )


if __name__ == "__main__":
    main()
