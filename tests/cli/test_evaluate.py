from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import Detector
from detrkit.evaluation import evaluate_detector, evaluate_results
from detrkit.evaluation.coco import STATISTICS
from tests.cli.conftest import Run
from tests.conftest import read_json
from tests.tiny import TINY_NAMES

CATEGORIES = [{"id": 10 + label, "name": name.upper()} for label, name in TINY_NAMES.items() if label]


@pytest.fixture
def annotations(tiny_detr: Path, pictures: list[Path], tmp_path: Path) -> Path:
    """Annotations of the pictures: what the tiny detector finds with some confidence, a little displaced."""
    document: dict = {"images": [], "annotations": [], "categories": CATEGORIES}
    found = Detector.from_pretrained(tiny_detr, device="cpu")(pictures, threshold=0.3)
    for image_id, (path, detections) in enumerate(zip(pictures, found), start=1):
        height, width = detections.image_size
        document["images"].append({"id": image_id, "file_name": path.name, "height": height, "width": width})
        for entry in detections.to_coco(image_id, first_id=len(document["annotations"]) + 1):
            if TINY_NAMES[entry["category_id"]] != "N/A":
                entry["category_id"] += 10
                entry["bbox"][0] += 3
                number = len(document["annotations"]) + 1
                document["annotations"].append({**entry, "id": number, "iscrowd": 0})
    assert len(document["annotations"]) > 3
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    return path


def arguments(model: Path, pictures: list[Path], annotations: Path) -> list[object]:
    return [
        *("evaluate", "--model", model, "--images", pictures[0].parent),
        *("--annotations", annotations, "--device", "cpu"),
    ]


def test_the_numbers_are_printed_and_written(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = detrkit_here(
        *arguments(tiny_detr, pictures, annotations),
        "--json",
        out / "numbers.json",
        "--save-dir",
        out,
        "--per-class",
        "--errors",
    )
    assert done.returncode == 0, done.stderr
    assert "AP50 lost" in done.stdout
    numbers = read_json(out / "numbers.json")
    expected = evaluate_detector(
        Detector.from_pretrained(tiny_detr, device="cpu"), pictures[0].parent, annotations
    )
    assert 0.1 < expected.stats["AP"] < 1
    assert {name: numbers["boxes"][name] for name in STATISTICS} == pytest.approx(expected.stats, abs=1e-6)
    assert (numbers["model"], numbers["images"]) == (str(tiny_detr), 4)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["AP", f"{100 * expected.stats['AP']:.1f}"] in rows
    assert "REMOTE" in done.stdout
    assert "4 images, " in done.stderr
    assert f"results and charts in {out}" in done.stderr
    again = evaluate_results(annotations, out / "boxes_results.json")
    assert again.stats == pytest.approx(expected.stats, abs=1e-6)
    assert (out / "boxes_confusion_matrix.png").is_file()
    with Image.open(out / "boxes_errors.png") as gallery:
        assert gallery.format == "PNG"

    from_file = tmp_path / "from-file.json"
    results = out / "boxes_results.json"
    done = detrkit_here(
        "evaluate", "--annotations", annotations, "--predictions", results, "--json", from_file
    )
    assert done.returncode == 0, done.stderr
    assert read_json(from_file)["boxes"] == numbers["boxes"]


def test_each_decoder_layer_is_evaluated_on_request(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = (*arguments(tiny_detr, pictures, annotations), "--layers", "--overlap", 0.5)
    done = detrkit_here(*run, "--json", out / "numbers.json", "--save-dir", out)
    assert done.returncode == 0, done.stderr
    assert "decoder layer" in done.stdout
    numbers = read_json(out / "numbers.json")
    last = numbers["layers"]["scores"][-1]
    assert last == {name: numbers["boxes"][name] for name in STATISTICS}
    assert numbers["layers"]["overlap"] == 0.5
    assert (out / "boxes_layers.png").is_file()
    done = detrkit_here(*run, "--save-dir", out)  # its own files may be replaced
    assert done.returncode == 0, done.stderr
    results = out / "boxes_results.json"
    done = detrkit_here("evaluate", "--annotations", annotations, "--predictions", results, "--layers")
    assert (done.returncode, "--layers runs a model" in done.stderr) == (2, True)


def test_json_on_stdout_is_all_of_stdout(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path
) -> None:
    done = detrkit_here(
        *arguments(tiny_detr, pictures, annotations), "--json", "-", "--limit", 2, "--batch-size", 2
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2


@pytest.fixture
def panoptic(detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path) -> Path:
    """Panoptic annotations of the pictures: what the tiny model finds, a pixel displaced."""
    truth = tmp_path / "truth"
    done = detrkit_here(
        "segment", *pictures, "--model", tiny_panoptic, "-t", 0.4, "--save-dir", truth, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    for path in (truth / "panoptic").iterdir():
        with Image.open(path) as png:
            ids = np.roll(np.asarray(png), 1, axis=1)
        Image.fromarray(ids).save(path)
    return truth / "panoptic.json"


def test_panoptic_quality_is_the_same_from_memory_and_from_files(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], panoptic: Path, tmp_path: Path
) -> None:
    truth = ("--annotations", panoptic, "--panoptic-dir", panoptic.with_suffix(""))
    run = ("--model", tiny_panoptic, "-t", 0.5, "--device", "cpu")
    in_memory, from_files = tmp_path / "memory.json", tmp_path / "files.json"
    done = detrkit_here(
        *("evaluate", "--images", pictures[0].parent, *truth, *run, "--json", in_memory, "--per-class")
    )
    assert done.returncode == 0, done.stderr
    numbers = read_json(in_memory)["panoptic"]
    assert 0.1 < numbers["All"]["pq"] < 1
    rows = [line.split() for line in done.stdout.splitlines()]
    averages = (f"{100 * numbers['All'][name]:.1f}" for name in ("pq", "sq", "rq"))
    assert ["all", *averages, "3"] in rows
    assert ["couch", "stuff"] in [row[:2] for row in rows]
    assert detrkit_here("segment", *pictures, *run, "--save-dir", tmp_path / "segments").returncode == 0
    predictions = tmp_path / "segments" / "panoptic.json"
    done = detrkit_here("evaluate", *truth, "--predictions", predictions, "--json", from_files)
    assert done.returncode == 0, done.stderr
    assert read_json(from_files)["panoptic"] == numbers


def test_masks_are_evaluated_beside_boxes(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], annotations: Path
) -> None:
    document = read_json(annotations)
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    annotations.write_text(json.dumps(document))
    done = detrkit_here(*arguments(tiny_panoptic, pictures, annotations), "--json", "-")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["masks"].keys() == numbers["boxes"].keys()
    done = detrkit_here(*arguments(tiny_panoptic, pictures, annotations), "--no-masks")
    assert done.returncode == 0, done.stderr
    assert "boxes" in done.stdout
    assert "masks" not in done.stdout


def test_the_help_names_every_option(detrkit_here: Run) -> None:
    done = detrkit_here("evaluate", "--help")
    for option in (
        "--model",
        "--images",
        "--annotations",
        "--panoptic-dir",
        "--json",
        "--save-dir",
        "--limit",
    ):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"].clear(), "no usable object is left"),
        (lambda d: d["images"][0].update(file_name="x.jpg"), "image file missing: 1 dropped"),
        (lambda d: [i.update(file_name="x.jpg") for i in d["images"]], "image file listed twice: 3 merged"),
        (
            lambda d: [c.update(name=f"bird {c['id']}") for c in d["categories"]],
            "the model has no class for",
        ),
        (lambda d: d.pop("images"), "is not a COCO document: it has no list of images"),
    ],
)
def test_annotations_that_do_not_fit_give_one_line(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, change, message: str
) -> None:
    document = read_json(annotations)
    change(document)
    annotations.write_text(json.dumps(document))
    done = detrkit_here(*arguments(tiny_detr, pictures, annotations), "--strict")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_mistakes_in_the_arguments_give_one_line(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    for extra, message in (
        (("--json", tmp_path), "--json must be a file"),
        (("--save-dir", annotations), "--save-dir must be a folder"),
        (("--panoptic-dir", tmp_path), "this model detects boxes only"),
        (("--masks",), "detects boxes only"),
        (("--limit", 0), "--limit"),
        (("--predictions", annotations), "leave out --model and --images"),
    ):
        done = detrkit_here(*arguments(tiny_detr, pictures, annotations), *extra)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr
    done = detrkit_here(*arguments(tmp_path / "nothing", pictures, annotations))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    done = detrkit_here("evaluate", "--annotations", annotations)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--model and --images" in done.stderr
