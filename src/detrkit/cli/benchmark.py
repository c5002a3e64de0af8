"""``detrkit benchmark``: the speed of a model on this machine, compared with the machine's limit."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli import options
from detrkit.common.errors import DetrkitError, SettingError
from detrkit.common.outputs import Output, check_outputs
from detrkit.common.terminal import make_table, print_table, quiet_libraries, say

if TYPE_CHECKING:
    from detrkit.benchmark.sides import Settings
    from detrkit.benchmark.turns import Times

# The name of this side in the table.
_TRANSFORMERS = "transformers"
_HEADING = b"model,allocator,side,stage,device,dtype,"


Engines = Annotated[str | None, typer.Option(help="Some of torch,compile,onnx,openvino.  [default: torch]")]
Size = Annotated[str, typer.Option(help="Height x width of the input images in pixels.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images at once.")]
Repeats = Annotated[int, typer.Option(min=1, help="Number of runs; the median is reported.")]
WithTransformers = Annotated[
    bool, typer.Option("--transformers", help="Compare with Transformers, alternating with the engines.")
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Use only the architecture of --model, with random weights."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="[default: OMP_NUM_THREADS, or the number of cores]")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Append the results to this file.")]


def benchmark(
    model: options.Model = "detr-resnet-50",
    engines: Engines = None,
    size: Size = "800x1066",
    batch_size: BatchSize = 1,
    repeats: Repeats = 5,
    transformers: WithTransformers = False,
    random_weights: RandomWeights = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: options.Dtype = "float32",
    threads: Threads = None,
    csv_file: CsvFile = None,
    debug: options.Debug = False,
) -> None:
    """Measure the speed of a model on this machine.

    Each engine runs in its own process, as in `detrkit detect`, and the engines alternate. The table shows
    medians of the model alone (forward) and from image to boxes (end to end). The spread is the difference
    of the slowest and the fastest forward pass, over the median. The share of the limit is the time that the
    model's multiply-adds take in large matrix products, divided by the time of the forward pass. For
    reliable numbers, run nothing else on the machine: a warning says what disturbed the measurement.
    """
    from detrkit.checkpoints.identity import model_files
    from detrkit.checkpoints.registry import resolve_model

    height, width = parse_size(size)
    chosen = _parse_engines(engines)
    name = model if random_weights else resolve_model(model)
    if csv_file is not None:  # rows are added, so the mark is the heading
        check_outputs([Output("--csv", csv_file, _HEADING)], model_files(model), overwrite=False)
    if not debug:
        quiet_libraries()
    import torch

    from detrkit.benchmark import machine, models
    from detrkit.benchmark.report import append_csv, make_rows
    from detrkit.benchmark.turns import in_turns

    threads = threads or torch.get_num_threads()
    common: dict[str, Any] = {"height": height, "width": width, "batch": batch_size, "threads": threads}
    common |= {"device": device, "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        if random_weights:
            name = os.path.join(folder, "model")  # noqa: PTH118 - a Hub id is text too
            models.save_random(model, Path(name))
        chosen = _check_engines(name, chosen, device, dtype)
        say("Counting the model's operations and measuring the machine ...")
        cost = models.cost_of(name, (height, width))
        rate = machine.matrix_rate(threads, device, dtype)
        sides = _sides(name, chosen, common, Path(folder), transformers=transformers)
        watch = machine.Watch(threads)
        results = in_turns(sides, repeats)
        others = watch.others()
        rates = (rate, machine.matrix_rate(threads, device, dtype))
        rate = max(rates)

    configuration = machine.columns(threads, device)
    about = {"model": model, "allocator": "as is"}
    reference = _TRANSFORMERS if transformers else None
    settings = next(iter(sides.values()))
    rows = make_rows(
        results, settings, cost, rate, reference=reference, about=about, configuration=configuration
    )
    if csv_file is not None:
        append_csv(csv_file, rows)
    _print_results(rows, transformers)
    say(
        f"{height}x{width}, batch {batch_size}, {dtype}, {configuration['processor']} "
        f"({configuration['cpu_flags']}), {threads} thread{'s' * (threads > 1)}, "
        f"torch {configuration['torch']}; {cost.macs / 1e9:.1f} GMAC an image; "
        f"matrix products {rate:.0f} GFLOP/s."
    )
    spread = max((spread_of(row) for row in rows), default=0.0)
    if disturbed := machine.disturbances(others, threads, rates, spread):
        say(f"Warning: do not rely on these numbers: {'; '.join(disturbed)}. Measure on a quiet machine.")
    _check_results(results, dtype)


def _parse_engines(text: str | None) -> list[str]:
    """The engines of a comma-separated list; none for None."""
    from detrkit.engines import check_engine

    engines = [name.strip() for name in text.split(",")] if text else []
    for name in engines:
        check_engine(name)
    return engines


def _check_engines(name: str, chosen: Sequence[str], device: str, dtype: str) -> list[str]:
    """The engines to measure, after checking that each runs on the device."""
    from detrkit.checkpoints.loading import manifest_of
    from detrkit.engines.placement import place

    manifest = manifest_of(name)
    engines = list(dict.fromkeys(chosen)) or [manifest.engine if manifest else "torch"]
    for engine in engines:
        place(engine, device, dtype)
    return engines


def _sides(
    name: str, engines: Sequence[str], common: dict[str, Any], folder: Path, *, transformers: bool
) -> dict[str, Settings]:
    """The settings of each engine, and of Transformers; models are exported into a folder if necessary."""
    from detrkit.benchmark import models
    from detrkit.benchmark.sides import Settings
    from detrkit.checkpoints.loading import manifest_of
    from detrkit.engines.names import EXPORTED_ENGINES

    exported = manifest_of(name) is not None
    threshold = 0.0 if exported else models.threshold_of(name, {**common, "maker": "", "model": ""})
    sides = {}
    for engine in engines:
        source = name
        if engine in EXPORTED_ENGINES and not exported:
            say(f"Exporting for {engine} ...")
            source = str(folder / engine)
            models.export(name, engine, Path(source))
        maker = "detrkit.benchmark.sides:detrkit_side"
        sides[engine] = Settings(maker=maker, model=source, engine=engine, threshold=threshold, **common)
    if transformers:
        maker = "detrkit.benchmark.sides:transformers_side"
        sides[_TRANSFORMERS] = Settings(maker=maker, model=name, threshold=threshold, **common)
    return sides


def _check_results(results: Sequence[Times], dtype: str) -> None:
    """Fails if engines disagree, or if one did not run."""
    from detrkit.benchmark.turns import disagreement

    wrong = disagreement(results)
    if wrong and dtype == "float32":
        raise DetrkitError("; ".join(f"{name} {said}" for name, said in wrong.items()))
    failed = [result for result in results if result.failure]
    for result in failed:
        say(f"{result.name} failed: {result.failure}")
    if failed:
        raise typer.Exit(1)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of a size such as "800x1066".

    Raises:
        SettingError: ``text`` is not a size.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", part) for part in parts):
        raise SettingError(f"--size must be height x width in pixels, such as 800x1066, not {text!r}")
    return int(parts[0]), int(parts[1])


def spread_of(row: Mapping[str, Any]) -> float:
    """(slowest - fastest) / median of a row's runs; 0 without any."""
    if not row.get("median_s"):
        return 0.0
    spread: float = (row["slowest_s"] - row["fastest_s"]) / row["median_s"]
    return spread


def _print_results(rows: Sequence[Mapping[str, Any]], compared: bool) -> None:
    headings = ["forward s", "spread", "end to end s", "images/s", "peak MB", "share of limit"]
    if compared:
        headings += ["forward ratio", "end to end ratio"]
    table = make_table(["engine"], headings)
    for side in dict.fromkeys(row["side"] for row in rows):
        stages = {row["stage"]: row for row in rows if row["side"] == side}
        forward, whole = stages.get("forward", {}), stages.get("end to end", {})
        cells = [
            _number(forward.get("median_s"), 3),
            f"{spread_of(forward):.0%}",
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
