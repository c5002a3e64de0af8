from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detrkit import DetectionConfig, Detector
from detrkit.data import DetectionDataset
from detrkit.errors import SettingError
from detrkit.evaluation import evaluate_dataset
from detrkit.evaluation.calibration_sample import collect, collect_layers
from detrkit.evaluation.layers import LayerScores
from tests.tiny import FAMILIES, TINY_NAMES

SIZES = ((90, 64), (64, 90), (120, 80))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for place, (width, height) in enumerate(SIZES):
        coarse = noise.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{place}.png")
    return folder


def truth_of(detector: Detector, images: Path) -> DetectionDataset:
    """What the detector itself is most sure of, a little displaced, so that AP is neither 0 nor 1."""
    document: dict = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": label, "name": name} for label, name in TINY_NAMES.items() if label]
    for place, (width, height) in enumerate(SIZES):
        entry = {"id": place, "file_name": f"{place}.png", "width": width, "height": height}
        document["images"].append(entry)
        for found in detector(images / f"{place}.png", threshold=0.0).to_coco(place)[:4]:
            if found["category_id"]:
                x, y, w, h = found["bbox"]
                number = len(document["annotations"]) + 1
                box = [x + 0.1 * w, y, 0.9 * w, h]
                document["annotations"].append({**found, "bbox": box, "id": number, "iscrowd": 0})
    assert len(document["annotations"]) > 3
    return DetectionDataset.from_coco(images, document)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overlap", [None, 0.05])
def test_the_last_layer_has_the_usual_numbers(
    family: str, overlap: float | None, images: Path, tmp_path: Path
) -> None:
    detector = Detector.from_pretrained(FAMILIES[family].save(tmp_path / "model"), device="cpu")
    dataset = truth_of(detector, images)
    detector.detection_config = DetectionConfig(overlap=overlap)
    usual = evaluate_dataset(detector, dataset)
    found = evaluate_dataset(detector, dataset, layers=True)
    assert found.layers is not None
    assert found.results == usual.results
    assert len(found.layers.layers) == detector.config.decoder_layers == 2
    assert found.layers.layers[-1] == usual.stats == found.stats
    assert 0 < usual.stats["AP"] < 1
    assert found.layers.layers[0] != usual.stats
    assert found.layers.overlap == overlap
    if overlap is None:
        assert found.layers.unfiltered is None
    else:
        assert found.layers.unfiltered[-1] == evaluate_dataset(detector, dataset, raw=True).stats
        differs = found.layers.unfiltered[-1] != usual.stats
        assert differs or family == "deformable_detr"  # whose boxes hardly overlap


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_read_as_the_auxiliary_outputs_are(family: str, images: Path, tmp_path: Path) -> None:
    """With as many layers as there are, and boxes from each layer's own reference points."""
    detector = Detector.from_pretrained(FAMILIES[family].save(tmp_path / "model"), device="cpu")
    paths = sorted(images.iterdir())
    by_layer = list(detector.stream_layers(paths, batch_size=2))
    detector.model.config.auxiliary_loss = True
    for path, layers in zip(paths, by_layer):
        item = detector.prepare(path)
        outputs = detector._runner.outputs([item], detector.model)
        [first] = outputs["auxiliary_outputs"]
        rule = detector._reader.rule(DetectionConfig(threshold=0.0))
        for expected, found in zip((first, outputs), layers, strict=True):
            values = {name: expected[name].float().cpu() for name in ("logits", "pred_boxes")}
            [wanted] = detector._reader.detections(values, [item.frame], rule, False)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
            np.testing.assert_allclose(np.sort(found.boxes, 0), np.sort(wanted.boxes, 0), atol=1e-2)


def test_layers_of_a_model_with_masks_are_those_of_its_detector(images: Path, tmp_path: Path) -> None:
    folder = FAMILIES["detr"].save(tmp_path / "model", masks=True)
    detector = Detector.from_pretrained(folder, device="cpu")
    dataset = truth_of(detector, images)
    found = evaluate_dataset(detector, dataset, layers=True)
    assert found.layers.layers[-1] == evaluate_dataset(detector, dataset).stats
    with pytest.raises(SettingError, match="leave out masks"):
        evaluate_dataset(detector, dataset, masks=True, layers=True)


def test_what_has_no_layers_to_show_is_refused(images: Path, tmp_path: Path) -> None:
    folder = FAMILIES["detr"].save(tmp_path / "model")
    detector = Detector.from_pretrained(folder, device="cpu")
    dataset = truth_of(detector, images)
    with pytest.raises(SettingError, match="leave out tiles"):
        evaluate_dataset(detector, dataset, layers=True, tiles=64)
    detector._engine = "compile"
    with pytest.raises(SettingError, match="the engine compile gives the last decoder layer only"):
        evaluate_dataset(detector, dataset, layers=True)

    class Elsewhere:
        names, detection_config, has_masks = detector.names, detector.detection_config, False
        config = detector.config

        def with_config(self, config: DetectionConfig, tiles: object) -> Elsewhere:
            return self

    with pytest.raises(SettingError, match="leave out --ray"):
        evaluate_dataset(Elsewhere(), dataset, layers=True)


def test_table_and_chart_show_both_readings(tmp_path: Path) -> None:
    stats = [dict.fromkeys(("AP", "AP50", "APsmall"), value) for value in (0.2, -1.0)]
    stats = [{**dict.fromkeys(_names(), 0.1), **entry} for entry in stats]
    scores = LayerScores(stats, [{**entry, "AP": 0.15} for entry in stats], 0.6)
    table, chart = scores.save(tmp_path)
    rows = [line.split(",")[:3] for line in table.read_text().splitlines()]
    assert rows[0] == ["layer", "overlap_filter", "AP"]
    assert [row[:2] for row in rows[1:]] == [["1", "0.6"], ["2", "0.6"], ["1", ""], ["2", ""]]
    assert rows[2][2] == ""  # not -1
    assert chart.stat().st_size > 10_000
    lines = scores.draw().axes[0].get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]
    assert [line.get_label() for line in lines][::2] == ["AP, overlap filter 0.6", "AP"]
    assert scores.to_dict()["unfiltered"][0]["AP"] == 0.15
    assert "unfiltered" not in LayerScores(stats).to_dict()


def _names() -> tuple[str, ...]:
    from detrkit.evaluation.coco import STATISTICS

    return STATISTICS


def test_one_run_gives_the_samples_of_all_layers(images: Path, tmp_path: Path) -> None:
    detector = Detector.from_pretrained(FAMILIES["detr"].save(tmp_path / "model"), device="cpu")
    dataset = truth_of(detector, images)
    detector.detection_config = DetectionConfig(threshold=0.9, overlap=0.05)  # neither is used
    first, last = collect_layers(detector, dataset, 1, None, False)
    whole = collect(detector, dataset, 1, None, False)
    for found, wanted in zip(last.detections, whole.detections, strict=True):
        np.testing.assert_array_equal(found.scores, wanted.scores)
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    assert last.image_ids == whole.image_ids
    assert [len(truth.boxes) for truth in last.truths] == [len(truth.boxes) for truth in whole.truths]
    assert not np.array_equal(first.detections[0].scores, last.detections[0].scores)
