"""The calls of model cards and pipelines, made by a fresh process on a Hub that the test serves."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detrkit.errors import CheckpointError
from tests.conftest import make_picture
from tests.golden import HUB, GoldenCase
from tests.hub.server import HubServer, folder_files

REPOSITORY = "facebook/detr-resnet-101"


def run_python(code: str, hub: HubServer, home: Path, *arguments: str) -> Any:
    """Runs code in a process that knows this Hub only; gives the JSON value that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=hub.environment(home),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tiny_detr: Path) -> Iterator[HubServer]:
    """A Hub whose facebook/detr-resnet-101 is the tiny model, with another class name on ``main``."""
    files = dict(folder_files(tiny_detr))
    config = json.loads((tiny_detr / "config.json").read_text())
    config["id2label"]["1"] = "cat on main"
    config.pop("label2id", None)
    with HubServer(
        {REPOSITORY: {"no_timm": files, "main": files | {"config.json": json.dumps(config).encode()}}}
    ) as hub:
        yield hub


CONDITIONAL = "microsoft/conditional-detr-resnet-50"


@pytest.fixture(scope="module")
def conditional_hub(tiny_conditional_detr: Path) -> Iterator[HubServer]:
    """A Hub whose microsoft/conditional-detr-resnet-50 is the tiny model."""
    with HubServer({CONDITIONAL: {"main": folder_files(tiny_conditional_detr)}}) as hub:
        yield hub


PANOPTIC = "facebook/detr-resnet-50-panoptic"


@pytest.fixture(scope="module")
def panoptic_hub(tiny_panoptic: Path) -> Iterator[HubServer]:
    """A Hub whose facebook/detr-resnet-50-panoptic is the tiny model."""
    with HubServer({PANOPTIC: {"main": folder_files(tiny_panoptic)}}) as hub:
        yield hub


DEFORMABLE = "SenseTime/deformable-detr-with-box-refine-two-stage"


@pytest.fixture(scope="module")
def deformable_hub(tiny_deformable_detr: Path) -> Iterator[HubServer]:
    """A Hub whose two-stage Deformable DETR is the tiny model."""
    with HubServer({DEFORMABLE: {"main": folder_files(tiny_deformable_detr)}}) as hub:
        yield hub


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "room.png"
    make_picture(120, 80).save(path)
    return path


# The snippet of the model card; only the import differs from what stands there.
CARD = """
import json, sys
from detrkit import DetrImageProcessor, DetrForObjectDetection
import torch
from PIL import Image

image = Image.open(sys.argv[1])

processor = DetrImageProcessor.from_pretrained("facebook/detr-resnet-101", revision="no_timm")
model = DetrForObjectDetection.from_pretrained("facebook/detr-resnet-101", revision="no_timm")

inputs = processor(images=image, return_tensors="pt")
outputs = model(**inputs)

target_sizes = torch.tensor([image.size[::-1]])
results = processor.post_process_object_detection(outputs, target_sizes=target_sizes, threshold=0.2)[0]

found = []
for score, label, box in zip(results["scores"], results["labels"], results["boxes"]):
    box = [round(i, 2) for i in box.tolist()]
    found.append([model.config.id2label[label.item()], round(score.item(), 3), box])
print(json.dumps(found))
"""


def test_the_model_cards_snippet_runs_with_only_the_import_changed(
    hub: HubServer, tiny_detr: Path, picture: Path, tmp_path: Path
) -> None:
    from detrkit import Detector

    hub.requests.clear()
    found = run_python(CARD, hub, tmp_path, str(picture))
    wanted = Detector.from_pretrained(tiny_detr, device="cpu")(picture, threshold=0.2)
    assert len(wanted) > 0
    assert sorted(name for name, _, _ in found) == sorted(wanted.names)
    assert sorted(score for _, score, _ in found) == pytest.approx(sorted(wanted.scores.tolist()), abs=2e-3)
    # Nothing else was asked for: no weights of the backbone, no other repository.
    assert hub.repositories_asked_for() == {REPOSITORY}
    assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= hub.files_fetched()


# The snippet of Conditional DETR's card, which leaves the processor to the auto class.
CONDITIONAL_CARD = """
import json, sys
import detrkit; detrkit.register()
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from detrkit import ConditionalDetrForObjectDetection
import torch
from PIL import Image

image = Image.open(sys.argv[1])

processor = AutoImageProcessor.from_pretrained("microsoft/conditional-detr-resnet-50")
model = ConditionalDetrForObjectDetection.from_pretrained("microsoft/conditional-detr-resnet-50")

inputs = processor(images=image, return_tensors="pt")
outputs = model(**inputs)

target_sizes = torch.tensor([image.size[::-1]])
results = processor.post_process_object_detection(outputs, target_sizes=target_sizes, threshold=0.2)[0]

found = []
for score, label, box in zip(results["scores"], results["labels"], results["boxes"]):
    box = [round(i, 2) for i in box.tolist()]
    found.append([model.config.id2label[label.item()], round(score.item(), 3), box])

pipe = detrkit.pipeline("object-detection", model="conditional-detr-resnet-50")
auto = AutoModelForObjectDetection.from_pretrained("microsoft/conditional-detr-resnet-50")
made = (processor, auto, pipe.model, pipe.image_processor)
print(json.dumps({
    "found": found,
    "pipeline": pipe(sys.argv[1], threshold=0.2),
    "modules": sorted({type(thing).__module__ for thing in made}),
}))
"""


def test_conditional_detrs_card_pipeline_and_auto_classes_agree_with_the_detector(
    conditional_hub: HubServer, tiny_conditional_detr: Path, picture: Path, tmp_path: Path
) -> None:
    from detrkit import Detector

    answer = run_python(CONDITIONAL_CARD, conditional_hub, tmp_path, str(picture))
    wanted = Detector.from_pretrained(tiny_conditional_detr, device="cpu")(picture, threshold=0.2)
    assert len(wanted) > 0
    assert [name for name, _, _ in answer["found"]] == wanted.names
    assert [score for _, score, _ in answer["found"]] == pytest.approx(wanted.scores.tolist(), abs=1e-3)
    for (_, _, box), expected in zip(answer["found"], wanted.boxes.tolist()):
        assert box == pytest.approx(expected, abs=0.05)
    assert [entry["label"] for entry in answer["pipeline"]] == wanted.names
    package = "detrkit.models.conditional_detr"
    assert answer["modules"] == [
        f"{package}.image_processing_conditional_detr",
        f"{package}.modeling_conditional_detr",
    ]
    assert conditional_hub.repositories_asked_for() == {CONDITIONAL}


# The snippet of Deformable DETR's card; it tells only detections of a score above 0.7.
DEFORMABLE_CARD = """
import json, sys
import detrkit; detrkit.register()
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from detrkit import DeformableDetrForObjectDetection
import torch
from PIL import Image

image = Image.open(sys.argv[1])

processor = AutoImageProcessor.from_pretrained("SenseTime/deformable-detr-with-box-refine-two-stage")
model = DeformableDetrForObjectDetection.from_pretrained("SenseTime/deformable-detr-with-box-refine-two-stage")

inputs = processor(images=image, return_tensors="pt")
outputs = model(**inputs)

target_sizes = torch.tensor([image.size[::-1]])
results = processor.post_process_object_detection(outputs, target_sizes=target_sizes, threshold=0.7)[0]

found = []
for score, label, box in zip(results["scores"], results["labels"], results["boxes"]):
    box = [round(i, 2) for i in box.tolist()]
    found.append([model.config.id2label[label.item()], round(score.item(), 3), box])

pipe = detrkit.pipeline("object-detection", model="deformable-detr-with-box-refine-two-stage")
auto = AutoModelForObjectDetection.from_pretrained("SenseTime/deformable-detr-with-box-refine-two-stage")
made = (processor, auto, pipe.model, pipe.image_processor)
print(json.dumps({
    "found": found,
    "pipeline": pipe(sys.argv[1], threshold=0.7),
    "modules": sorted({type(thing).__module__ for thing in made}),
}))
"""  # noqa: E501


def test_deformable_detrs_card_pipeline_and_auto_classes_agree_with_the_detector(
    deformable_hub: HubServer, tiny_deformable_detr: Path, picture: Path, tmp_path: Path
) -> None:
    from detrkit import Detector

    answer = run_python(DEFORMABLE_CARD, deformable_hub, tmp_path, str(picture))
    detector = Detector.from_pretrained(tiny_deformable_detr, device="cpu")
    wanted = detector(picture, threshold=0.7)
    assert 0 < len(wanted) < len(detector(picture, threshold=0))
    assert [name for name, _, _ in answer["found"]] == wanted.names
    assert [score for _, score, _ in answer["found"]] == pytest.approx(wanted.scores.tolist(), abs=1e-3)
    for (_, _, box), expected in zip(answer["found"], wanted.boxes.tolist()):
        assert box == pytest.approx(expected, abs=0.05)
    assert [entry["label"] for entry in answer["pipeline"]] == wanted.names
    package = "detrkit.models.deformable_detr"
    assert answer["modules"] == [
        f"{package}.image_processing_deformable_detr",
        f"{package}.modeling_deformable_detr",
    ]
    assert deformable_hub.repositories_asked_for() == {DEFORMABLE}


@pytest.mark.parametrize("fixture", ["tiny_conditional_detr", "tiny_deformable_detr"])
def test_the_command_line_detects_with_the_other_families(
    fixture: str, picture: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from detrkit import Detector
    from detrkit.cli import run

    tiny = request.getfixturevalue(fixture)
    out = tmp_path / "found.json"
    arguments = ["detect", picture, "--model", tiny, "--threshold", 0.2, "--json", out]
    assert run([*map(str, arguments), "--device", "cpu"]) == 0
    wanted = Detector.from_pretrained(tiny, device="cpu")(picture, threshold=0.2)
    assert len(wanted) > 0
    scores = [entry["score"] for entry in json.loads(out.read_text())["annotations"]]
    assert scores == pytest.approx(wanted.scores.tolist(), abs=1e-4)


DETECTOR = """
import json, sys
from detrkit import Detector
picture, model = sys.argv[1:]
names = [Detector.from_pretrained(model, revision=revision).names[1] for revision in (None, "no_timm")]
found = Detector.from_pretrained(model)(picture, threshold=0)
print(json.dumps({"names": names, "found": len(found)}))
"""


@pytest.mark.parametrize("model", [REPOSITORY, "detr-resnet-101"])
def test_the_detector_loads_hub_ids_short_names_and_revisions(
    hub: HubServer, picture: Path, tmp_path: Path, model: str
) -> None:
    answer = run_python(DETECTOR, hub, tmp_path, str(picture), model)
    assert answer == {"names": ["cat on main", "cat"], "found": 12}


MISSING = """
import json, sys
from detrkit import Detector
from detrkit.errors import CheckpointError
said = []
for model, revision in (("someone/no-such-model", None), ("facebook/detr-resnet-101", "no-such-branch")):
    try:
        Detector.from_pretrained(model, revision=revision)
    except CheckpointError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_what_the_hub_does_not_have_is_named_in_one_line(hub: HubServer, tmp_path: Path) -> None:
    no_model, no_branch = run_python(MISSING, hub, tmp_path)
    assert "someone/no-such-model" in no_model
    assert "no-such-branch" in no_branch
    assert "\n" not in no_model + no_branch


# The snippet of the panoptic card; gradients are on in it.
PANOPTIC_CARD = """
import io, json, sys
from PIL import Image
import torch
import numpy
from detrkit import DetrFeatureExtractor, DetrForSegmentation
from detrkit import rgb_to_id

image = Image.open(sys.argv[1])

feature_extractor = DetrFeatureExtractor.from_pretrained("facebook/detr-resnet-50-panoptic")
model = DetrForSegmentation.from_pretrained("facebook/detr-resnet-50-panoptic")

inputs = feature_extractor(images=image, return_tensors="pt")
outputs = model(**inputs)

processed_sizes = torch.as_tensor(inputs["pixel_values"].shape[-2:]).unsqueeze(0)
result = feature_extractor.post_process_panoptic(outputs, processed_sizes, threshold=0.5)[0]

panoptic_seg = Image.open(io.BytesIO(result["png_string"]))
panoptic_seg = numpy.array(panoptic_seg, dtype=numpy.uint8)
panoptic_seg_id = rgb_to_id(panoptic_seg)

import detrkit
pipe = detrkit.pipeline("image-segmentation", model="detr-resnet-50-panoptic")
found = pipe(sys.argv[1], threshold=0.5, overlap_mask_area_threshold=0.0)
print(json.dumps({
    "size": list(panoptic_seg_id.shape[::-1]),
    "areas": {int(i): int((panoptic_seg_id == i).sum()) for i in numpy.unique(panoptic_seg_id)},
    "segments": result["segments_info"],
    "module": type(pipe.model).__module__,
    "pipeline": [[one["label"], one["score"], int((numpy.asarray(one["mask"]) > 0).sum())] for one in found],
}))
"""


def test_the_panoptic_card_and_pipeline_agree_with_the_detector(
    panoptic_hub: HubServer, tiny_panoptic: Path, picture: Path, tmp_path: Path
) -> None:
    from PIL import Image

    from detrkit import Detector

    answer = run_python(PANOPTIC_CARD, panoptic_hub, tmp_path, str(picture))
    detector = Detector.from_pretrained(tiny_panoptic, device="cpu")
    wanted = detector.segment(picture, threshold=0.5)
    assert len(wanted) >= 2
    with Image.open(picture) as image:
        shortest = 64 / min(image.size)
    assert answer["size"] == pytest.approx([side * shortest for side in wanted.image_size[::-1]], abs=1)
    assert [s["category_id"] for s in answer["segments"]] == [s["category_id"] for s in wanted.segments]
    areas = {int(key): area for key, area in answer["areas"].items() if key != "0"}
    assert areas == {s["id"]: s["area"] for s in answer["segments"]}
    assert answer["module"] == "detrkit.models.detr.modeling_detr"
    # Segments that win nothing of their own mask are left out there.
    assert {label for label, _, _ in answer["pipeline"]} <= set(wanted.names)
    assert answer["pipeline"]
    assert panoptic_hub.repositories_asked_for() == {PANOPTIC}


AUTO = """
import json, sys
import detrkit, transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

image, folder = sys.argv[1:]
before = type(AutoConfig.from_pretrained(folder)).__module__
detrkit.register()
detrkit.register()
from transformers.models.auto import modeling_auto
from detrkit.families import FAMILIES

answer = {"before": before, "mappings": {}, "auto": {}, "pipelines": {}, "backends": {}, "types": {}}
module = lambda thing: type(thing).__module__
for table, classes in vars(modeling_auto).items():
    for model_type, name in classes.items() if table.startswith("MODEL") and table.endswith("_NAMES") else ():
        if model_type in FAMILIES:
            config = type(AutoConfig.for_model(model_type))
            model = getattr(modeling_auto, table.removesuffix("_NAMES"))[config]
            answer["mappings"][f"{table} {model_type}"] = [name, model.__name__, model.__module__]
answer["extractor"] = module(transformers.AutoFeatureExtractor.from_pretrained(folder))
auto_classes = (AutoConfig, AutoModel, AutoModelForObjectDetection, AutoImageProcessor)
for where in (folder, "facebook/detr-resnet-101"):
    made = [auto.from_pretrained(where) for auto in auto_classes]
    answer["auto"][where] = [f"{module(m)}.{type(m).__name__}" for m in made]
for where in (folder, "facebook/detr-resnet-101", "detr-resnet-101"):
    pipe = detrkit.pipeline("object-detection", model=where)
    found = pipe(image, threshold=0.2)
    answer["pipelines"][where] = [module(pipe.model), module(pipe.image_processor), found]
answer["prepared"] = pipe.model.is_prepared
from PIL import Image

room = Image.open(image).convert("RGB")
sizes = [room.resize(size) for size in ((120, 80), (80, 120), (120, 80), (90, 90))]
given = (sizes, (one for one in sizes))
answer["batched"] = [list(pipe(many, batch_size=2, threshold=0.2)) for many in given]
answer["one by one"] = [pipe(one, threshold=0.2) for one in sizes]
pipe = transformers.pipeline("object-detection", model=folder)
found = pipe(image, threshold=0.2)
answer["pipelines"]["transformers"] = [module(pipe.model), module(pipe.image_processor), found]
for backend in ("pil", "torchvision", None):
    answer["backends"][str(backend)] = module(AutoImageProcessor.from_pretrained(folder, backend=backend))
config_file = folder + "/preprocessor_config.json"
config = json.load(open(config_file))
config.pop("image_processor_type", None)
forms = [{}]
forms += [{key: "DetrFeatureExtractor"} for key in ("feature_extractor_type", "image_processor_type")]
forms += [{"image_processor_type": "DetrImageProcessor" + suffix} for suffix in ("", "Fast", "Pil")]
for form in forms:
    json.dump(config | form, open(config_file, "w"))
    answer["types"][json.dumps(form)] = module(AutoImageProcessor.from_pretrained(folder))
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def registered(
    hub: HubServer, tiny_detr: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What a process sees that calls ``detrkit.register()`` and ``detrkit.pipeline()``."""
    import shutil

    folder = tmp_path_factory.mktemp("auto") / "tiny"
    shutil.copytree(tiny_detr, folder)
    answer = run_python(AUTO, hub, tmp_path_factory.mktemp("home"), str(picture), str(folder))
    return answer | {"folder": str(folder)}


def test_register_makes_the_auto_classes_give_detrkits_classes(registered: Any) -> None:
    assert registered["before"].startswith("transformers.")
    assert len(registered["auto"]) == 2
    for names in registered["auto"].values():
        assert names == [
            "detrkit.models.detr.configuration_detr.DetrConfig",
            "detrkit.models.detr.modeling_detr.DetrModel",
            "detrkit.models.detr.modeling_detr.DetrForObjectDetection",
            "detrkit.models.detr.image_processing_detr.DetrImageProcessor",
        ]


def test_register_covers_every_mapping_in_which_transformers_has_these_model_types(registered: Any) -> None:
    assert "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES detr" in registered["mappings"]
    for wanted, name, module in registered["mappings"].values():
        assert name == wanted
        assert module.startswith("detrkit.models.")
    assert registered["extractor"].startswith("detrkit.models.")


def test_register_covers_every_backend_and_class_name_of_the_image_processor(registered: Any) -> None:
    modules = {**registered["backends"], **registered["types"]}
    assert len(modules) == 9
    assert set(modules.values()) == {"detrkit.models.detr.image_processing_detr"}


def test_pipelines_run_detrkits_model_and_processor(registered: Any, tiny_detr: Path, picture: Path) -> None:
    from detrkit import Detector

    wanted = Detector.from_pretrained(tiny_detr, device="cpu")(picture, threshold=0.2)
    assert set(registered["pipelines"]) == {
        registered["folder"],
        REPOSITORY,
        "detr-resnet-101",
        "transformers",
    }
    for model, processor, found in registered["pipelines"].values():
        assert model == "detrkit.models.detr.modeling_detr"
        assert processor == "detrkit.models.detr.image_processing_detr"
        scores = sorted((entry["score"] for entry in found), reverse=True)
        assert scores == pytest.approx(wanted.scores.tolist(), abs=1e-4)
        assert all(set(entry["box"]) == {"xmin", "ymin", "xmax", "ymax"} for entry in found)


def test_a_pipeline_is_prepared_and_takes_batches_of_mixed_sizes(registered: Any) -> None:
    assert registered["prepared"]
    assert sum(map(len, registered["one by one"])) > 4
    for found in registered["batched"]:
        for together, alone in zip(found, registered["one by one"], strict=True):
            assert [entry["box"] for entry in together] == [entry["box"] for entry in alone]
            scores = [entry["score"] for entry in together]
            assert scores == pytest.approx([entry["score"] for entry in alone], abs=1e-4)


def test_a_pipeline_of_a_misspelt_name_is_refused_with_a_suggestion() -> None:
    from detrkit import pipeline

    with pytest.raises(CheckpointError, match="detr-resnet-101"):
        pipeline("object-detection", model="detr-resnet-1O1")


FULL_SIZE = """
import json, sys
import numpy as np, torch
from detrkit import DetrForObjectDetection, DetrImageProcessor

processor = DetrImageProcessor.from_pretrained("facebook/detr-resnet-101", revision="no_timm")
model = DetrForObjectDetection.from_pretrained("facebook/detr-resnet-101", revision="no_timm").eval()
batch = np.load(sys.argv[1])
with torch.no_grad():
    outputs = model(torch.from_numpy(batch["pixels"]), torch.from_numpy(batch["mask"]))
np.savez(sys.argv[2], logits=outputs.logits, pred_boxes=outputs.pred_boxes)
print(json.dumps(processor.size["longest_edge"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in HUB if case.name.startswith("detr-resnet-101@")]
)
def test_the_hubs_detr_resnet_101_loads_from_the_hub_and_gives_its_numbers(
    tmp_path: Path, case: GoldenCase
) -> None:
    import numpy as np
    from safetensors.torch import save

    revision = case.name.partition("@")[2]
    old_processor = {
        "feature_extractor_type": "DetrFeatureExtractor",
        "format": "coco_detection",
        "do_resize": True,
        "do_normalize": True,
        "size": 800,
        "max_size": 1333,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    files = {
        "config.json": case.folder / "config.json",
        "preprocessor_config.json": json.dumps(old_processor).encode(),
        "model.safetensors": save(case.weights(), metadata={"format": "pt"}),
    }
    pixels, mask = case.batch()
    np.savez(tmp_path / "batch.npz", pixels=pixels.numpy(), mask=mask.numpy())
    code = FULL_SIZE.replace("no_timm", revision)
    with HubServer({REPOSITORY: {revision: files}}) as hub:
        longest = run_python(
            code, hub, tmp_path / "home", str(tmp_path / "batch.npz"), str(tmp_path / "out.npz")
        )
        assert hub.repositories_asked_for() == {REPOSITORY}
    outputs = np.load(tmp_path / "out.npz")
    assert longest == 1333
    np.testing.assert_allclose(outputs["logits"], case.outputs["logits"], atol=1e-4)
    np.testing.assert_allclose(outputs["pred_boxes"], case.outputs["pred_boxes"], atol=1e-5)


def test_a_pipeline_takes_bytes_and_open_files_as_it_takes_the_path(tiny_detr: Path, tmp_path: Path) -> None:
    import detrkit

    make_picture(90, 60).save(tmp_path / "photo.png")
    detect = detrkit.pipeline("object-detection", model=str(tiny_detr), threshold=0.1)
    expected = detect(str(tmp_path / "photo.png"))
    content = (tmp_path / "photo.png").read_bytes()
    assert expected
    for source in (content, io.BytesIO(content)):
        assert detect(source) == expected
