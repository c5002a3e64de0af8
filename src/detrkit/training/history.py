"""The history of a run, read from the ``Trainer``'s log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detrkit.evaluation.coco import STATISTICS

PANOPTIC_STATISTICS = ("PQ", "SQ", "RQ", "PQthings", "PQstuff")
"""Names of the metrics of a panoptic evaluation."""

_EVALUATION = "eval_"
_FIRST_COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", *PANOPTIC_STATISTICS, *STATISTICS)


def merge_log(log_history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """One row for each logged step of ``trainer.state.log_history``, in their order.

    A row has ``step``, ``epoch``, ``loss`` and its terms, ``learning_rate``, ``grad_norm``, and the metrics
    (``AP``, ...) if the model was evaluated.
    """
    rows: dict[float, dict[str, float]] = {}
    for entry in log_history:
        if "loss" not in entry and not any(name.startswith(_EVALUATION) for name in entry):
            continue  # the Trainer's summary of the run
        row = rows.setdefault(entry["step"], {})
        row |= {name.removeprefix(_EVALUATION): value for name, value in entry.items()}
    return [rows[step] for step in sorted(rows)]


def columns(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """All names in the rows, in a fixed order; terms of the loss are last."""
    found = {name for row in rows for name in row}
    first = [name for name in _FIRST_COLUMNS if name in found]
    return first + sorted(found.difference(first))


def evaluations(rows: Sequence[Mapping[str, float]], metric: str) -> list[Mapping[str, float]]:
    """The rows that have a value of ``metric``."""
    return [row for row in rows if metric in row]


def best_row(rows: Sequence[Mapping[str, float]], metric: str) -> Mapping[str, float] | None:
    """The first evaluation with the highest ``metric``; None before the first evaluation."""
    return max(evaluations(rows, metric), key=lambda row: row[metric], default=None)


def has_stalled(rows: Sequence[Mapping[str, float]], metric: str, patience: int | None) -> bool:
    """Whether none of the last ``patience`` evaluations is better than those before."""
    values = [row[metric] for row in evaluations(rows, metric)]
    if patience is None or len(values) <= patience:
        return False
    return max(values[-patience:]) <= max(values[:-patience])
