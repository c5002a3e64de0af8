"""The model that comes with the package works without a network and is as good as its card says."""

from pathlib import Path

import pytest

from detrkit import Detector
from detrkit.checkpoints.registry import BUNDLED, resolve_model
from detrkit.evaluation import evaluate_detector
from tests.golden import DATA, needs_data

EXAMPLE = Path(__file__).parents[2] / "examples" / "BloodImage_00000.jpg"


def test_it_is_small_and_has_its_records_and_the_licence_of_its_data():
    folder = Path(resolve_model("blood-cells"))
    assert folder == BUNDLED["blood-cells"]
    assert (folder / "model.safetensors").stat().st_size <= 25e6
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "preprocessor_config.json", "recipe.json", "metrics.csv", "README.md"}
    assert names >= {"loss.png", "ap.png", "evaluation.json", "detection_config.json"}
    notice = (folder / "NOTICE").read_text()
    assert "MIT License" in notice
    assert "Copyright (c) 2017 shenggan" in notice


def test_no_file_of_it_names_a_place_on_the_machine_that_made_it():
    for path in BUNDLED["blood-cells"].iterdir():
        if path.suffix in (".json", ".csv", ".md"):
            assert ': "/' not in path.read_text(), path


def test_it_finds_nearly_every_cell_of_the_example_at_a_low_threshold():
    assert Detector.from_pretrained("blood-cells")(EXAMPLE, threshold=0.35).names.count("RBC") >= 17


def test_it_finds_the_cells_of_the_example():
    detections = Detector.from_pretrained("blood-cells")(EXAMPLE)
    white = detections[[name == "WBC" for name in detections.names]]
    assert len(white) == 1
    x0, y0, x1, y1 = white.boxes[0]
    assert x0 < 350 < x1  # the middle of its nucleus
    assert y0 < 250 < y1
    assert detections.names.count("RBC") >= 10


@needs_data
@pytest.mark.slow
def test_it_is_as_good_as_its_card_says():
    evaluation = evaluate_detector(
        Detector.from_pretrained("blood-cells"),
        DATA / "bccd" / "val",
        DATA / "bccd" / "annotations" / "instances_val.json",
    )
    assert evaluation.stats["AP"] >= 0.62
    assert evaluation.stats["AP50"] >= 0.90
