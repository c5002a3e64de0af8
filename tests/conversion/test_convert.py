import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from detrkit import TableTransformerForObjectDetection
from detrkit.conversion import convert as conversion
from detrkit.conversion.convert import convert_checkpoint
from detrkit.conversion.labels import COCO_CLASSES
from detrkit.errors import CheckpointError, DetrkitError
from detrkit.models.conditional_detr.image_processing_conditional_detr import ConditionalDetrImageProcessor
from detrkit.models.conditional_detr.modeling_conditional_detr import ConditionalDetrForObjectDetection
from detrkit.models.deformable_detr.image_processing_deformable_detr import DeformableDetrImageProcessor
from detrkit.models.deformable_detr.modeling_deformable_detr import DeformableDetrForObjectDetection
from detrkit.models.detr.configuration_detr import DetrConfig
from detrkit.models.detr.image_processing_detr import DetrImageProcessor
from detrkit.models.detr.modeling_detr import DetrForObjectDetection
from tests.closeness import assert_same_outputs
from tests.conversion.synthetic import (
    conditional_detr_checkpoint,
    deformable_detr_checkpoint,
    detr_checkpoint,
)
from tests.golden import COMPACT

SCRIPT = Path(__file__).parents[2] / "convert_scripts" / "convert_original_checkpoint.py"


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: a converted ResNet-50 takes 94 MB, and pytest keeps folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("conversion")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def weights():
    """A DETR with a ResNet-50, one encoder and one decoder layer, fine-tuned for 3 classes and 25 queries."""
    return detr_checkpoint(num_labels=3, num_queries=25, learned=True)


@pytest.fixture(scope="module")
def checkpoint(weights, module_path):
    path = module_path / "checkpoint0299.pth"
    torch.save({"model": weights, "epoch": 299}, path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint, module_path):
    return convert_checkpoint(checkpoint, module_path / "new" / "my-detr", "detr-resnet-50-dc5")


def save_zeros(path, shapes):
    """A checkpoint whose tensors are all zero: enough to be told apart, quick to write."""
    torch.save({"model": {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}}, path)
    return path


def save_zero_detr(path, **options):
    tensors = detr_checkpoint(device="meta", **options)
    return save_zeros(path, {name: tensor.shape for name, tensor in tensors.items()})


def save_zero_checkpoint(path, name):
    """A checkpoint with the tensors of a released one, or with fewer layers of the same kind."""
    smaller = {
        "deformable-detr-with-box-refine": {"refine": True},
        "deformable-detr-single-scale": {"levels": 1},
    }
    if name in smaller:
        tensors = deformable_detr_checkpoint(**smaller[name], device="meta")
        return save_zeros(path, {key: tensor.shape for key, tensor in tensors.items()})
    (case,) = (case for case in COMPACT if case.name == name)
    return save_zeros(path, {key: spec["shape"] for key, spec in case.keys.items()})


def test_the_folder_holds_weights_configurations_and_card(converted):
    assert {path.name for path in converted.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "README.md",
    }
    modes = {path.stat().st_mode for path in converted.iterdir()}
    assert len(modes) == 1  # the weights can be read by whoever can read the rest


def test_nothing_else_is_left_beside_the_folder(converted):
    assert list(converted.parent.iterdir()) == [converted]


def test_the_configuration_is_read_from_the_tensors_and_the_dilation_from_the_name(converted):
    config = DetrConfig.from_pretrained(converted)
    assert (config.backbone, config.dilation, config.position_embedding_type) == ("resnet50", True, "learned")
    assert (config.num_queries, config.d_model) == (25, 32)
    assert (config.encoder_layers, config.decoder_layers) == (1, 1)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (48, 64)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert not config.use_pretrained_backbone


def test_weights_on_disk_are_the_originals_under_hub_names(converted, weights):
    saved = load_file(converted / "model.safetensors")
    packed = sum(".in_proj_" in name for name in weights)
    second_copies = {
        name for name in saved if name.startswith("model.position_embedding.")
    }  # Transformers 5's
    assert len(saved.keys() - second_copies) == len(weights) + 2 * packed
    pairs = {
        "backbone.0.body.layer4.2.conv3.weight": "model.backbone.conv_encoder.model.layer4.2.conv3.weight",
        "backbone.1.col_embed.weight": "model.backbone.position_embedding.column_embeddings.weight",
        "transformer.decoder.layers.0.norm2.bias": "model.decoder.layers.0.encoder_attn_layer_norm.bias",
        "query_embed.weight": "model.query_position_embeddings.weight",
        "class_embed.weight": "class_labels_classifier.weight",
    }
    for original, hub in pairs.items():
        assert torch.equal(saved[hub], weights[original])
    parts = [saved[f"model.decoder.layers.0.encoder_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(
        torch.cat(parts), weights["transformer.decoder.layers.0.multihead_attn.in_proj_weight"]
    )


def test_the_folder_loads_and_predicts(converted):
    model = DetrForObjectDetection.from_pretrained(converted).eval()
    with torch.inference_mode():
        outputs = model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert outputs.logits.shape == (1, 25, 4)
    assert outputs.logits.isfinite().all()
    processor = DetrImageProcessor.from_pretrained(converted)
    assert processor.size == DetrImageProcessor().size


def test_transformers_loads_the_folder_and_predicts_the_same(converted):
    ours = DetrForObjectDetection.from_pretrained(converted).eval()
    theirs = transformers.DetrForObjectDetection.from_pretrained(converted).eval()
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = ours(image), theirs(image)
    assert_same_outputs(found, expected)


def test_a_conditional_detr_is_converted_and_loads_in_transformers(tmp_path):
    weights = conditional_detr_checkpoint(num_labels=3, num_queries=25)
    torch.save({"model": weights}, tmp_path / "c.pth")
    folder = convert_checkpoint(tmp_path / "c.pth", tmp_path / "out", "conditional-detr-resnet-50-dc5")
    saved = load_file(folder / "model.safetensors")
    packed = sum(".in_proj_" in name for name in weights)
    assert len(saved) == len(weights) + 2 * packed
    first = "decoder.layers.0.ca_qpos_proj.weight"
    assert torch.equal(saved[f"model.{first}"], weights[f"transformer.{first}"])

    ours = ConditionalDetrForObjectDetection.from_pretrained(folder)
    theirs = transformers.ConditionalDetrForObjectDetection.from_pretrained(folder)
    assert ours.config.dilation
    assert isinstance(ConditionalDetrImageProcessor.from_pretrained(folder), ConditionalDetrImageProcessor)
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = theirs(image), ours(image)
    assert found.logits.shape == (1, 25, 3)
    assert_same_outputs(found, expected)


DEFORMABLE = {
    "deformable-detr": {},
    "deformable-detr-with-box-refine": {"refine": True},
    "deformable-detr-with-box-refine-two-stage": {"refine": True, "two_stage": True},
    "deformable-detr-single-scale": {"levels": 1},
    "deformable-detr-single-scale-dc5": {"levels": 1},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("deformable-detr", marks=pytest.mark.slow),
        pytest.param("deformable-detr-with-box-refine", marks=pytest.mark.slow),
        "deformable-detr-with-box-refine-two-stage",
        pytest.param("deformable-detr-single-scale", marks=pytest.mark.slow),
        "deformable-detr-single-scale-dc5",
    ],
)
def test_a_deformable_detr_is_converted_and_loads_in_transformers(name, tmp_path):
    variant = DEFORMABLE[name]
    weights = deformable_detr_checkpoint(num_labels=3, num_queries=25, **variant)
    torch.save({"model": weights}, tmp_path / "d.pth")
    folder = convert_checkpoint(tmp_path / "d.pth", tmp_path / "out", name)
    saved = load_file(folder / "model.safetensors")
    packed = sum(".in_proj_" in n for n in weights)
    assert len(saved) == len(weights) + 2 * packed
    for original, hub in (
        ("transformer.decoder.layers.1.norm1.weight", "decoder.layers.1.encoder_attn_layer_norm.weight"),
        ("transformer.decoder.layers.1.norm2.weight", "decoder.layers.1.self_attn_layer_norm.weight"),
        (
            "transformer.decoder.layers.0.cross_attn.value_proj.bias",
            "decoder.layers.0.encoder_attn.value_proj.bias",
        ),
        ("transformer.level_embed", "level_embed"),
        ("input_proj.0.1.weight", "input_proj.0.1.weight"),
    ):
        assert torch.equal(saved[f"model.{hub}"], weights[original]), hub
    for original in (n for n in weights if n.startswith(("class_embed.", "bbox_embed."))):
        assert torch.equal(saved[original], weights[original]), original

    ours = DeformableDetrForObjectDetection.from_pretrained(folder)
    theirs = transformers.DeformableDetrForObjectDetection.from_pretrained(folder)
    config = ours.config
    assert config.dilation is name.endswith("dc5")
    assert config.num_feature_levels == variant.get("levels", 4)
    assert (config.with_box_refine, config.two_stage) == (
        variant.get("refine", False),
        variant.get("two_stage", False),
    )
    assert isinstance(DeformableDetrImageProcessor.from_pretrained(folder), DeformableDetrImageProcessor)
    image = torch.randn(1, 3, 192, 256, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = theirs(image), ours(image)
    assert found.logits.shape == (1, 300 if config.two_stage else 25, 3)
    assert_same_outputs(found, expected)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("deformable-detr", "class_embed.1.bias"),
        ("deformable-detr", "bbox_embed.1.layers.2.weight"),
        ("deformable-detr-with-box-refine", "transformer.decoder.bbox_embed.0.layers.1.bias"),
        ("deformable-detr-with-box-refine-two-stage", "transformer.decoder.class_embed.2.weight"),
    ],
)
def test_copies_of_one_head_that_differ_are_refused(name, tensor, tmp_path):
    shapes = {n: t.shape for n, t in deformable_detr_checkpoint(device="meta", **DEFORMABLE[name]).items()}
    weights = {n: torch.zeros(()).expand(shape) for n, shape in shapes.items()}
    torch.save({"model": weights | {tensor: torch.ones(shapes[tensor])}}, tmp_path / "d.pth")
    named = tensor.replace("transformer.", "model.").replace(".", r"\.")
    with pytest.raises(CheckpointError, match=rf"{named} and .* must be identical .* but differ$"):
        convert_checkpoint(tmp_path / "d.pth", tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_shared_head_may_be_saved_for_one_layer_only(tmp_path):
    tensors = deformable_detr_checkpoint(device="meta")
    shapes = {n: t.shape for n, t in tensors.items() if not n.startswith("bbox_embed.0.")}
    weights = {n: torch.full((), 0.5 * n.startswith("bbox_embed.")).expand(s) for n, s in shapes.items()}
    torch.save({"model": weights}, tmp_path / "d.pth")
    folder = convert_checkpoint(tmp_path / "d.pth", tmp_path / "out", "deformable-detr", verify=False)
    saved = load_file(folder / "model.safetensors")
    heads = [n for n in tensors if n.startswith("bbox_embed.")]
    assert len(heads) == 2 * 6
    assert all((saved[n] == 0.5).all() for n in heads)


def test_the_card_of_a_fine_tuned_checkpoint_claims_no_numbers(converted):
    card = ModelCard.load(converted / "README.md")
    assert card.data.library_name == "detrkit"
    assert card.data.license is None  # whoever trained it knows
    assert card.data.pipeline_tag == "object-detection"
    assert "detr" in card.data.tags
    assert "`checkpoint0299.pth`" in card.text
    assert "ResNet-50 (DC5) backbone, 3 categories and 25 object queries" in card.text
    assert "box AP" not in card.text


def test_a_checkpoint_of_91_classes_gets_cocos_names(tmp_path):
    path = save_zero_detr(tmp_path / "c.pth")
    folder = convert_checkpoint(path, tmp_path / "out", "detr-resnet-50", verify=False)
    config = DetrConfig.from_pretrained(folder)
    assert tuple(config.id2label.values()) == COCO_CLASSES
    assert list(config.id2label) == list(range(91))
    assert not config.dilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_become_single_precision(tmp_path, weights, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, tmp_path / "c.pth")
    saved = load_file(
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "out", "detr-resnet-50") / "model.safetensors"
    )
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    original = weights["class_embed.weight"].to(dtype).float()
    assert torch.equal(saved["class_labels_classifier.weight"], original)


@pytest.mark.parametrize(
    ("backbone", "name", "model_class"),
    [
        ("resnet18", "table-transformer-detection", TableTransformerForObjectDetection),
        ("resnet50", "detr-resnet-50", DetrForObjectDetection),
    ],
)
def test_pre_norm_layers_convert_as_table_transformer_or_detr(backbone, name, model_class, tmp_path):
    tensors = detr_checkpoint(backbone, num_labels=2, num_queries=15)
    tensors |= {f"transformer.encoder.norm.{part}": torch.full((32,), 0.5) for part in ("weight", "bias")}
    torch.save({"model": tensors}, tmp_path / "c.pth")
    folder = convert_checkpoint(tmp_path / "c.pth", tmp_path / "out", name)
    model = model_class.from_pretrained(folder)
    assert model.config.normalize_before
    assert (model.model.encoder.layernorm.bias == 0.5).all()
    processor = DetrImageProcessor.from_pretrained(folder)
    if name == "detr-resnet-50":
        assert (model.config.eos_coefficient, processor.size["longest_edge"]) == (0.1, 1333)
        return
    assert model.config.id2label == {0: "table", 1: "table rotated"}
    assert model.config.eos_coefficient == 0.4
    assert (processor.size, processor.resample) == ({"longest_edge": 800}, PIL.Image.Resampling.BICUBIC)
    theirs = transformers.TableTransformerForObjectDetection.from_pretrained(folder).eval()
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same_outputs(model.eval()(image), theirs(pixel_values=image))


def test_an_existing_folder_keeps_its_other_files(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "config.json").write_text("old")
    convert_checkpoint(checkpoint, tmp_path / "out", "detr-resnet-50", verify=False)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_queries"] == 25


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        (
            {"backbone": "resnet101"},
            "detr-resnet-50",
            r"DETR with a ResNet-101 backbone, not detr-resnet-50; convert it as detr-resnet-101$",
        ),
        ({"backbone": "resnet101"}, "detr-resnet-50-dc5", r"convert it as detr-resnet-101-dc5$"),
        (
            {},
            "detr-resnet-101",
            r"a ResNet-50 backbone, not detr-resnet-101; convert it as detr-resnet-50$",
        ),
        ({}, "facebook/detr-resnet-101-dc5", r"convert it as detr-resnet-50-dc5$"),
        ({}, "conditional-detr-resnet-50", r"is DETR with .*; convert it as detr-resnet-50$"),
        ({}, "deformable-detr", r"is DETR with .*; convert it as detr-resnet-50$"),
        (
            {},
            "detr-resnet-50-panoptic",
            r"is DETR with a ResNet-50 backbone, not .*; convert it as detr-resnet-50$",
        ),
        (
            {"backbone": "resnet18"},
            "detr-resnet-50",
            r"ResNet-18 backbone, .* no released checkpoint has this architecture$",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_its_name_is_refused_with_the_name_that_fits(
    tmp_path, options, name, message
):
    path = save_zero_detr(tmp_path / "c.pth", **options)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(path, tmp_path / "out", name)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("checkpoint", "name", "fitting"),
    [
        ("conditional-detr-resnet-50", "detr-resnet-50", "conditional-detr-resnet-50"),
        ("detr-resnet-50-panoptic", "detr-resnet-50", "detr-resnet-50-panoptic"),
        ("detr-resnet-50-panoptic", "detr-resnet-50-dc5", "detr-resnet-50-dc5-panoptic"),
        ("deformable-detr-with-box-refine", "deformable-detr", "deformable-detr-with-box-refine"),
        ("deformable-detr-single-scale", "deformable-detr", "deformable-detr-single-scale"),
        ("deformable-detr", "deformable-detr-single-scale-dc5", "deformable-detr"),
        (
            "deformable-detr-with-box-refine-two-stage",
            "detr-resnet-50",
            "deformable-detr-with-box-refine-two-stage",
        ),
    ],
)
def test_a_checkpoint_of_another_family_or_task_is_refused_with_the_name_that_fits(
    tmp_path, checkpoint, name, fitting
):
    path = save_zero_checkpoint(tmp_path / "c.pth", checkpoint)
    with pytest.raises(CheckpointError, match=rf"not {name}; convert it as {fitting}$"):
        convert_checkpoint(path, tmp_path / "out", name)


def test_a_misspelt_name_is_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(CheckpointError, match="did you mean 'detr-resnet-50"):
        convert_checkpoint(tmp_path / "gone.pth", tmp_path / "out", "detr-resnet50")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_embed.weight": None, "class_embed.bias": None}, r"lacks the tensor query_embed\.weight"),
        ({"class_embed.bias": None}, r"1 missing tensor: class_embed\.bias$"),
        (
            {"backbone.0.body.layer2.9.conv1.weight": (1,)},
            r"1 unexpected tensor: backbone\.0\.body\.layer2\.9\.",
        ),
        ({"class_embed.bias": (5,)}, r"1 tensor of the wrong shape: class_embed\.bias \(5 instead of 92\)$"),
        ({"dn_query.weight": (1,)}, r"1 unknown tensor: dn_query\.weight$"),
    ],
)
def test_tensors_that_do_not_make_up_the_model_are_named(tmp_path, change, message):
    tensors = {name: torch.zeros(()).expand(t.shape) for name, t in detr_checkpoint(device="meta").items()}
    tensors |= {name: None if shape is None else torch.zeros(shape) for name, shape in change.items()}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "out", "detr-resnet-50")
    assert not (tmp_path / "out").exists()


@contextmanager
def file_size_limit(size):
    """Makes writing beyond ``size`` bytes fail, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind(tmp_path, checkpoint):
    with (
        file_size_limit(1_000_000),
        pytest.raises(DetrkitError, match=rf"cannot write {tmp_path / 'out'}: .*too large"),
    ):
        convert_checkpoint(checkpoint, tmp_path / "out", "detr-resnet-50")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_reported(tmp_path, checkpoint):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DetrkitError, match="it is a file, not a folder"):
        convert_checkpoint(checkpoint, tmp_path / "out", "detr-resnet-50", verify=False)
    assert (tmp_path / "out").read_text() == "mine"


def test_weights_that_change_on_the_way_to_disk_fail_verification_and_leave_nothing(
    tmp_path, checkpoint, monkeypatch
):
    write = conversion._write

    def write_other_weights(folder, model, *rest):
        with torch.no_grad():
            model.class_labels_classifier.bias[2] += 1e-7
        write(folder, model, *rest)

    monkeypatch.setattr(conversion, "_write", write_other_weights)
    with pytest.raises(
        DetrkitError, match=r"verification failed: class_labels_classifier\.bias was not read back"
    ):
        convert_checkpoint(checkpoint, tmp_path / "out", "detr-resnet-50")
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_lost_on_the_way_to_disk_fails_verification(tmp_path, checkpoint, monkeypatch):
    write = conversion._write

    def write_without_dilation(folder, *rest):
        write(folder, *rest)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dilation": False}))

    monkeypatch.setattr(conversion, "_write", write_without_dilation)
    with pytest.raises(DetrkitError, match="verification failed: the written model gives different logits"):
        convert_checkpoint(checkpoint, tmp_path / "out", "detr-resnet-50-dc5")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_blow_up_are_refused(tmp_path, weights):
    broken = weights | {"class_embed.weight": torch.full_like(weights["class_embed.weight"], 3e38)}
    torch.save(broken, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="give infinite or undefined logits"):
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "out", "detr-resnet-50")
    assert not (tmp_path / "out").exists()


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_prints_the_folder_it_wrote(tmp_path, checkpoint):
    done = run_script(checkpoint, tmp_path / "out", "--model", "detr-resnet-50")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out'}\n", "")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def script(monkeypatch):
    """The script as a module, which spares its mistakes the import of torch."""
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "quiet_libraries", lambda: None)
    return module


def test_the_script_reports_a_mistake_in_one_line(script, tmp_path, capsys):
    gone = tmp_path / "gone.pth"
    assert script.main([str(gone), str(tmp_path / "out"), "--model", "detr-resnet-50"]) == 2
    assert capsys.readouterr() == ("", f"Error: no checkpoint at {gone}\n")


def test_the_script_shows_the_traceback_when_asked(script, tmp_path, capsys):
    arguments = [str(tmp_path / "gone.pth"), str(tmp_path / "out"), "--model", "detr-resnet-50", "--debug"]
    assert script.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "no checkpoint at" in errors.splitlines()[-1]
