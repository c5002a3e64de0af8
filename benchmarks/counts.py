"""Compares the counts of ``detrkit detect --counts`` with the annotated objects.

detrkit detect bccd/val --model blood-cells --counts counts.csv
python benchmarks/counts.py counts.csv bccd/annotations/instances_val.json
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path


def annotated_counts(path: Path) -> dict[str, Counter[str]]:
    """File name of each image -> number of annotated objects of each class."""
    document = json.loads(path.read_text(encoding="utf-8"))
    classes = {category["id"]: category["name"] for category in document["categories"]}
    files = {image["id"]: image["file_name"] for image in document["images"]}
    counts: dict[str, Counter[str]] = {name: Counter() for name in files.values()}
    for annotation in document["annotations"]:
        counts[files[annotation["image_id"]]][classes[annotation["category_id"]]] += 1
    return counts


def main() -> None:
    """Reads the arguments and prints a row for each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("counts", type=Path, help="the file of detrkit detect --counts")
    parser.add_argument("annotations", type=Path, help="COCO annotations of the same images")
    arguments = parser.parse_args()

    annotated = annotated_counts(arguments.annotations)
    with arguments.counts.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print("class, detected, annotated, mean absolute difference per image")
    for name in list(rows[0])[2:]:  # after file_name and total
        pairs = [(int(row[name]), annotated[row["file_name"]][name]) for row in rows]
        difference = sum(abs(found - known) for found, known in pairs) / len(pairs)
        print(f"{name}, {sum(f for f, _ in pairs)}, {sum(k for _, k in pairs)}, {difference:.2f}")


if __name__ == "__main__":
    main()
