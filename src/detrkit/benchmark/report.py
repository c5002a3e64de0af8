"""Rows of a measurement, and files of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from detrkit.benchmark.sides import STAGES
from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_file

if TYPE_CHECKING:
    from detrkit.benchmark.sides import Settings
    from detrkit.benchmark.turns import Times
    from detrkit.checkpoints.cost import Cost


def make_rows(
    results: Sequence[Times],
    settings: Settings,
    cost: Cost,
    rate: float,
    *,
    reference: str | None = None,
    about: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A row for each side and stage.

    Args:
        results: What was measured.
        settings: Size, batch, device and dtype, which the sides have in common.
        cost: The model's work for one image.
        rate: What :func:`~detrkit.benchmark.machine.matrix_rate` gave, in 10^9 operations a second.
        reference: The side that the others are compared with.
        about: Columns to begin with.
        configuration: Columns to end with.

    Returns:
        Rows with the columns ``side``, ``stage``, ``device``, ``dtype``, ``height``, ``width``, ``batch``,
        ``repeats``, ``median_s``, ``fastest_s``, ``slowest_s`` (seconds of a batch), ``images_per_s``,
        ``ratio`` of the reference's median to the side's, ``ratio_low`` and ``ratio_high`` over the turns,
        ``peak_mb`` (10^6 bytes), ``gmac`` (10^9 multiply-adds of an image in convolutions, linear layers and
        attention), ``sampling_gmac`` (those of deformable attention's samples), ``gflops`` (the machine's
        rate), ``share_of_limit`` (time of that arithmetic at that rate / median; forward only), and
        ``failure``.
    """
    theirs = next((r.seconds for r in results if r.name == reference), {})
    limit = settings.batch * least_seconds(cost, rate)
    rows = []
    for result in results:
        for stage in [stage for stage in STAGES if stage in result.seconds] or [""]:
            seconds = result.seconds.get(stage, [])
            row = {
                **(about or {}),
                "side": result.name,
                "stage": stage,
                "device": settings.device,
                "dtype": settings.dtype,
                "height": settings.height,
                "width": settings.width,
                "batch": settings.batch,
                "repeats": len(seconds),
                **_times(seconds, settings.batch),
                **_ratios(seconds, theirs.get(stage, [])),
                "peak_mb": None if result.megabytes is None else round(result.megabytes),
                "gmac": round(cost.macs / 1e9, 1),
                "sampling_gmac": round(cost.sampling_macs / 1e9, 2),
                "gflops": round(rate),
                "share_of_limit": round(limit / median(seconds), 3) if stage == "forward" else None,
                "failure": result.failure,
                **(configuration or {}),
            }
            rows.append(row)
    return rows


def least_seconds(cost: Cost, rate: float) -> float:
    """Seconds that the multiply-adds of an image would take at the machine's rate.

    Args:
        cost: The model's work for one image.
        rate: In 10^9 operations a second, two for each multiply-add.
    """
    return 2 * (cost.macs + cost.sampling_macs) / (rate * 1e9)


def _times(seconds: Sequence[float], batch: int) -> dict[str, float | None]:
    if not seconds:
        return dict.fromkeys(("median_s", "fastest_s", "slowest_s", "images_per_s"))
    return {
        "median_s": round(median(seconds), 5),
        "fastest_s": round(min(seconds), 5),
        "slowest_s": round(max(seconds), 5),
        "images_per_s": round(batch / median(seconds), 3),
    }


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    if not ours or not theirs:
        return dict.fromkeys(("ratio", "ratio_low", "ratio_high"))
    turns = [b / a for a, b in zip(ours, theirs)]
    ratio = median(theirs) / median(ours)
    return {"ratio": round(ratio, 3), "ratio_low": round(min(turns), 3), "ratio_high": round(max(turns), 3)}


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file; creates it if it does not exist.

    Raises:
        DetrkitError: The file has other columns, or cannot be written.
    """
    if not rows:
        return
    names = list(rows[0])
    text = ""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        header = next(csv.reader(text.splitlines()), [])
        if header != names:
            raise DetrkitError(f"{path} has different columns; choose another file, or move it away")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=names, lineterminator="\n")
    if not text:
        writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as temporary:
        temporary.write_text(text + stream.getvalue(), encoding="utf-8")
