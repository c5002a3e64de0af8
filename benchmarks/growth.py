"""How time and memory grow with the image's side, the batch and the number of queries: a table and a chart.

    python benchmarks/growth.py                             # DETR and Deformable DETR beside Transformers
    python benchmarks/growth.py --models detr-resnet-50 --axes side --sides torch
    python benchmarks/growth.py --chart-only                      # draws benchmarks/results/growth.csv again

One axis is varied, the others stay at side 640, batch 1 and the model's own queries; images are square. The
forward pass is measured, each side in a process of its own, in turns. The CSV file has the columns of
``engines.py`` with ``axis`` and ``value`` after the model.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detrkit.benchmark import machine, models
from detrkit.benchmark.report import append_csv, make_rows
from detrkit.benchmark.sides import Settings
from detrkit.benchmark.turns import in_turns
from detrkit.checkpoints.registry import REGISTRY
from detrkit.common.files import atomic_file
from detrkit.common.terminal import quiet_libraries
from engines import RESULTS, print_rows, say

SIDE = 640
AXES = {"side": [320, 480, 640, 800, 1120], "batch": [1, 2, 4, 8], "queries": [100, 300, 900]}
TITLES = {"side": "side of the image, pixels", "batch": "images in a batch", "queries": "object queries"}


def main() -> None:
    args = parse_arguments()
    quiet_libraries()
    if not args.chart_only:
        for model in args.models:
            for axis in args.axes:
                for value in getattr(args, f"{axis}_values"):
                    measure(model, axis, value, args)
    draw(args.csv, args.csv.with_suffix(".png"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=REGISTRY, default=["detr-resnet-50", "deformable-detr"]
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}-values", nargs="+", type=int, default=values)
    parser.add_argument(
        "--sides", nargs="+", choices=["torch", "compile", "transformers"], default=["torch", "transformers"]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS / "growth.csv", help="add the rows to this file")
    parser.add_argument("--chart-only", action="store_true")
    return parser.parse_args()


def measure(model: str, axis: str, value: int, args: argparse.Namespace) -> None:
    side = value if axis == "side" else SIDE
    batch = value if axis == "batch" else 1
    with tempfile.TemporaryDirectory() as folder:
        changes = queries_option(model, value) if axis == "queries" else {}
        models.save_random(model, Path(folder), **changes)
        common = {"height": side, "width": side, "batch": batch, "threads": args.threads, "threshold": 0.0}
        sides = {}
        for name in args.sides:
            maker = "transformers_side" if name == "transformers" else "detrkit_side"
            engine = "torch" if name == "transformers" else name
            sides[name] = Settings(
                maker=f"detrkit.benchmark.sides:{maker}", model=folder, engine=engine, **common
            )
        say(f"== {model}, {axis} {value}")
        results = in_turns(sides, args.repeats, stages=["forward"], report=say)
        rows = make_rows(
            results,
            sides[args.sides[0]],
            models.cost_of(folder, (side, side)),
            machine.matrix_rate(args.threads),
            reference="transformers",
            about={"model": model, "axis": axis, "value": value, "allocator": "as is"},
            configuration=machine.columns(args.threads),
        )
    append_csv(args.csv, rows)
    print_rows(rows)


def queries_option(model: str, value: int) -> dict[str, int]:
    name = "two_stage_num_proposals" if REGISTRY[model].two_stage else "num_queries"
    return {name: value}


def draw(table: Path, chart: Path) -> None:
    """One panel an axis for each of time and memory; a line for each model and side."""
    from matplotlib import pyplot

    with table.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["median_s"]]
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = pyplot.subplots(2, len(axes), figsize=(4.5 * len(axes), 7), squeeze=False)
    for column, axis in enumerate(axes):
        for panel, name, title in zip(
            panels[:, column], ("median_s", "peak_mb"), ("seconds, forward", "peak memory, MB")
        ):
            for (model, side), line in lines(rows, axis, name).items():
                style = "--" if side == "transformers" else "-"
                panel.plot(*zip(*line), style, marker="o", label=f"{model}, {side}")
            panel.set_xlabel(TITLES[axis])
            panel.set_ylabel(title)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.tight_layout()
    with atomic_file(chart) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    say(f"drew {chart}")


def lines(
    rows: Sequence[dict[str, str]], axis: str, column: str
) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Model and side -> points, the last measurement of each counting."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["axis"] == axis and row[column]:
            found.setdefault((row["model"], row["side"]), {})[int(row["value"])] = float(row[column])
    return {key: sorted(points.items()) for key, points in found.items()}


if __name__ == "__main__":
    main()
