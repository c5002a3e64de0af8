"""Writes the model cards of this folder, and the counted and measured facts on them.

    python model_cards/generate.py            cards, with the speeds of benchmarks/results/*.csv
    python model_cards/generate.py --count    counts parameters and multiply-adds anew first

Speeds are those that ``detrkit benchmark --csv`` measured; CSV files of other measurements are passed over.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detrkit.checkpoints.cost import Cost, count_cost
from detrkit.checkpoints.registry import BUNDLED, REGISTRY
from detrkit.common.files import atomic_file
from detrkit.hub.card_facts import FACTS_FILE, Speed, read_facts
from detrkit.hub.card_released import released_card
from detrkit.hub.card_trained import IMAGE_SIZE, bundled_card
from detrkit.processing.resize import size_for

CARDS = Path(__file__).parent
RESULTS = CARDS.parent / "benchmarks" / "results"
SPEED_COLUMNS = {"model", "allocator", "side", "stage", "dtype", "height", "width", "batch", "median_s"}
SPEED_COLUMNS |= {"processor", "threads"}


def all_cards() -> dict[str, str]:
    """File name -> text of every card, from the facts that are written down."""
    released = {name: released_card(entry, read_facts(name)) for name, entry in REGISTRY.items()}
    bundled = {name: bundled_card(folder, read_facts(name)) for name, folder in BUNDLED.items()}
    return {f"{name}.md": text for name, text in (released | bundled).items()}


def count(name: str) -> Cost:
    """Counts what a released checkpoint or a bundled model costs."""
    from detrkit.checkpoints.loading import load_pretrained
    from detrkit.conversion.convert import released_model

    if name in REGISTRY:
        model, _ = released_model(REGISTRY[name])
        return count_cost(type(model), model.config)
    model, processor = load_pretrained(str(BUNDLED[name]), None)
    return count_cost(type(model), model.config, size_for(*IMAGE_SIZE, processor.size))


def read_speeds(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Short name of a model -> its speeds for single images, of all measurements in a folder."""
    found: dict[str, dict[tuple[str, ...], Speed]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if not columns >= SPEED_COLUMNS or "axis" in columns:  # along which the model itself may differ
                continue
            for row in reader:
                ours = not row["side"].startswith("transformers") and row["allocator"] == "as is"
                if not ours or row["batch"] != "1" or not row["median_s"]:
                    continue
                if row.get("clock") == "processor":  # what a user waits for is another time
                    continue
                threads = f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"
                dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
                speed = Speed(
                    engine=row["side"],
                    stage=row["stage"],
                    device=f"{row['processor']}, {threads}{dtype}",
                    size=f"{row['height']}x{row['width']}",
                    seconds=float(row["median_s"]),
                )
                key = (speed.engine, speed.stage, speed.device, speed.size)
                found.setdefault(_short_name(row["model"]), {})[key] = speed  # a later measurement counts
    return {name: [asdict(speed) for speed in speeds.values()] for name, speeds in found.items()}


def _short_name(model: str) -> str:
    return next((entry.name for entry in REGISTRY.values() if entry.hub_id == model), model)


def gather_facts(recount: bool) -> dict[str, dict[str, Any]]:
    """Everything that goes into the file of facts.

    Args:
        recount: Count the costs anew; otherwise those of the file are kept, and only missing ones counted.
    """
    known = json.loads(FACTS_FILE.read_text(encoding="utf-8")) if FACTS_FILE.exists() else {}
    speeds = read_speeds()
    facts = {}
    for name in (*REGISTRY, *BUNDLED):
        cost = None if recount else known.get(name, {}).get("cost")
        cost = cost or asdict(count(name))
        facts[name] = {"cost": cost, **({"speeds": speeds[name]} if name in speeds else {})}
    return facts


def main() -> None:
    """Writes facts and cards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count parameters and multiply-adds anew")
    _write(FACTS_FILE, json.dumps(gather_facts(parser.parse_args().count), indent=2) + "\n")
    cards = all_cards()
    for name, text in cards.items():
        _write(CARDS / name, text)
    for name, folder in BUNDLED.items():
        _write(folder / "README.md", cards[f"{name}.md"])
    print(f"{len(cards)} cards in {CARDS}")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
