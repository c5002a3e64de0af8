import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detrkit.checkpoints.registry import REGISTRY, find_checkpoint, resolve_model
from detrkit.errors import CheckpointError
from tests.golden import SHARED

FACTS = SHARED / "reference" / "checkpoints.md"

# name: AP, small, medium, large, parameters (millions), GFLOPs
DETECTION = {
    "detr-resnet-50": (42.0, 20.5, 45.8, 61.1, 41, 86),
    "detr-resnet-50-dc5": (43.3, 22.5, 47.3, 61.1, 41, 187),
    "detr-resnet-101": (43.5, 21.9, 48.0, 61.8, 60, 152),
    "detr-resnet-101-dc5": (44.9, 23.7, 49.5, 62.3, 60, 253),
    "conditional-detr-resnet-50": (41.0, 20.6, 44.3, 59.3, 44, 90),
    "conditional-detr-resnet-50-dc5": (43.7, 23.9, 47.6, 60.1, 44, 195),
    "conditional-detr-resnet-101": (42.8, 21.7, 46.6, 60.9, 63, 156),
    "conditional-detr-resnet-101-dc5": (45.0, 26.1, 48.9, 62.8, 63, 262),
    "deformable-detr-single-scale": (39.4, 20.6, 43.0, 55.5, 34, 78),
    "deformable-detr-single-scale-dc5": (41.5, 24.1, 45.3, 56.0, 34, 128),
    "deformable-detr": (44.5, 27.1, 47.6, 59.6, 40, 173),
    "deformable-detr-with-box-refine": (46.2, 28.3, 49.2, 61.5, 41, 173),
    "deformable-detr-with-box-refine-two-stage": (46.9, 29.6, 50.1, 61.6, 41, 173),
}
# name: box AP, mask AP, PQ
PANOPTIC = {
    "detr-resnet-50-panoptic": (38.8, 31.1, 43.4),
    "detr-resnet-50-dc5-panoptic": (40.2, 31.9, 44.6),
    "detr-resnet-101-panoptic": (40.1, 33.0, 45.1),
}
# name: AP, AP50, AP75, queries, classes, longest edge
TABLES = {
    "table-transformer-detection": (97.0, 99.5, 98.9, 15, 2, 800),
    "table-transformer-structure-recognition": (90.2, 97.0, 94.1, 125, 6, 1000),
    **{
        f"table-transformer-structure-recognition-v1.1-{data}": (None, None, None, 125, 6, 1000)
        for data in ("pub", "fin", "all")
    },
}


def test_registry_holds_the_released_checkpoints():
    assert set(REGISTRY) == {*DETECTION, *PANOPTIC, *TABLES}
    assert all(name == entry.name for name, entry in REGISTRY.items())


@pytest.mark.parametrize("name", DETECTION)
def test_detection_numbers_are_the_published_ones(name):
    entry = REGISTRY[name]
    numbers = (entry.ap, entry.ap_small, entry.ap_medium, entry.ap_large, entry.params, entry.gflops)
    assert numbers == DETECTION[name]
    assert (entry.task, entry.num_labels, entry.mask_ap, entry.pq) == ("detection", 91, None, None)


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_numbers_are_the_published_ones(name):
    entry = REGISTRY[name]
    assert (entry.ap, entry.mask_ap, entry.pq) == PANOPTIC[name]
    assert (entry.task, entry.num_labels, entry.params, entry.gflops) == ("panoptic", 250, None, None)


@pytest.mark.parametrize("name", TABLES)
def test_table_transformers_numbers_are_the_published_ones(name):
    entry = REGISTRY[name]
    numbers = (entry.ap, entry.ap50, entry.ap75, entry.num_queries, entry.num_labels, entry.longest_edge)
    assert numbers == TABLES[name]
    assert entry.hub_id == f"microsoft/{name}"
    assert entry.labels[0] == "table"
    assert len(entry.labels) == entry.num_labels


@pytest.mark.skipif(not FACTS.is_file(), reason="needs the table of facts beside the checkout (../shared)")
def test_registry_agrees_with_the_table_of_facts():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in FACTS.read_text().splitlines()]
    rows = {row[0]: row[1:] for row in rows if row and row[0] in REGISTRY}
    assert set(rows) == {*DETECTION, *PANOPTIC}
    for name, (hub_id, file, *numbers) in rows.items():
        entry = REGISTRY[name]
        found = [float(number) for number in re.findall(r"\d+\.?\d*", " ".join(numbers[:3]))]
        panoptic = [entry.ap, entry.mask_ap, entry.pq]
        detection = [entry.ap, entry.ap_small, entry.ap_medium, entry.ap_large, entry.params, entry.gflops]
        assert found == (panoptic if entry.task == "panoptic" else detection), name
        assert (entry.hub_id or "") == hub_id
        assert file.split()[-1].rsplit("/", 1)[-1] in entry.url


def test_names_tell_the_architecture():
    for name in (*DETECTION, *PANOPTIC):
        entry = REGISTRY[name]
        assert entry.dilation == ("dc5" in name)
        assert entry.backbone == ("resnet101" if "101" in name else "resnet50")
        assert entry.family == name.split("-resnet")[0].split("-single")[0].split("-with")[0].replace(
            "-", "_"
        )
        assert entry.two_stage == ("two-stage" in name)
        assert entry.with_box_refine == ("box-refine" in name)
        multi_scale = entry.family == "deformable_detr" and "single-scale" not in name
        assert entry.num_feature_levels == (4 if multi_scale else 1)
        assert entry.num_queries == (100 if entry.family == "detr" else 300)
        assert entry.hub_id is None or entry.hub_id.endswith("/" + name)


def test_every_original_file_has_its_own_address():
    urls = {entry.url for entry in REGISTRY.values()}
    assert len(urls) == len(REGISTRY)
    assert all(url.startswith("https://") for url in urls)


def test_a_checkpoint_is_found_by_short_name_and_by_hub_id():
    assert find_checkpoint("detr-resnet-50") is find_checkpoint("facebook/detr-resnet-50")
    assert find_checkpoint("conditional-detr-resnet-101").hub_id is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("detr-resnet50", "detr-resnet-50"),
        ("DETR-ResNet-101", "detr-resnet-101"),
        ("deformable-detr-box-refine", "deformable-detr-with-box-refine"),
        ("facebok/detr-resnet-50", "facebook/detr-resnet-50"),
        ("detr-50", "detr-resnet-50"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_close_ones(typed, meant):
    with pytest.raises(CheckpointError, match=rf"did you mean .*\b{meant}\b"):
        find_checkpoint(typed)


def test_a_name_like_no_other_is_answered_with_where_all_stand():
    with pytest.raises(CheckpointError, match=r"see: detrkit models"):
        find_checkpoint("yolo")


def test_a_short_name_resolves_to_its_hub_id():
    assert resolve_model("detr-resnet-101") == "facebook/detr-resnet-101"
    assert resolve_model("deformable-detr") == "SenseTime/deformable-detr"


@pytest.mark.parametrize("hub_id", ["facebook/detr-resnet-50", "someone/my.finetuned_detr-2"])
def test_a_hub_id_is_left_alone(hub_id):
    assert resolve_model(hub_id) == hub_id


def test_a_folder_is_left_alone_even_under_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detr-resnet-50").mkdir()
    assert resolve_model("detr-resnet-50") == "detr-resnet-50"
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_a_checkpoint_that_is_only_on_the_hub_is_resolved_and_not_converted():
    assert resolve_model("deformable-detr-detic") == "facebook/deformable-detr-detic"
    with pytest.raises(
        CheckpointError, match="facebook/deformable-detr-detic is already in the Hub's format"
    ):
        find_checkpoint("deformable-detr-detic")
    with pytest.raises(CheckpointError, match=r"did you mean .*deformable-detr-box-supervised"):
        resolve_model("deformable-detr-box-supervise")


def test_a_checkpoint_that_is_not_on_the_hub_says_how_to_convert_it():
    with pytest.raises(
        CheckpointError,
        match=r"ConditionalDETR_r101_epoch50\.pth .*convert .*--model conditional-detr-resnet-101$",
    ):
        resolve_model("conditional-detr-resnet-101")


def test_a_file_is_not_taken_for_a_model(tmp_path):
    file = tmp_path / "detr.pth"
    file.touch()
    with pytest.raises(CheckpointError, match=r"detr\.pth is a file.*detrkit convert"):
        resolve_model(str(file))


@pytest.mark.parametrize("model", ["", "detr-resnet-5O", "x" * 5000, "a\0b"])
def test_what_is_neither_folder_nor_hub_id_nor_short_name_is_refused(model):
    with pytest.raises(CheckpointError, match="neither a model folder, a Hub id"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["/no/such/folder", "a/b/c", "../gone", "./facebook/detr"])
def test_a_path_that_leads_nowhere_is_no_model_folder(model):
    with pytest.raises(CheckpointError, match=f"model folder not found: '{model}'"):
        resolve_model(model)


@given(st.text(max_size=30))
def test_any_text_resolves_or_is_refused_in_one_line(text):
    try:
        answer = resolve_model(text)
    except CheckpointError as error:
        answer = str(error)
    assert len(answer.splitlines()) == 1


def test_the_registry_does_not_import_torch():
    code = (
        "import sys, detrkit.checkpoints.registry, detrkit.conversion.labels;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
