"""The measured numbers of README and documentation are those of the files in the repository.

Every table of README.md and docs/performance.md that has measurements is in TABLES, by its heading, with the
source of each of its columns. A new table has to be entered here.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]

MODELS = {
    "DETR R50": "detr-resnet-50",
    "DETR R101": "detr-resnet-101",
    "DETR R50-DC5": "detr-resnet-50-dc5",
    "DETR R50 panoptic": "detr-resnet-50-panoptic",
    "Conditional DETR R50": "conditional-detr-resnet-50",
    "Deformable DETR": "deformable-detr",
    "Deformable DETR, single scale": "deformable-detr-single-scale",
    "Deformable DETR, two-stage": "deformable-detr-with-box-refine-two-stage",
}


def rows_of(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


ENGINES, HALF, GPU, TRAINING = map(rows_of, ("engines", "bfloat16", "gpu_models", "gpu_training"))
KINDS, THROUGHPUT, PROCESSOR = map(rows_of, ("time_by_kind", "throughput", "processor_seconds"))


def values(rows: list[Row], column: str, factor: float = 1, **wanted: object) -> list[float]:
    """The values of a column, in the rows that have the wanted values in others."""
    found = [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]
    return [factor * float(row[column]) for row in found if row[column]]


def agrees(text: str, measured: list[float]) -> bool:
    """Whether a printed number is one of the measured ones, rounded as it is printed."""
    text = text.replace(",", "")
    half_a_digit = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return any(abs(float(text) - value) <= half_a_digit * 1.02 for value in measured)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Heading -> rows of cells of the tables that have numbers."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
        heading, _, *lines = block.strip().split("\n")
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if any(re.search(r"\d", cell) for row in cells for cell in row[1:]):
            found[heading] = cells
    return found


def engine(row: list[str]) -> tuple[str, str, str]:
    """Model, side and stage of a row of the tables on a CPU."""
    name, _, rest = row[0].partition(", image to")
    name, _, int8 = name.partition(", int8")
    return MODELS[name], "int8" if int8 else "torch", "end to end" if rest else "forward"


def on_a_cpu(row: list[str], source: list[Row] = ENGINES) -> list[tuple[str, list[float]]]:
    """The numbers of a row of the tables on a CPU, each with what was measured."""
    model, side, stage = engine(row)
    plain = {"model": model, "stage": stage, "allocator": "as is"}
    tuned = {"model": model, "stage": stage, "allocator": "tuned", "side": side}
    measured = [
        values(source, "median_s", **plain, side=side),
        values(source, "median_s", **plain, side="transformers"),
        values(source, "ratio", **plain, side=side),
        values(source, "ratio", **tuned),
        values(source, "share_of_limit", 100, **plain, side=side),
    ]
    pairs = []
    for cell, known in zip(row[1:], measured):
        first, *spread = re.findall(r"[\d.]+", cell) or [""]
        pairs += [(first, known)] if first else []
        limits = (values(source, f"ratio_{end}", **plain, side=side) for end in ("low", "high"))
        pairs += zip(spread, limits)
    return pairs


def in_half_precision(row: list[str]) -> list[tuple[str, list[float]]]:
    times = [values(HALF, "median_s", model=MODELS[row[0]], dtype=t) for t in ("float32", "bfloat16")]
    numbers = [re.findall(r"[\d.]+", cell)[0] for cell in row[1:]]
    return list(zip(numbers, [*times, [times[0][0] / times[1][0]]]))


def shares(row: list[str]) -> list[tuple[str, list[float]]]:
    sides = ("torch", "compile", "onnx", "openvino", "transformers")
    known = {"model": MODELS[row[0]], "allocator": "as is"}
    return [
        (cell.removesuffix(" %"), values(ENGINES, "share_of_limit", 100, **known, side=side))
        for cell, side in zip(row[1:], sides)
        if cell
    ]


def on_a_gpu(row: list[str]) -> list[tuple[str, list[float]]]:
    known = {"model": MODELS[row[0]], "batch": row[1]}

    def of(dtype: str, column: str, side: str = "detrkit") -> list[float]:
        return values(GPU, column, **known, dtype=dtype, side=side)

    ours, theirs = re.findall(r"[\d,]+", row[5])
    pairs = [
        (row[2].split()[0], of("bfloat16", "median_ms")),
        (row[3].split()[0], of("bfloat16", "median_ms", "transformers")),
        (row[4], of("bfloat16", "ratio")),
        (ours, of("bfloat16", "peak_mb")),
        (theirs, of("bfloat16", "peak_mb", "transformers")),
    ]
    for cell, dtype in zip(row[6:], ("float16", "float32")):
        numbers = re.findall(r"[\d.]+", cell)
        pairs += zip(numbers, (of(dtype, "median_ms"), of(dtype, "ratio")))
    return pairs


def training_on_a_gpu(row: list[str]) -> list[tuple[str, list[float]]]:
    known = {"model": MODELS[row[0]], "dtype": row[1]}
    memory = re.findall(r"[\d.]+", row[5])
    return [
        (row[2].split()[0], values(TRAINING, "median_ms", **known, side="detrkit")),
        (row[3].split()[0], values(TRAINING, "median_ms", **known, side="transformers")),
        (row[4], values(TRAINING, "ratio", **known, side="detrkit")),
        (memory[0], values(TRAINING, "peak_mb", 1e-3, **known, side="detrkit")),
        (memory[1], values(TRAINING, "peak_mb", 1e-3, **known, side="transformers")),
    ]


def training_on_a_cpu(row: list[str]) -> list[tuple[str, list[float]]]:
    with (ROOT / "benchmarks" / "training_run.csv").open(newline="") as file:
        seconds = [float(line[f"{row[0].lower()} seconds"]) for line in csv.DictReader(file)]
    return [(row[1], [statistics.median(seconds)])]  # the AP is printed by the script and not in the file


def kinds(row: list[str]) -> list[tuple[str, list[float]]]:
    name, _, side = row[0].rpartition(", ")
    columns = (
        *("matrix product", "convolution", "attention", "deformable attention", "elementwise"),
        *("gather and copy", "norm"),
    )
    (line,) = (r for r in KINDS if (r["model"], r["side"]) == (MODELS[name], side))
    total = sum(float(line[c]) for c in (*columns, "pooling, resizing", "compiled", "other"))
    return [
        (cell.removesuffix(" %"), [100 * float(line[column]) / total])
        for cell, column in zip(row[1:], columns)
        if cell
    ]


Numbers = Callable[[list[str]], list[tuple[str, list[float]]]]
CPU = "| | detrkit | Transformers | ratio | both with a tuned allocator |"
TABLES: dict[str, Numbers] = {
    CPU: on_a_cpu,
    "| | detrkit | Transformers | ratio | both tuned | of the limit |": on_a_cpu,
    "| processor seconds | detrkit | Transformers | ratio | both tuned | of the limit |": partial(
        on_a_cpu, source=PROCESSOR
    ),
    "| | float32 | bfloat16 | |": in_half_precision,
    "| | torch | compile | onnx | openvino | Transformers |": shares,
    "| | matrix products | convolutions | attention | sampling: gathered sums | element by element | copies "
    "| norms |": kinds,
    "| | batch | bfloat16 | Transformers | ratio | peak memory in bfloat16 | float16 | float32 |": on_a_gpu,
    "| | precision | detrkit | Transformers | ratio | peak memory |": training_on_a_gpu,
    "| | median s per step | AP after 300 steps |": training_on_a_cpu,
}
WITHOUT_MEASUREMENTS = {"| | |"}  # lists of settings
PAGES = ("README.md", "docs/performance.md")


def test_every_table_of_measurements_is_looked_at() -> None:
    found = {heading for page in PAGES for heading in tables(page)}
    assert found - WITHOUT_MEASUREMENTS == TABLES.keys()


@pytest.mark.parametrize(
    ("page", "heading"), [(page, heading) for page in PAGES for heading in tables(page) if heading in TABLES]
)
def test_numbers_in_tables_are_those_of_the_files(page: str, heading: str) -> None:
    looked_at = 0
    for row in tables(page)[heading]:
        for text, measured in TABLES[heading](row):
            assert agrees(text, measured), f"{page}: {row[0]}: {text}, measured {measured}"
            looked_at += 1
    assert looked_at >= 2


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_numbers_that_a_page_begins_with_are_those_of_the_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    cpu = {"model": "detr-resnet-50", "allocator": "as is", "stage": "forward"}
    gpu = {"model": "detr-resnet-50", "batch": 1, "dtype": "bfloat16"}
    whole = {"model": "detr-resnet-50-panoptic", "stage": "end to end"}
    expected = {
        r"\*\*([\d.]+) times as fast on a CPU": values(ENGINES, "ratio", **cpu, side="torch"),
        r"CPU:\*\* DETR R50 in ([\d.]+) s": values(ENGINES, "median_s", **cpu, side="torch"),
        r"instead of ([\d.]+) s \(float32": values(ENGINES, "median_s", **cpu, side="transformers"),
        r"both sides it is ([\d.]+) times": values(
            ENGINES, "ratio", **{**cpu, "allocator": "tuned"}, side="torch"
        ),
        r"\*\*([\d.]+) times as fast on a GPU": values(GPU, "ratio", **gpu, side="detrkit"),
        r"DETR R50 in ([\d.]+) ms": values(GPU, "median_ms", **gpu, side="detrkit"),
        r"instead of ([\d.]+) ms": values(GPU, "median_ms", **gpu, side="transformers"),
        r"\*\*([\d.]+) times as fast in panoptic": values(ENGINES, "ratio", **whole, side="torch"),
        r"ten segments in ([\d.]+) s": values(ENGINES, "median_s", **whole, side="torch"),
        r"instead of ([\d.]+) s\s+\(the same CPU": values(ENGINES, "median_s", **whole, side="transformers"),
    }
    for pattern, measured in expected.items():
        found = re.search(pattern, text)
        assert found, pattern
        assert agrees(found[1], measured), f"{pattern}: {found[1]}, measured {measured}"


def test_throughput_is_that_of_the_file() -> None:
    rate = [values(THROUGHPUT, "images_per_s", program=p) for p in ("detrkit", "pipeline")]
    ratio = values(THROUGHPUT, "ratio", program="detrkit")
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    sentence = r"processes ([\d.]+) images per second and .*?` ([\d.]+), .*?: a factor of ([\d.]+)\."
    found = re.search(sentence, text)
    assert found
    assert all(agrees(number, known) for number, known in zip(found.groups(), (*rate, ratio)))
    jobs = (ROOT / "docs" / "large-jobs.md").read_text(encoding="utf-8")
    found = re.search(r"one worker of 2 cores \| ([\d.]+) \|", jobs)
    assert found
    assert agrees(found[1], rate[0])
    days = re.search(r"10 million images, one worker \| (\d+) days", jobs)
    assert days
    assert agrees(days[1], [1e7 / rate[0][0] / 86_400])


def test_numbers_of_the_bundled_model_are_those_of_its_files() -> None:
    folder = ROOT / "src" / "detrkit" / "pretrained" / "blood-cells"
    boxes = json.loads((folder / "evaluation.json").read_text())["boxes"]
    settings = json.loads((folder / "detection_config.json").read_text())
    ap, ap50, ap75, small = (100 * boxes[name] for name in ("AP", "AP50", "AP75", "APsmall"))
    expected = {
        "docs/performance.md": {
            r"`blood-cells` has ([\d.]+) AP in float32": ap,
            r"evaluate --dtype`; ([\d.]+) and [\d.]+ for small cells": small,
        },
        "docs/export.md": {
            r"BCCD: AP ([\d.]+) in float32": ap,
            r"AP50 ([\d.]+) and": ap50,
            r"AP75 ([\d.]+) and": ap75,
        },
        "docs/thresholds.md": {
            r"without its overlap filter \(AP ([\d.]+)\)": 100 * settings["chosen"]["measured_before"]["AP"],
        },
        "docs/count.md": {r"at threshold ([\d.]+); results": settings["threshold"]},
        "CHANGELOG.md": {r"it has AP ([\d.]+) and": ap, r"and AP50 ([\d.]+) on the validation": ap50},
    }
    for page, patterns in expected.items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for pattern, measured in patterns.items():
            found = re.search(pattern, text)
            assert found, f"{page}: {pattern}"
            assert agrees(found[1], [measured]), f"{page}: {pattern}: {found[1]}, measured {measured}"


def test_a_number_agrees_as_far_as_it_is_printed(tmp_path: Path) -> None:
    assert agrees("0.58", [0.58318])
    assert agrees("1,245", [1245.3])
    assert not agrees("0.59", [0.58318])
    assert not agrees("0.580", [0.58318])
