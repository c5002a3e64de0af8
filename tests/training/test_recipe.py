import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from detrkit.errors import SettingError
from detrkit.training import TrainingRecipe
from tests.conftest import read_json

PATHS = {"train_images": "a", "train_annotations": "b", "val_images": "c", "val_annotations": "d"}


def make(**options):
    return TrainingRecipe(**{"model": "detr-resnet-50", "output": "out", **PATHS, **options})


def test_every_field_tells_what_it_is():
    for field in fields(TrainingRecipe):
        assert field.metadata["help"].endswith((".", "]")), field.name
        assert field.metadata["group"] in ("Data", "Model", "Optimisation", "Run")


def test_only_model_and_output_must_always_be_given():
    required = {
        f.name for f in fields(TrainingRecipe) if f.default is MISSING and f.default_factory is MISSING
    }
    assert required == {"model", "output"}


def test_the_defaults_are_the_originals():
    recipe = make()
    assert (recipe.clip_norm, recipe.weight_decay) == (0.1, 1e-4)
    assert recipe.ema_decay > 0.99
    assert recipe.warmup > 0


def test_strings_become_paths():
    assert make().output == Path("out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"mosaic": 1.5}, "--mosaic must be at most 1, not 1.5"),
        ({"learning_rate": float("nan")}, "--learning-rate must be at least 0, not nan"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"freeze": "detector"}, "--masks"),
        ({"freeze": "backbone", "from_scratch": True}, "random weights"),
        ({"freeze": "backbone", "live_batch_norm": True}, "--live-batch-norm"),
        ({"model_option": ["dropout"]}, "NAME=VALUE"),
        ({"train_panoptic_dir": "png"}, "--val-panoptic-dir"),
        ({"hub_id": "you/cells"}, "--push-to-hub"),
    ],
)
def test_a_mistake_is_named(options, message):
    with pytest.raises(SettingError, match=message):
        make(**options)


def test_panoptic_data_imply_masks():
    assert make(train_panoptic_dir="a", val_panoptic_dir="b").masks


def test_a_run_is_resumed_with_the_options_it_began_with(tmp_path):
    make(batch_size=2).save(tmp_path / "recipe.json")
    make(batch_size=2, resume=True, workers=3, output="elsewhere").check_same(tmp_path / "recipe.json")
    with pytest.raises(SettingError, match=r"--batch-size 2, not 4"):
        make(resume=True).check_same(tmp_path / "recipe.json")


def test_a_run_of_a_version_without_an_option_is_resumed_with_its_default(tmp_path):
    make().save(tmp_path / "recipe.json")
    content = read_json(tmp_path / "recipe.json")
    del content["repeat_rare"]
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    make(resume=True).check_same(tmp_path / "recipe.json")
    with pytest.raises(SettingError, match=r"--repeat-rare 0\.0, not 0\.5"):
        make(resume=True, repeat_rare=0.5).check_same(tmp_path / "recipe.json")


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(SettingError, match=r"recipe\.json"):
        make().check_same(tmp_path / "recipe.json")


def test_a_list_in_place_of_a_recipe_is_named(tmp_path):
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(SettingError, match=r"recipe\.json has no options"):
        make().check_same(tmp_path / "recipe.json")
