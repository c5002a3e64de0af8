"""The table of families, and that it is all a family needs."""

from __future__ import annotations

import pytest

import detrkit
from detrkit.errors import CheckpointError, SettingError
from detrkit.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (None, "some/model has no model_type in its config.json; .* has detr, conditional_detr, def"),
        ("", "some/model has no model_type"),
        ("bert", "some/model is a 'bert' model; .* detr, conditional_detr, deformable_detr$"),
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
