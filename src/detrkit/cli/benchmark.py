"""``detrkit benchmark``: how fast a model runs here, beside what the machine could do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from detrkit.cli.options import Debug, Dtype, Model
from detrkit.common.errors import DetrkitError, SettingError
from detrkit.common.terminal import print_table, quiet_libraries, say

# A side's name in the table.
_TRANSFORMERS = "transformers"


def benchmark(
    model: Model = "detr-resnet-50",
    engines: Annotated[
        str | None, typer.Option(help="Some of torch,compile,onnx,openvino.  [default: torch]")
    ] = None,
    size: Annotated[str, typer.Option(help="Height x width of an image as the model sees it.")] = "800x1066",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 5,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Compare with Transformers, in turns with each engine.")
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Take only the architecture of a name from: detrkit models."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Dtype = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="[default: as many as there are cores]")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Add the rows to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how fast a model runs on this machine.

    Each engine runs in a process of its own, as in `detrkit detect`, and they take turns. The table has
    medians of the model alone (forward) and from pictures to boxes (end to end), and the share of the limit:
    the time that the model's multiply-adds take in large matrix products here, divided by the time of the
    forward pass. Nothing else should run on the machine meanwhile.
    """
    from detrkit.checkpoints.registry import resolve_model
    from detrkit.engines import check_engine
    from detrkit.engines.names import EXPORTED_ENGINES

    height, width = parse_size(size)
    chosen = [name.strip() for name in engines.split(",")] if engines else None
    for name in chosen or ():
        check_engine(name)
    name = model if random_weights else resolve_model(model)
    if csv_file is not None and csv_file.is_dir():
        raise DetrkitError(f"--csv needs a file, but {csv_file} is a folder")
    if not debug:
        quiet_libraries()
    from detrkit.benchmark import machine, models
    from detrkit.benchmark.report import append_csv, make_rows
    from detrkit.benchmark.sides import Settings
    from detrkit.benchmark.turns import disagreement, in_turns
    from detrkit.checkpoints.loading import manifest_of
    from detrkit.engines.placement import place

    threads = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        if random_weights:
            name = os.path.join(folder, "model")  # noqa: PTH118 - a Hub id is text too
            models.save_random(model, Path(name))
        manifest = manifest_of(name)
        runs_on = manifest.engine if manifest else None
        chosen = chosen or [runs_on or "torch"]
        for engine in chosen:
            place(engine, device, dtype)
        common: dict[str, Any] = {"height": height, "width": width, "batch": batch_size, "threads": threads}
        common |= {"device": device, "dtype": dtype}
        say("Counting the model's arithmetic and measuring the machine's ...")
        cost = models.cost_of(name, (height, width))
        rate = machine.matrix_rate(threads, device, dtype)
        common["threshold"] = (
            0.0 if runs_on else models.threshold_of(name, {**common, "maker": "", "model": ""})
        )

        sides = {}
        for engine in dict.fromkeys(chosen):
            source = name
            if engine in EXPORTED_ENGINES and runs_on is None:
                say(f"Exporting for {engine} ...")
                source = os.path.join(folder, engine)  # noqa: PTH118
                models.export(name, engine, Path(source))
            maker = "detrkit.benchmark.sides:detrkit_side"
            sides[engine] = Settings(maker=maker, model=source, engine=engine, **common)
        if transformers:
            maker = "detrkit.benchmark.sides:transformers_side"
            sides[_TRANSFORMERS] = Settings(maker=maker, model=name, **common)
        results = in_turns(sides, repeats)
        rate = max(rate, machine.matrix_rate(threads, device, dtype))

    configuration = machine.columns(threads, device)
    reference = _TRANSFORMERS if transformers else None
    settings = next(iter(sides.values()))
    rows = make_rows(
        results,
        settings,
        cost,
        rate,
        reference=reference,
        about={"model": model, "allocator": "as is"},
        configuration=configuration,
    )
    if csv_file is not None:
        append_csv(csv_file, rows)
    _print_results(rows, reference is not None)
    say(
        f"{height}x{width}, batch {batch_size}, {dtype}, {configuration['processor']}, {threads} threads; "
        f"{cost.macs / 1e9:.1f} GMAC an image; matrix products {rate:.0f} GFLOP/s."
    )
    wrong = disagreement(results)
    if wrong and dtype == "float32":
        raise DetrkitError("; ".join(f"{name} {said}" for name, said in wrong.items()))
    failed = [result for result in results if result.failure]
    for result in failed:
        say(f"{result.name} failed: {result.failure}")
    if failed:
        raise typer.Exit(1)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "800x1066".

    Raises:
        SettingError: It is none.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise SettingError(f"--size must be height x width in pixels, such as 800x1066, not {text!r}")
    return int(parts[0]), int(parts[1])


def _print_results(rows: Sequence[Mapping[str, Any]], compared: bool) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("engine")
    headings = ["forward s", "end to end s", "images/s", "peak MB", "share of limit"]
    if compared:
        headings += ["forward ratio", "end to end ratio"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for side in dict.fromkeys(row["side"] for row in rows):
        stages = {row["stage"]: row for row in rows if row["side"] == side}
        forward, whole = stages.get("forward", {}), stages.get("end to end", {})
        cells = [
            _number(forward.get("median_s"), 3),
            _number(whole.get("median_s"), 3),
            _number(whole.get("images_per_s"), 2),
            _number(next(iter(stages.values()))["peak_mb"], 0),
            _number(forward.get("share_of_limit"), 2),
        ]
        if compared:
            cells += [_number(stage.get("ratio"), 2) for stage in (forward, whole)]
        table.add_row(side, *cells)
    print_table(table)


def _number(value: float | None, decimals: int) -> str:
    return "failed" if value is None else f"{value:.{decimals}f}"
