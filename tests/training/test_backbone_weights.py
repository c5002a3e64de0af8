import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from detrkit import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from detrkit.errors import CheckpointError, SettingError
from detrkit.models.layers.backbone import ConvEncoder, FrozenBatchNorm2d
from detrkit.training import TrainingRecipe, train
from detrkit.training.backbone_weights import load_backbone_weights, use_pixel_statistics
from detrkit.training.preparation import build_model, read_datasets

NAME = "resnet10t"


class MakesAFolder:
    """Makes a folder when it is unpickled as Python would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_detector(backbone=NAME, **options):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return DetrForObjectDetection(
        DetrConfig(backbone=backbone, use_pretrained_backbone=False, **sizes, **heads, **options)
    ).eval()


def make_classifier(backbone=NAME, seed=1, **options):
    torch.manual_seed(seed)
    model = timm.create_model(backbone, **options).eval()
    for name, buffer in model.named_buffers():  # as if it had been trained
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return model


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


def backbone_of(detector):
    return next(module for module in detector.modules() if isinstance(module, ConvEncoder))


def assert_same_maps(detector, classifier):
    image = torch.rand(1, 3, 64, 64)
    expected = classifier.forward_features(image)
    assert torch.allclose(backbone_of(detector)(image)[-1], expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "backbone.0.body."])
def test_weights_are_matched_by_name_below_any_prefix(tmp_path, classifier, prefix, suffix):
    path = tmp_path / f"weights{suffix}"
    tensors = {prefix + name: tensor for name, tensor in classifier.state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        save_file(tensors, path)
    detector = make_detector()
    line = load_backbone_weights(detector, path)
    assert_same_maps(detector, classifier)
    assert "matched by name" in line
    assert "2 tensors not used" in line
    assert "fc.bias" in line


def test_a_backbone_whose_stages_timm_renames_is_matched_by_name(tmp_path):
    classifier = make_classifier("ese_vovnet19b_slim")
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    detector = make_detector("ese_vovnet19b_slim")
    load_backbone_weights(detector, tmp_path / "weights.safetensors")
    assert_same_maps(detector, classifier)


def test_the_backbone_of_another_detector_is_taken_from_its_checkpoint(tmp_path):
    other = make_detector()
    for buffer in other.buffers():
        buffer.uniform_(0.5, 1)
    other.save_pretrained(tmp_path)
    detector = make_detector()
    line = load_backbone_weights(detector, tmp_path / "model.safetensors")
    expected = backbone_of(other).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in backbone_of(detector).state_dict().items()
    )
    assert "bbox_predictor.layers.0.bias" in line


@pytest.mark.parametrize("whole", [True, False], ids=["with classifier", "backbone alone"])
def test_other_names_are_matched_by_order_and_that_is_said(tmp_path, classifier, whole):
    names = classifier.state_dict()
    chosen = {
        f"_t{place}.weight": tensor
        for place, (name, tensor) in enumerate(names.items())
        if (whole or not name.startswith("fc.")) and not name.endswith("num_batches_tracked")
    }
    torch.save(chosen, tmp_path / "weights.pth")
    detector = make_detector()
    line = load_backbone_weights(detector, tmp_path / "weights.pth")
    assert_same_maps(detector, classifier)
    assert "matched by order" in line
    assert ("2 tensors not used" in line) == whole


def test_order_is_not_trusted_where_the_format_does_not_keep_it(tmp_path, classifier):
    tensors = {f"t{place:03}": tensor for place, tensor in enumerate(classifier.state_dict().values())}
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not keep their order"):
        load_backbone_weights(make_detector(), tmp_path / "weights.safetensors")


def test_order_is_not_trusted_where_one_shape_differs(tmp_path, classifier):
    tensors = {f"t{place}": tensor for place, tensor in enumerate(classifier.state_dict().values())}
    tensors["t0"] = tensors["t0"][:, :1].clone()
    torch.save(tensors, tmp_path / "weights.pth")
    detector = make_detector()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit resnet10t: 0 of its 70 tensors.*t0, t1, t2"):
        load_backbone_weights(detector, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(make_classifier("resnet18").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not fit resnet50"):
        load_backbone_weights(make_detector("resnet50"), tmp_path / "weights.pth")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    torch.save(make_classifier(in_chans=1).state_dict(), tmp_path / "weights.pth")
    detector = make_detector()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    message = r"conv1\.0\.weight has the shape \(24, 1, 3, 3\), not \(24, 3, 3, 3\)"
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(detector, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_missing_weights_and_layers_of_a_deeper_backbone_are_warned_of(tmp_path, caplog):
    tensors = make_classifier("resnet34").state_dict()
    del tensors["layer4.1.bn2.weight"]
    torch.save(tensors, tmp_path / "weights.pth")
    load_backbone_weights(make_detector("resnet18"), tmp_path / "weights.pth")
    assert "no weights for 1 of the 100 tensors of resnet18" in caplog.text
    assert "layer4.1.bn2.weight" in caplog.text
    assert "80 tensors that resnet18 does not have, such as layer1.2.bn1.bias" in caplog.text


def test_code_in_a_weights_file_is_never_run(tmp_path):
    torch.save({"conv1.weight": MakesAFolder(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="refused to read"):
        load_backbone_weights(make_detector(), tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_pixels_are_normalised_as_the_backbone_was_pretrained():
    processor = DetrImageProcessor()
    assert use_pixel_statistics(make_detector(), processor) is None
    assert processor.image_mean == DetrImageProcessor().image_mean
    line = use_pixel_statistics(make_detector("tf_efficientnet_lite0"), processor)
    assert "mean 0.5, 0.5, 0.5" in line
    assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]


@pytest.fixture
def new_model(recipe, tmp_path, classifier):
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")

    def make(**options) -> TrainingRecipe:
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "queries": 4, "image_size": 64}
        chosen = {"model": "detr", "from_scratch": True, "backbone": NAME, "epochs": 1}
        return recipe(**{**sizes, **chosen, "backbone_weights": tmp_path / "weights.pth", **options})

    return make


def test_a_new_model_trains_from_backbone_weights(new_model, classifier, capsys):
    chosen = new_model()
    model, *_ = build_model(chosen, read_datasets(chosen, None, None)[0])
    assert_same_maps(model.eval(), classifier)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    train(chosen)
    assert "Backbone weights: " in capsys.readouterr().err
    assert "Trained with backbone weights from `weights.pth`" in (chosen.output / "README.md").read_text()


def test_a_run_is_not_resumed_with_other_backbone_weights(new_model, tmp_path):
    train(new_model())
    torch.save(make_classifier(seed=2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(SettingError, match="different backbone weights"):
        train(new_model(resume=True, epochs=2))


def test_a_missing_weights_file_is_named_before_the_first_step(new_model):
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        train(new_model(backbone_weights=Path("gone.pth")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_scratch": False, "model": "detr-resnet-50"}, "--backbone-weights requires --from-scratch"),
        ({"pretrained_backbone": True}, "not both"),
    ],
)
def test_contradictions_are_named(new_model, options, message):
    with pytest.raises(SettingError, match=message):
        new_model(**options)


def test_a_backbone_with_weights_may_be_frozen(new_model):
    chosen = new_model(freeze="backbone")
    model, *_ = build_model(chosen, read_datasets(chosen, None, None)[0])
    assert not any(parameter.requires_grad for parameter in backbone_of(model).parameters())
