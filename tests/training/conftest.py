"""A small data set of drawn pictures, and recipes of runs that take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detrkit.training import TrainingRecipe
from tests.conftest import make_picture

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "square"}]
SIZE = (64, 48)  # width, height
COLORS = ((250, 30, 30), (30, 30, 250))

MakeRecipe = Callable[..., TrainingRecipe]


def make_dataset(folder: Path, count: int = 6) -> Path:
    """Writes pictures with one or two coloured boxes each, the last one empty; gives the annotation file."""
    random = np.random.default_rng(5)
    document: dict = {"images": [], "annotations": [], "categories": CATEGORIES}
    (folder / "images").mkdir(parents=True)
    for image_id in range(1, count + 1):
        picture = make_picture(*SIZE, seed=image_id)
        name = f"{image_id}.png"
        for _ in range(0 if image_id == count else 1 + image_id % 2):
            kind = int(random.integers(2))
            width, height = random.integers(12, 24, 2).tolist()
            x, y = int(random.integers(0, SIZE[0] - width)), int(random.integers(0, SIZE[1] - height))
            picture.paste(COLORS[kind], (x, y, x + width, y + height))
            number = len(document["annotations"]) + 1
            document["annotations"].append(
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": CATEGORIES[kind]["id"],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                    "iscrowd": 0,
                }
            )
        picture.save(folder / "images" / name)
        document["images"].append({"id": image_id, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
    path = folder / "instances.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="session")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The annotation file of six pictures, which lie in ``images`` beside it."""
    return make_dataset(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture
def real_charts() -> None:
    """Marks a test that looks at the charts of a run."""


@pytest.fixture(autouse=True)
def empty_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves charts empty in the other tests: drawing them takes nearly half the time of a run of seconds."""
    if "real_charts" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).touch())


@pytest.fixture
def recipe(annotations: Path, tiny_deformable_detr: Path, tmp_path: Path) -> MakeRecipe:
    """Makes recipes of runs over the six pictures with the tiny Deformable DETR, three steps an epoch."""

    def make(**options: object) -> TrainingRecipe:
        images = annotations.parent / "images"
        settings = {
            "model": str(tiny_deformable_detr),
            "train_images": images,
            "train_annotations": annotations,
            "val_images": images,
            "val_annotations": annotations,
            "output": tmp_path / "run",
            "epochs": 2,
            "batch_size": 2,
            "log_every": 1,
            "workers": 0,
            "device": "cpu",
        }
        return TrainingRecipe(**{**settings, **options})

    return make
