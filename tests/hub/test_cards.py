import importlib.util
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from detrkit import DetectionConfig, Detector
from detrkit.benchmark.report import append_csv, make_rows
from detrkit.benchmark.sides import Settings
from detrkit.benchmark.turns import Times
from detrkit.checkpoints.cost import Cost, count_cost
from detrkit.checkpoints.registry import BUNDLED, REGISTRY
from detrkit.conversion.convert import released_architecture
from detrkit.errors import CheckpointError
from detrkit.evaluation.coco import STATISTICS
from detrkit.families import FAMILIES as FAMILIES_OF_CARDS
from detrkit.hub.card_facts import Facts, Speed, read_facts
from detrkit.hub.card_released import converted_card, released_card
from detrkit.hub.card_texts import BENCHMARKS
from detrkit.hub.card_trained import bundled_card, trained_card
from detrkit.hub.cards import plain_card
from detrkit.models.detr.configuration_detr import DetrConfig
from detrkit.training.recipe import TrainingRecipe
from tests.tiny import FAMILIES, tiny_config

CARDS = Path(__file__).parents[2] / "model_cards"
SECTIONS = (
    "Model description",
    "Intended uses and limits",
    "How to use",
    "Training",
    "Preprocessing",
    "Results",
    "Size and speed",
    "Where it fails",
    "Environmental impact",
    "How to cite",
)
MARKUP = ["<script>alert(1)</script>", "![x](http://example.com/x.png)", "a | b\n---\nlicense: other"]
STAND_INS = {
    ("detr", "detection"): "tiny_detr",
    ("detr", "panoptic"): "tiny_panoptic",
    ("table-transformer", "detection"): "tiny_table_transformer",
    ("conditional_detr", "detection"): "tiny_conditional_detr",
    ("deformable_detr", "detection"): "tiny_deformable_detr",
}


def load_generator():
    spec = importlib.util.spec_from_file_location("generate_cards", CARDS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def card_of(name):
    return released_card(REGISTRY[name], read_facts(name))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_cards_on_disk_are_those_that_the_generator_writes():
    cards = generate.all_cards()
    assert len(cards) == len(REGISTRY) + len(BUNDLED)
    assert {path.name for path in CARDS.glob("*.md")} == cards.keys()
    for name, text in cards.items():
        assert (CARDS / name).read_text(encoding="utf-8") == text, f"run {CARDS / 'generate.py'}"
    for name, folder in BUNDLED.items():
        assert (folder / "README.md").read_text(encoding="utf-8") == cards[f"{name}.md"]


def test_the_facts_hold_the_measured_speeds():
    facts = json.loads((CARDS.parent / "src/detrkit/hub/card_facts.json").read_text(encoding="utf-8"))
    speeds = generate.read_speeds()
    assert {name: entry["speeds"] for name, entry in facts.items() if "speeds" in entry} == {
        name: speeds[name] for name in facts if name in speeds
    }


def test_the_counted_cost_is_that_of_the_facts():
    assert asdict(generate.count("detr-resnet-50")) == asdict(read_facts("detr-resnet-50").cost)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*REGISTRY, *BUNDLED}))
def test_all_counted_costs_are_those_of_the_facts(name):
    assert asdict(generate.count(name)) == asdict(read_facts(name).cost)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_costs_are_near_the_published_ones(name):
    entry, cost = REGISTRY[name], read_facts(name).cost
    if entry.params is not None:
        assert cost.parameters / 1e6 == pytest.approx(entry.params, abs=1)
        # Images of COCO are resized to 800x1066 or a little more or less.
        assert cost.macs / 1e9 == pytest.approx(entry.gflops, rel=0.1)
    assert (cost.sampling_macs > 0) == (entry.family == "deformable_detr")


@pytest.mark.parametrize("family", ["detr", "deformable_detr_two_stage"])
def test_the_cost_counts_what_a_file_holds(family, tmp_path):
    folder = FAMILIES[family].save(tmp_path / "tiny")
    detector = Detector.from_pretrained(folder, device="cpu")
    cost = count_cost(type(detector.model), detector.model.config, (64, 96))
    size = (folder / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert cost.bytes == size - header


@pytest.mark.parametrize("name", REGISTRY)
def test_a_card_has_every_section_and_front_matter_that_the_hub_reads(name):
    entry, card = REGISTRY[name], ModelCard.load(CARDS / f"{name}.md")
    panoptic = entry.task == "panoptic"
    task = "image-segmentation" if panoptic else "object-detection"
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "detrkit",
        FAMILIES_OF_CARDS[entry.family].licence,
        task,
    )
    assert card.data.datasets == [BENCHMARKS[entry.benchmark].dataset]
    assert {task, "vision", entry.family.replace("_", "-")} == set(card.data.tags)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results or ()}
    for number, published in (("AP", entry.ap), ("APsmall", entry.ap_small), ("PQ", entry.pq)):
        assert results.get(number) == (None if published is None else pytest.approx(published / 100))

    assert tuple(re.findall("^## (.*)$", card.text, flags=re.MULTILINE)) == SECTIONS
    assert "More Information" not in card.text
    assert "The authors of detrkit wrote this one" in card.text.replace("\n", " ")
    hours = {"deformable-detr": "325 GPU hours", "detr-resnet-50-dc5": "7,000 GPU hours"}.get(name, "")
    assert hours in card.text.replace("\n", " ")
    assert "None" not in card.text
    assert f"{entry.num_labels} categories and {entry.num_queries} object queries" in card.text.replace(
        "\n", " "
    )
    assert entry.url in card.text
    assert f"| {read_facts(name).cost.macs / 1e9:.1f} G |" in card.text
    assert ("DC5 models" in card.text) == entry.dilation
    assert ("samples of deformable attention" in card.text) == (entry.family == "deformable_detr")
    assert ("```bash\ndetrkit convert" in card.text) == (entry.hub_id is None)


# The three versions 1.1 have the cards of version 1.0 but for names and data.
@pytest.mark.parametrize("name", [name for name in REGISTRY if "-v1.1-" not in name])
def test_the_snippets_of_a_card_run(name, request, pictures, detrkit_here, working_directory):
    entry = REGISTRY[name]
    stand_in = request.getfixturevalue(STAND_INS[entry.family, entry.task])
    link = working_directory / (entry.hub_id or name)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(stand_in)
    shutil.copy(pictures[0], working_directory / "photo.jpg")
    text = card_of(name)
    snippets = blocks(text, "python")
    assert len(snippets) == 2
    for snippet in snippets:
        namespace = {}
        exec(snippet, namespace)
        assert {"detections", "segmentation", "results", "result"} & namespace.keys()
    drawn = "photo_segments.jpg" if entry.task == "panoptic" else "photo_boxes.jpg"
    assert (working_directory / drawn).exists()
    commands = [line.split() for block in blocks(text, "bash") for line in block.splitlines()]
    for _, verb, *arguments in commands:
        if verb in ("detect", "segment"):
            found = detrkit_here(verb, *arguments)
            assert found.returncode == 0, found.stderr
    assert list((working_directory / "out").iterdir())
    assert {verb for _, verb, *_ in commands} >= {"evaluate"}


def test_measured_speeds_have_rows_and_those_that_are_not_have_none(tmp_path):
    cost = Cost(parameters=1, macs=1, sampling_macs=0, bytes=1, height=800, width=1066)
    for batch, seconds in ((1, 0.25), (4, 0.75)):
        settings = Settings(
            maker="", model="", engine="onnx", height=800, width=1066, batch=batch, threads=2, device="cpu",
            dtype="float32", threshold=0.5,
        )  # fmt: skip
        sides = [
            Times(name, seconds={"forward": [seconds * factor]})
            for name, factor in (("onnx", 1), ("transformers", 2))
        ]
        about = {"model": "facebook/detr-resnet-50", "allocator": "as is"}
        configuration = {"processor": "a laptop", "threads": 2}
        rows = make_rows(sides, settings, cost, 1.0, about=about, configuration=configuration)
        append_csv(tmp_path / "speed.csv", rows)
    speeds = (tmp_path / "speed.csv").read_text(encoding="utf-8").replace("0.25", "9.9")
    varied = speeds.replace("model,", "axis,model,", 1).replace("\nfacebook", "\nqueries,facebook")
    (tmp_path / "varied.csv").write_text(varied, encoding="utf-8")
    (tmp_path / "other.csv").write_text("losses,ms\nfocal,3\n", encoding="utf-8")
    (measured,) = generate.read_speeds(tmp_path)["detr-resnet-50"]
    facts = replace(read_facts("detr-resnet-50"), speeds=(Speed(**measured),))
    row = "| onnx, forward, 800x1066, a laptop, 2 threads | 0.25 s an image |  |"
    assert row in released_card(REGISTRY["detr-resnet-50"], facts)
    assert "onnx" not in released_card(REGISTRY["detr-resnet-50"], replace(facts, speeds=()))


@pytest.mark.parametrize("name", REGISTRY)
def test_a_converted_release_gets_the_same_card_under_its_own_name(name):
    entry = REGISTRY[name]
    architecture = released_architecture(entry)
    text = converted_card(entry, read_facts(name), "mine", "file.pth", architecture, released=True)
    assert "# mine\n" in text
    assert "weights are those of `file.pth`" in text.replace("\n", " ")
    held = "apply here only if `file.pth` is that file" in text.replace("\n", " ")
    assert held == (entry.ap is not None)
    ours, theirs = (
        re.sub(r"\s+", " ", card.split("## Training")[1].split("## Results")[0])
        for card in (text, card_of(name))
    )
    assert ours == theirs
    assert f"| {read_facts(name).cost.macs / 1e9:.1f} G |" in text


def test_nothing_is_claimed_for_tensors_that_cannot_be_the_released_ones():
    entry = REGISTRY["detr-resnet-50"]
    architecture = replace(released_architecture(entry), num_labels=4)
    cost = Cost(parameters=7_000_000, macs=0, sampling_macs=0, bytes=0, height=800, width=1066)
    text = converted_card(entry, Facts(cost=cost), "mine", "file.pth", architecture, released=False)
    assert "AP" not in text
    assert not any(word in text for word in ("42.0", "41 M", "COCO", "Flickr", "V100"))
    assert "| parameters | 7.0 M |\n" in text
    assert (ModelCard(text).data.eval_results, ModelCard(text).data.license) == (None, None)


@pytest.fixture(scope="module")
def blood_cells(tmp_path_factory):
    """A stand-in of the bundled model: untrained, with the files that a run and an evaluation leave."""
    folder = FAMILIES["deformable_detr_two_stage"].save(tmp_path_factory.mktemp("bundled") / "blood-cells")
    stats = dict.fromkeys(STATISTICS, 0.5)
    classes = [
        {"id": 1, "name": "Platelets", "objects": 76, **stats, "AP": 0.321},
        {"id": 2, "name": "RBC", "objects": 967, **stats, "AP": 0.654, "APsmall": -1},
        {"id": 3, "name": "WBC", "objects": 0, **stats, "AP": -1},
    ]
    boxes = {**stats, "AP": 0.4567, "per_class": classes}
    evaluation = {"images": 87, "seconds_per_image": 0.1, "boxes": boxes}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    recipe = TrainingRecipe(
        model="deformable-detr",
        from_scratch=True,
        epochs=100,
        queries=60,
        learning_rate=3e-4,
        **dict.fromkeys(
            ("train_images", "train_annotations", "val_images", "val_annotations", "output"), "x"
        ),
    )
    recipe.save(folder / "recipe.json")
    tuning = {"steps": 612, "epochs": 12.0, "batch_size": 4, "ema_decay": 0.997, "queries": 12}
    tuning |= {"kept": "The last.", "learning_rate": 2e-4, "backbone_learning_rate": 1e-4}
    tuning |= {"augmentation": {"window": [0.75, 1.25]}}
    again = {**tuning, "steps": 2000, "class_targets": "iou", "kept": "The average of both."}
    (folder / "fine_tuning.json").write_text(json.dumps([tuning, again]), encoding="utf-8")
    measured = {"cross_fitted": True, "precision": 0.75, "recall": 0.85, "F1": 0.797}
    DetectionConfig(
        threshold=0.4, overlap=0.7, class_agnostic=True, chosen={"measured": measured}
    ).save_pretrained(folder)
    (folder / "metrics.csv").write_text(
        "step,epoch,loss,AP\n50,1.0,9.5,\n100,2.0,5.5,0.2\n150,3.0,5.2,0.45\n200,4.0,5.1,0.44\n",
        encoding="utf-8",
    )
    return folder


def test_the_card_of_the_bundled_model_reads_the_files_beside_it(blood_cells):
    card = ModelCard(bundled_card(blood_cells, Facts()))
    text = " ".join(card.text.split())
    own = tuple(section for section in SECTIONS if section != "Environmental impact")
    assert tuple(re.findall("^## (.*)$", card.text, flags=re.MULTILINE)) == own
    assert "| all | 45.7 | 50.0 |" in text
    assert "| Platelets | 32.1 |" in text
    assert "| RBC | 65.4 | 50.0 | 50.0 | - |" in text
    assert "| WBC |" not in text  # not in the validation split
    assert "**Platelets**: their AP is the lowest, 32.1. The AP of RBC is 65.4." in text
    assert "for 100 epochs with batches of 4 images: AdamW with a learning rate of 0.0003" in text
    assert "of epoch 3, which was the best" in text
    assert "12 instead of 60 queries" in text
    assert "in two runs" in text
    assert "- 612 steps (12 epochs) with batches of 4 images" in text
    assert (
        "crops of 0.75 to 1.25 times the image's sides, an average of the weights with decay 0.997. The last."
        in text
    )
    assert "decay 0.997, and scores trained to predict the IoU of their boxes" in text
    assert "(`--class-targets iou`). The average of both." in text
    assert "in `detection_config.json`: threshold 0.4." in text
    assert "| precision | recall | F1 | | :--- | ---: | ---: | | 75.0 | 85.0 | 79.7 |" in text
    assert "Of two boxes of any class with an IoU above 0.7, the one with the lower score is dropped." in text
    assert 'detector("photo.jpg")' in text
    assert "--threshold" not in text
    assert "12 object queries. The model has 4 classes" in text
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["AP"] == 0.4567
    assert "None" not in text


def trained(**recipe):
    """The card of a model that ``detrkit train`` just made."""
    options = {"epochs": 12, "output": "somewhere/mine", "model": "facebook/detr-resnet-50", **recipe}
    data = ("train_images", "train_annotations", "val_images", "val_annotations")
    config = tiny_config(DetrConfig, num_labels=2, id2label={0: "disc", 1: "square"}).to_dict()
    row = {"epoch": 7.0, "AP": 0.4567, "AP50": 0.5, "APsmall": -1, "loss": 3.0}
    fields = TrainingRecipe(**options, **dict.fromkeys(data, "x")).to_dict()
    return ModelCard(trained_card("mine", config, fields, row, dataset="val.json", images=20))


def test_the_card_of_a_fine_tuned_model_says_what_was_measured_and_how_it_was_trained():
    card = trained()
    text = card.text.replace("\n", " ")
    assert "DETR for 2 classes, trained with `detrkit train`." in text
    assert "2 classes: disc, square." in text
    assert "On `val.json` (20 images), in percent:  | AP | AP50 | | :--- | ---: | | 45.7 | 50.0 |" in text
    assert (
        "Trained from `facebook/detr-resnet-50` with `detrkit train` for 12 epochs with batches of 4 images"
        in text
    )
    assert "AdamW with a learning rate of 0.0001" in text
    assert "of epoch 7, which was the best" in text
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {"AP": 0.4567, "AP50": 0.5}
    assert card.data.base_model == "facebook/detr-resnet-50"
    assert 'detector("photo.jpg")' in text  # the threshold is that of the model
    assert "--threshold" not in text
    assert "filter in `detection_config.json`" in text
    assert card.data.license is None  # whoever trained it decides
    assert "None" not in text


def test_the_card_of_a_fine_tuned_model_does_not_name_local_folders(tmp_path):
    start = tmp_path / "earlier"
    start.mkdir()
    card = trained(model=str(start))
    assert "from `earlier` with" in card.text.replace("\n", " ")
    assert str(tmp_path) not in card.content
    assert card.data.base_model is None


@pytest.mark.parametrize(
    ("options", "text"),
    [({}, "from random weights"), ({"pretrained_backbone": True}, "from an ImageNet backbone")],
)
def test_the_card_of_a_model_trained_from_scratch_says_so(options, text):
    assert text in trained(model="detr", from_scratch=True, **options).text


def test_a_model_on_the_hub_is_loaded_by_its_whole_name():
    card = plain_card({"model_type": "detr", "id2label": {"0": "cat"}}, "me/my-detr")
    assert "# my-detr\n" in card
    assert 'Detector.from_pretrained("me/my-detr")' in card


def test_the_snippets_of_the_bundled_models_card_run(
    blood_cells, pictures, detrkit_here, working_directory, monkeypatch
):
    monkeypatch.setitem(BUNDLED, "blood-cells", blood_cells)
    shutil.copy(pictures[0], working_directory / "photo.jpg")
    text = bundled_card(blood_cells, Facts())
    (snippet,) = blocks(text, "python")
    exec(snippet, {})
    assert (working_directory / "photo_boxes.jpg").exists()
    (command,) = blocks(text, "bash")
    assert detrkit_here(*command.split()[1:]).returncode == 0


@pytest.mark.parametrize("name", ["recipe.json", "evaluation.json", "metrics.csv", "detection_config.json"])
def test_a_bundled_model_without_its_records_gets_no_card(blood_cells, tmp_path, name):
    folder = tmp_path / "blood-cells"
    shutil.copytree(blood_cells, folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        bundled_card(folder, Facts())
    (folder / name).write_text("{}" if name.endswith("json") else "epoch\n1\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="do not make a model card"):
        bundled_card(folder, Facts())


def test_names_of_classes_have_no_effect_in_a_card() -> None:
    config = {**DetrConfig().to_dict(), "id2label": dict(enumerate(MARKUP))}
    text = re.sub(r"`[^`]*`", "", plain_card(config, "a model"))
    assert not [mark for mark in ("<script>", "![x]", "license: other") if mark in text]
