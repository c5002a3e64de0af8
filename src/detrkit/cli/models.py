"""``detrkit models``: the models that have a short name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from detrkit.cli import options
from detrkit.common.terminal import make_table, print_table


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
    debug: options.Debug = False,
) -> None:
    """List the models that have a short name, with size and published accuracy.

    The accuracy is that on COCO, of Table Transformer that on PubTables-1M.
    """
    from detrkit.checkpoints.registry import BUNDLED, HUB_ONLY, REGISTRY

    if as_json:
        released = [asdict(entry) for entry in REGISTRY.values()]
        further = [_entry({"name": name, "hub_id": hub_id}) for name, hub_id in HUB_ONLY.items()]
        print(json.dumps([*released, *further, *map(_bundled, BUNDLED)], indent=2))
        return

    table = make_table(["name", "Hub id"], ["params (M)", "GFLOPs", "box AP", "PQ"])
    table.columns[0].no_wrap = True
    for entry in REGISTRY.values():
        table.add_row(
            entry.name,
            entry.hub_id or "(not on the Hub)",
            _number(entry.params),
            _number(entry.gflops),
            _number(entry.ap, decimals=1),
            _number(entry.pq, decimals=1),
        )
    for name, hub_id in HUB_ONLY.items():
        table.add_row(name, hub_id)
    for name in BUNDLED:
        table.add_row(name, "(bundled)")
    print_table(table)


def _number(value: float | None, decimals: int = 0) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def _bundled(name: str) -> dict[str, Any]:
    from detrkit.checkpoints.registry import BUNDLED

    config = json.loads((BUNDLED[name] / "config.json").read_text(encoding="utf-8"))
    segments = config["architectures"][0].endswith("ForSegmentation")
    known = {
        "name": name,
        "family": config["model_type"],
        "task": "panoptic" if segments else "detection",
        "num_labels": len(config["id2label"]),
    }
    return _entry(config | known)


def _entry(known: Mapping[str, Any]) -> dict[str, Any]:
    """A model with the fields of a released checkpoint; None for what is not known or published."""
    from detrkit.checkpoints.registry import ReleasedCheckpoint

    return {field.name: known.get(field.name) for field in fields(ReleasedCheckpoint)}
