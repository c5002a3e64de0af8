"""The number of object queries of a two-stage model, raised when it is loaded."""

import pytest
from PIL import Image

from detrkit import Detector
from detrkit.common.errors import SettingError
from tests.tiny import FAMILIES

TWO_STAGE = "deformable_detr_two_stage"


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory):
    return FAMILIES[TWO_STAGE].save(tmp_path_factory.mktemp("two_stage"))


@pytest.fixture(scope="module")
def image():
    return Image.effect_noise((107, 64), 90).convert("RGB")


def test_a_two_stage_model_proposes_as_many_boxes_as_asked(two_stage, image):
    few, many = Detector.from_pretrained(two_stage), Detector.from_pretrained(two_stage, queries=40)
    assert len(few(image, threshold=0, max_objects=1000)) < len(many(image, threshold=0, max_objects=1000))
    assert many.config.object_queries == 40
    assert many.predict(image, 0).outputs["logits"].shape[1] == 40


def test_the_number_that_the_model_was_trained_with_changes_nothing(two_stage, image):
    plain, same = Detector.from_pretrained(two_stage), Detector.from_pretrained(two_stage, queries=12)
    assert same(image, threshold=0).boxes.tolist() == plain(image, threshold=0).boxes.tolist()


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {TWO_STAGE}))
def test_learned_queries_cannot_be_more_or_fewer(name, tmp_path):
    FAMILIES[name].save(tmp_path)
    Detector.from_pretrained(tmp_path, queries=12)
    with pytest.raises(SettingError, match=r"queries=13 .* learned each of its 12 queries"):
        Detector.from_pretrained(tmp_path, queries=13)


def test_more_queries_than_the_model_has_positions_are_refused(two_stage, image, caplog):
    # 64 x 107 pixels: 8 x 14 positions, and 4 x 7, 2 x 4, 1 x 2 of the coarser maps.
    with pytest.raises(SettingError, match="queries=151 is more than the 150 positions"):
        Detector.from_pretrained(two_stage, queries=151)
    found = Detector.from_pretrained(two_stage, queries=150).predict(image, 0)
    assert found.outputs["logits"].shape[1] == 150
    assert not caplog.records


@pytest.mark.parametrize("count", [0, 10_001])
def test_a_number_of_queries_that_no_model_has_is_refused(two_stage, count):
    with pytest.raises(SettingError, match="num_queries must be between 1 and 10000"):
        Detector.from_pretrained(two_stage, queries=count)
