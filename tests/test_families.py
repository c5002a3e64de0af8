"""The table of families, and that it is all a family needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import detrkit
from detrkit import Detector
from detrkit.checkpoints.registry import REGISTRY, ReleasedCheckpoint
from detrkit.conversion.convert import convert_checkpoint
from detrkit.errors import CheckpointError, SettingError
from detrkit.families import FAMILIES, Family, Paper, family_of
from detrkit.hub import plain_card
from detrkit.training import TrainingRecipe, train
from tests.conversion.synthetic import detr_checkpoint, linear
from tests.toy_detr.modeling_toy_detr import ToyDetrForObjectDetection
from tests.training.conftest import make_dataset

TOY = Family(
    model_type="toy_detr",
    title="Toy DETR",
    package="tests.toy_detr",
    class_prefix="ToyDetr",
    class_scores="sigmoid",
    processor_of="conditional_detr",
    learning_rate=3e-4,
    paper=Paper(
        key="toy2026",
        title="A Toy",
        authors="Doe, Jane",
        venue="Toy Conference",
        year=2026,
        url="https://example.com/toy.pdf",
    ),
    repository="https://example.com/toy",
    description="Toy DETR normalises the encoder's output.",
    published_training="One epoch.",
)
RELEASED = ReleasedCheckpoint(
    name="toy-detr-resnet-18",
    hub_id=None,
    family="toy_detr",
    task="detection",
    backbone="resnet18",
    url="https://example.com/toy.pth",
    ap=12.3,
    num_labels=3,
    num_queries=12,
)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (None, "some/model has no model_type in its config.json; .* has detr, conditional_detr, def"),
        ("", "some/model has no model_type"),
        ("bert", "is a 'bert' model; .* detr, conditional_detr, deformable_detr, table-transformer$"),
        ("deformable-detr", "did you mean 'deformable_detr'\\?$"),
    ],
)
def test_a_model_type_of_no_family_is_refused(model_type: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family_of(model_type, "some/model")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_class_of_a_family_exists(model_type: str) -> None:
    family = family_of(model_type, "some/model")
    assert family.load(family.config).model_type == model_type
    for name in family.class_names:
        assert family.load(name).__name__ == name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_classes_of_a_family_are_public_names(model_type: str) -> None:
    """All but the newer names of the image processor, which only files carry."""
    family = FAMILIES[model_type]
    public = {name for name in family.class_names if not name.endswith(("Fast", "Pil"))}
    assert public <= set(detrkit.__all__)


def test_a_family_without_masks_says_which_have_them() -> None:
    with pytest.raises(SettingError, match="Deformable DETR has no models with masks; use DETR or Condit"):
        FAMILIES["deformable_detr"].load_model_class(masks=True)


@pytest.fixture(scope="module")
def toy():
    """The toy family and, since conversion goes by their names, its one released checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, TOY.model_type, TOY)
        patch.setitem(REGISTRY, RELEASED.name, RELEASED)
        yield TOY


def toy_tensors(**options):
    """An original checkpoint of the toy family; it has no output for no-object."""
    norm = linear("transformer.encoder.norm", (32,))
    tensors = detr_checkpoint("resnet18", num_labels=2, num_queries=12, **options)
    return tensors | {name: torch.full(shape, 0.5) for name, shape in norm.items()}


@pytest.fixture(scope="module")
def converted(toy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    torch.save({"model": toy_tensors()}, folder / "toy.pth")
    return convert_checkpoint(folder / "toy.pth", folder / "my-toy", RELEASED.name)


def test_a_checkpoint_of_a_new_family_is_converted_and_loads(converted: Path) -> None:
    saved = load_file(converted / "model.safetensors")
    assert (saved["model.encoder.layernorm.weight"] == 0.5).all()
    model, report = ToyDetrForObjectDetection.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values())
    assert (model.config.num_labels, model.config.backbone) == (3, "resnet18")


def test_a_new_family_has_the_card_of_a_release(converted: Path) -> None:
    card = (converted / "README.md").read_text(encoding="utf-8")
    assert "Toy DETR with a ResNet-18 backbone, 3 categories and 12 object queries" in card
    assert "[original implementation](https://example.com/toy)" in card.replace("\n", " ")
    assert "| 12.3 |" in card
    assert "from detrkit import ToyDetrForObjectDetection, ConditionalDetrImageProcessor" in card
    assert "@inproceedings{toy2026," in card


def test_a_new_family_has_a_plain_card(converted: Path) -> None:
    card = plain_card(json.loads((converted / "config.json").read_text(encoding="utf-8")), "me/my-toy")
    assert "Toy DETR for 3 classes: LABEL_0, LABEL_1, LABEL_2." in card
    assert "- toy-detr\n" in card
    assert "Toy DETR normalises the encoder's output." in card
    assert "**Scores**: each class has a sigmoid" in card


def test_the_detector_runs_a_model_of_a_new_family(converted: Path) -> None:
    detector = Detector.from_pretrained(converted, device="cpu")
    assert type(detector.model) is ToyDetrForObjectDetection
    assert type(detector.processor) is detrkit.ConditionalDetrImageProcessor
    detector.processor.size = {"shortest_edge": 64, "longest_edge": 107}
    image = torch.zeros(48, 64, 3, dtype=torch.uint8).numpy()
    assert len(detector(image, threshold=0.0)) == 12 * 3


def test_a_model_of_a_new_family_trains_and_has_the_card_of_a_trained_model(
    converted: Path, tmp_path: Path
) -> None:
    annotations = make_dataset(tmp_path / "data", count=2)
    images = annotations.parent / "images"
    recipe = TrainingRecipe(
        model=str(converted), train_images=images, train_annotations=annotations, val_images=images,
        val_annotations=annotations, output=tmp_path / "run", image_size=64, epochs=1, batch_size=2,
        workers=0, device="cpu",
    )  # fmt: skip
    result = train(recipe)
    assert [row["step"] for row in result.rows] == [1]
    card = (result.folder / "README.md").read_text(encoding="utf-8")
    assert "Toy DETR for 2 classes" in card
    assert "a learning rate of 0.0003" in card.replace("\n", " ")
    trained = load_file(result.folder / "model.safetensors")["model.encoder.layernorm.weight"]
    assert not torch.equal(trained, torch.full_like(trained, 0.5))


def test_a_new_family_is_an_option_of_training_from_scratch(toy: Family, tmp_path: Path) -> None:
    annotations = make_dataset(tmp_path / "data", count=2)
    recipe = TrainingRecipe(
        model="toy-dert", from_scratch=True, output=tmp_path / "run",
        **dict.fromkeys(("train_images", "val_images"), annotations.parent / "images"),
        **dict.fromkeys(("train_annotations", "val_annotations"), annotations),
    )  # fmt: skip
    with pytest.raises(
        SettingError, match="table-transformer, toy-detr, not 'toy-dert'; did you mean 'toy-detr'"
    ):
        train(recipe)
