"""Models and processors that a user brings: made to fit each other, or refused by name."""

import pytest
import transformers
from torch import nn

from detrkit import (
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    Detector,
    DetrImageProcessor,
    pipeline,
)
from detrkit.errors import SettingError
from tests.conftest import make_picture
from tests.tiny import FAMILIES

SIZE = {"shortest_edge": 96, "longest_edge": 160}
FITTING = {
    "detr": DetrImageProcessor,
    "conditional_detr": ConditionalDetrImageProcessor,
    "deformable_detr": DeformableDetrImageProcessor,
}


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize(
    "other",
    [
        DetrImageProcessor,
        ConditionalDetrImageProcessor,
        transformers.DetrImageProcessor,
        transformers.DetrImageProcessorPil,
        transformers.DeformableDetrImageProcessor,
    ],
    ids=lambda kind: f"{kind.__module__.split('.')[0]}-{kind.__name__}",
)
def test_scores_are_those_of_the_models_family_whatever_the_processor(name, other):
    model, image = FAMILIES[name].detector(), make_picture(120, 80)
    expected = Detector(model, FITTING[name](size=SIZE), device="cpu")(image, threshold=0)
    found = Detector(model, other(size=SIZE), device="cpu")(image, threshold=0)
    assert found.scores.tolist() == expected.scores.tolist()
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.boxes.tolist() == expected.boxes.tolist()


def test_a_processor_of_ones_own_is_taken_as_it_is():
    class Own(DetrImageProcessor):
        pass

    detector = Detector(FAMILIES["conditional_detr"].detector(), Own(size=SIZE), device="cpu")
    assert type(detector.processor) is Own


@pytest.mark.parametrize("processor", [None, transformers.ViTImageProcessor(), "detr-resnet-50"], ids=repr)
def test_what_is_no_processor_is_named(processor):
    with pytest.raises(SettingError, match=rf"not {type(processor).__name__}; for this model DetrImageProc"):
        Detector(FAMILIES["detr"].detector(), processor, device="cpu")


def test_what_is_no_detection_model_is_named():
    family, processor = FAMILIES["detr"], DetrImageProcessor()
    with pytest.raises(SettingError, match=r"not Linear: load it with detrkit"):
        Detector(nn.Linear(2, 2), processor)
    with pytest.raises(SettingError, match=r"not DetrModel: it has no heads .* ForObjectDetection"):
        Detector(family.detector().model, processor)
    config = transformers.DetrConfig(
        **{"use_pretrained_backbone": False, "backbone": "resnet18", "use_timm_backbone": True},
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    )
    with pytest.raises(SettingError, match=r"not DetrForObjectDetection: load it with detrkit"):
        Detector(transformers.DetrForObjectDetection(config), processor)


def test_a_pipeline_reads_scores_by_the_models_family_too():
    model, image = FAMILIES["conditional_detr"].detector(), make_picture(120, 80)
    expected = Detector(model, ConditionalDetrImageProcessor(size=SIZE), device="cpu")(image, threshold=0)
    pipe = pipeline("object-detection", model=model, image_processor=DetrImageProcessor(size=SIZE))
    found = sorted((round(entry["score"], 5) for entry in pipe(image, threshold=0)), reverse=True)
    assert found == pytest.approx(sorted(expected.scores.tolist(), reverse=True), abs=1e-4)
