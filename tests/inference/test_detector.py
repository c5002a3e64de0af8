from __future__ import annotations

import builtins
import copy
import json
import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit import Detections, Detector
from detrkit.common.progress import with_progress
from detrkit.errors import CheckpointError, ImageError, MissingExtraError, SettingError
from detrkit.families import family_of
from tests.conftest import make_picture
from tests.tiny import FAMILIES, TINY_NAMES

QUERIES = 12


@pytest.fixture(scope="module")
def detector(tiny_detr: Path) -> Detector:
    return Detector.from_pretrained(tiny_detr, device="cpu")


class SpyModel(torch.nn.Module):
    """Passes calls on and notes the shape of every batch and whether it came with a mask."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[tuple[int, ...], bool]] = []

    def forward(self, **inputs: torch.Tensor) -> object:
        self.calls.append((tuple(inputs["pixel_values"].shape), "pixel_mask" in inputs))
        return self.model(**inputs)


@pytest.fixture
def spy(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> SpyModel:
    spy = SpyModel(detector.model)
    monkeypatch.setattr(detector, "model", spy)
    return spy


def assert_same(a: Detections, b: Detections, tolerance: float = 1e-4) -> None:
    assert a.image_size == b.image_size
    np.testing.assert_allclose(a.scores, b.scores, atol=tolerance)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=100 * tolerance)
    assert a.names == b.names


# What comes out


def test_detections_are_the_models_own_numbers_in_pixels_of_the_original_image(
    detector: Detector, tiny_detr: Path
) -> None:
    from detrkit import DetrForObjectDetection, DetrImageProcessor

    image = make_picture(120, 80)
    model = DetrForObjectDetection.from_pretrained(tiny_detr).eval()
    inputs = DetrImageProcessor.from_pretrained(tiny_detr)(images=image, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] != (80, 120)  # the model sees a resized image
    with torch.no_grad():
        outputs = model(**inputs)
    scores, labels = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    x, y, w, h = outputs.pred_boxes[0].unbind(-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * torch.tensor([120, 80, 120, 80])
    order = scores.argsort(descending=True)

    found = detector(image, threshold=0)
    assert len(found) == QUERIES
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-4)
    np.testing.assert_allclose(found.boxes, corners[order], atol=1e-2)
    np.testing.assert_array_equal(found.labels, labels[order])


def test_detections_have_the_promised_types(detector: Detector) -> None:
    found = detector(make_picture(120, 80), threshold=0)
    assert (found.boxes.dtype, found.boxes.shape) == (np.float32, (QUERIES, 4))
    assert (found.scores.dtype, found.scores.shape) == (np.float32, (QUERIES,))
    assert (found.labels.dtype, found.labels.shape) == (np.int64, (QUERIES,))
    assert found.names == [TINY_NAMES[label] for label in found.labels]
    assert found.image_size == (80, 120)
    assert found.masks is None
    assert (np.diff(found.scores) <= 0).all()


def test_threshold_keeps_higher_scores_only(detector: Detector) -> None:
    image = make_picture(120, 80)
    everything = detector(image, threshold=0)
    middle = float(everything.scores[QUERIES // 2 - 1 : QUERIES // 2 + 1].mean())
    assert_same(detector(image, threshold=middle), everything[: QUERIES // 2])
    nothing = detector(image, threshold=1)
    assert (len(nothing), nothing.boxes.shape, nothing.to_coco()) == (0, (0, 4), [])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_as_many_objects_as_it_has_queries_and_the_best_of_them_on_request(family: str) -> None:
    queries = 130  # more than the originals' evaluation takes
    tiny = FAMILIES[family]
    model = tiny.detector(
        num_queries=queries, **({"two_stage_num_proposals": queries} if tiny.proposes else {})
    )
    known = family_of(model.config.model_type, "a tiny model")
    processor = known.load(known.processor)(size={"height": 256, "width": 256})
    detector = Detector(model, processor, device="cpu")
    image = make_picture(120, 80)
    everything = detector(image, threshold=0)
    assert len(everything) == queries
    assert len(detector.predict(image, 0).candidates().queries) == queries
    assert_same(detector(image, threshold=0, max_objects=5), everything[:5])
    assert_same(detector.predict(image, 0).detections(0, max_objects=5), everything[:5])
    assert_same(detector(image, threshold=0, max_objects=1000), everything)


@pytest.mark.parametrize("folder", ["tiny_panoptic", "tiny_conditional_panoptic"])
def test_the_masks_of_the_best_objects_are_theirs(folder: str, request: pytest.FixtureRequest) -> None:
    segmenter = Detector.from_pretrained(request.getfixturevalue(folder), device="cpu")
    image = make_picture(120, 80)
    everything, best = segmenter(image, threshold=0), segmenter(image, threshold=0, max_objects=3)
    assert_same(best, everything[:3])
    np.testing.assert_array_equal(best.masks, everything.masks[:3])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
def test_a_detector_can_be_copied_and_pickled(detector: Detector, segmenter: Detector, copied: Any) -> None:
    image = make_picture(120, 80)
    for one in (detector, segmenter):
        assert_same(copied(one)(image, threshold=0), one(image, threshold=0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("called", [False, True], ids=["", "called"])
@pytest.mark.parametrize("engine", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_forked_process_uses_the_parents_detector(engine: str, called: bool, tiny_detr: Path) -> None:
    image = make_picture(800, 600)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        detector = Detector.from_pretrained(tiny_detr, engine=engine, device="cpu")
        if called:
            detector(image)
        child = context.Process(target=lambda: answers.put(len(detector(image, threshold=0))), daemon=True)
        child.start()
        try:
            assert answers.get(timeout=60) == QUERIES
        finally:
            child.kill()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_a_detectors_model_can_be_converted_by_hand(tiny_detr: Path, convert: str) -> None:
    detector = Detector.from_pretrained(tiny_detr, device="cpu")
    image = make_picture(120, 80)
    expected = detector(image, threshold=0)
    getattr(detector.model, convert)()
    np.testing.assert_allclose(detector(image, threshold=0).scores, expected.scores, atol=0.03)


def test_names_come_from_the_models_config(detector: Detector) -> None:
    assert detector.names == TINY_NAMES


# What goes in


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda image, folder: image, id="PIL"),
        pytest.param(lambda image, folder: np.asarray(image), id="array HWC"),
        pytest.param(
            lambda image, folder: torch.from_numpy(np.array(image)).permute(2, 0, 1), id="tensor CHW"
        ),
        pytest.param(lambda image, folder: save(image, folder / "a.png"), id="Path"),
        pytest.param(lambda image, folder: str(save(image, folder / "a.png")), id="str"),
    ],
)
def test_every_kind_of_image_gives_the_same_detections(
    detector: Detector, tmp_path: Path, convert: object
) -> None:
    image = make_picture(120, 80)
    found = detector(convert(image, tmp_path), threshold=0)
    assert isinstance(found, Detections)
    assert_same(found, detector(image, threshold=0))


def save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def test_many_images_give_a_list_in_their_order(detector: Detector, pictures: list[Path]) -> None:
    found = detector(pictures, threshold=0)
    assert [f.source for f in found] == [str(path) for path in pictures]
    assert [f.image_size for f in found] == [(80, 120), (120, 80), (80, 120), (90, 90)]


def test_a_generator_gives_a_list(detector: Detector, pictures: list[Path]) -> None:
    found = detector((path for path in pictures[:2]), threshold=0)
    assert [f.source for f in found] == [str(path) for path in pictures[:2]]


def test_one_image_in_a_list_gives_a_list_of_one(detector: Detector) -> None:
    assert len(detector([make_picture(120, 80)])) == 1
    assert detector([]) == []


def test_a_four_dimensional_array_is_many_images(detector: Detector) -> None:
    batch = np.stack([np.asarray(make_picture(120, 80, seed)) for seed in range(3)])
    found = detector(batch, threshold=0)
    for image, one in zip(batch, found):
        assert_same(one, detector(image, threshold=0))


def test_boxes_refer_to_stored_pixels_unless_exif_orientation_is_asked_for(
    detector: Detector, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = tmp_path / "turned.jpg"
    make_picture(120, 80).save(path, exif=exif)
    stored, turned = detector(path), detector(path, exif_orientation=True)
    assert (stored.image_size, turned.image_size) == ((80, 120), (120, 80))
    assert (stored.draw().size, turned.draw().size) == ((120, 80), (80, 120))


def test_an_orientation_that_is_not_applied_is_told_once(
    detector: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    make_picture(120, 80).save(path, exif=exif)
    detector(path)
    assert [record.name for record in caplog.records if "turned.jpg" in record.getMessage()] == ["detrkit"]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("bad", ["missing.jpg", 3, None])
def test_what_is_no_image_is_refused(detector: Detector, bad: object) -> None:
    with pytest.raises(ImageError):
        detector(bad)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_threshold_outside_0_to_1_is_refused(detector: Detector, threshold: float) -> None:
    with pytest.raises(SettingError, match="threshold"):
        detector(make_picture(120, 80), threshold=threshold)


def test_batch_size_below_1_is_refused(detector: Detector) -> None:
    with pytest.raises(SettingError, match="batch_size"):
        detector([make_picture(120, 80)], batch_size=0)


# Batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batching_changes_neither_results_nor_their_order(detector: Detector, batch_size: int) -> None:
    sizes = [(120, 80), (80, 120), (120, 80), (90, 90), (80, 120), (120, 80), (120, 80)]
    images = [make_picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    batched = detector(images, threshold=0, batch_size=batch_size)
    assert len(batched) == len(images)
    for image, found in zip(images, batched):
        assert_same(found, detector(image, threshold=0), tolerance=1e-5)


def test_a_batch_holds_one_processed_size_and_no_more_than_batch_size(
    detector: Detector, spy: SpyModel
) -> None:
    sizes = [(120, 80), (80, 120)] * 5
    detector([make_picture(*size) for size in sizes], batch_size=2)
    wide, tall = (64, 96), (96, 64)
    # Each size has a batch as soon as it has two images; the fifth of each comes alone at the end.
    assert [(shape[0], shape[2:]) for shape, _ in spy.calls] == [
        (2, wide),
        (2, tall),
        (2, wide),
        (2, tall),
        (1, wide),
        (1, tall),
    ]


def test_no_mask_goes_to_the_model_where_nothing_is_padded(detector: Detector, spy: SpyModel) -> None:
    detector([make_picture(120, 80), make_picture(80, 120)], batch_size=2)
    assert [masked for _, masked in spy.calls] == [False, False]


def test_the_mask_goes_to_the_model_where_the_processor_pads(
    detector: Detector, spy: SpyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = detector.processor

    class Padding:
        """Pads every image by 32 columns."""

        def __call__(self, **kwargs: object) -> dict[str, torch.Tensor]:
            inputs = plain(**kwargs)
            pad = torch.nn.functional.pad
            return {name: pad(inputs[name], (0, 32)) for name in ("pixel_values", "pixel_mask")}

        def __getattr__(self, name: str) -> object:
            return getattr(plain, name)

    monkeypatch.setattr(detector, "processor", Padding())
    detector(make_picture(120, 80))
    assert spy.calls == [((1, 3, 64, 128), True)]


def test_stream_reads_no_more_than_a_few_batches_ahead(detector: Detector) -> None:
    read = []

    def images() -> object:
        for number in range(1000):
            read.append(number)
            # The first is the only one of its size, so that it waits for company that never comes.
            yield make_picture(80, 120) if number == 0 else make_picture(120, 80, seed=number)

    first = next(detector.stream(images(), batch_size=2))
    assert first.image_size == (120, 80)
    assert len(read) <= 30


def test_stream_does_not_wait_for_the_next_image_to_give_a_result(detector: Detector) -> None:
    taken = threading.Event()

    def images() -> object:
        yield make_picture(120, 80)
        assert taken.wait(60), "the first result was held back"
        yield make_picture(120, 80)

    stream = detector.stream(images(), threshold=0)
    assert len(next(stream)) == QUERIES
    taken.set()
    assert len(list(stream)) == 1


def test_stream_gives_what_comes_before_an_image_that_cannot_be_read(
    detector: Detector, pictures: list[Path], tmp_path: Path
) -> None:
    stream = detector.stream([*pictures, tmp_path / "missing.jpg", *pictures], threshold=0)
    assert [next(stream).source for _ in pictures] == [str(path) for path in pictures]
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        next(stream)


def test_images_are_read_while_the_model_runs(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    second_read = threading.Event()
    model = detector.model

    def slow_model(**inputs: torch.Tensor) -> object:
        assert second_read.wait(60), "nothing was read while the model ran"
        return model(**inputs)

    def images() -> object:
        yield make_picture(120, 80)
        second_read.set()
        yield make_picture(120, 80)

    monkeypatch.setattr(detector, "model", slow_model)
    assert len(list(detector.stream(images()))) == 2


# Loading


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(CheckpointError, match="detr-resnet-50"):
        Detector.from_pretrained("detr-resnet-5O")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        Detector.from_pretrained(tmp_path / "no-such-folder")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{broken")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def no_family(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_one_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["class_labels_classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def resize_queries(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_queries": 5}))


def remove_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json"),
        (remove_config, "config.json"),
        (other_family, "'bert'"),
        (no_family, "model_type|config.json"),
        (truncate_weights, "weights"),
        (empty_weights, "weights"),
        (remove_weights, "weights"),
        (drop_one_tensor, "class_labels_classifier.weight"),
        (resize_queries, "weights"),
        (remove_processor, "preprocessor_config.json"),
    ],
)
def test_a_damaged_model_folder_is_named_in_one_line(
    tiny_detr: Path, tmp_path: Path, damage: object, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_detr, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Detector.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "onnx", "dtype": "float16"}, "in 'float32' only"),
        ({"engine": "openvino", "device": "cuda"}, "not available|device 'cpu'"),
        ({"engine": "torhc"}, "unknown engine"),
        ({"device": "gpu7"}, "unknown device"),
        ({"device": "cuda:99"}, "not available"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"dtype": torch.int64}, "unknown dtype"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(tiny_detr: Path, settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        Detector.from_pretrained(tiny_detr, **settings)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_half_precision_finds_nearly_the_same(tiny_detr: Path, detector: Detector, dtype: object) -> None:
    half = Detector.from_pretrained(tiny_detr, device="cpu", dtype=dtype)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    found, wanted = (d(make_picture(120, 80), threshold=0) for d in (half, detector))
    assert found.boxes.dtype == np.float32
    np.testing.assert_allclose(found.scores, wanted.scores, atol=0.1)


# Detections


def some_detections(**changes: object) -> Detections:
    fields = {
        "boxes": np.array([[10, 20, 30, 60], [0, 0, 5, 5], [1.5, 2.25, 3, 4]], dtype=np.float32),
        "scores": np.array([0.9, 0.5, 0.1], dtype=np.float32),
        "labels": np.array([1, 2, 1]),
        "names": ["cat", "remote", "cat"],
        "image_size": (100, 200),
        "source": "room.jpg",
    }
    return Detections(**(fields | changes))


@pytest.mark.parametrize(
    ("index", "scores"),
    [
        (slice(0, 2), [0.9, 0.5]),
        (slice(None, None, -1), [0.1, 0.5, 0.9]),
        (np.array([True, False, True]), [0.9, 0.1]),
        ([False, False, False], []),
        ([2, 0], [0.1, 0.9]),
        ([], []),
        (np.array([], dtype=np.int64), []),
    ],
)
def test_indexing_keeps_all_fields_together(index: object, scores: list[float]) -> None:
    masks = np.arange(3)[:, None, None] == np.zeros((1, 100, 200))
    everything = some_detections(masks=masks)
    chosen = everything[index]
    np.testing.assert_allclose(chosen.scores, scores)
    rows = [everything.scores.tolist().index(score) for score in chosen.scores.tolist()]
    np.testing.assert_array_equal(chosen.boxes, everything.boxes[rows])
    np.testing.assert_array_equal(chosen.masks, masks[rows])
    assert chosen.names == [everything.names[row] for row in rows]
    assert (chosen.image_size, chosen.source) == ((100, 200), "room.jpg")


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(IndexError):
        some_detections()[np.array([True, False])]


def test_rows_give_one_object_each() -> None:
    found = some_detections()
    rows = list(found)
    assert [(row.name, row.label, round(row.score, 2)) for row in rows] == [
        ("cat", 1, 0.9),
        ("remote", 2, 0.5),
        ("cat", 1, 0.1),
    ]
    np.testing.assert_array_equal(found[0].box, [10, 20, 30, 60])
    assert found[-1].score == rows[-1].score
    with pytest.raises(IndexError):
        found[3]


def test_repr_says_what_was_found_where() -> None:
    assert repr(some_detections()) == "Detections(3 in room.jpg, 200x100: 2 cat, 1 remote)"
    assert repr(some_detections(source=None)[[]]) == "Detections(0, 200x100)"


def test_coco_boxes_are_corner_width_height() -> None:
    entries = some_detections().to_coco(image_id=7, first_id=11)
    assert entries[0] == {
        "id": 11,
        "image_id": 7,
        "category_id": 1,
        "bbox": [10.0, 20.0, 20.0, 40.0],
        "area": 800.0,
        "score": 0.9,
    }
    assert [entry["id"] for entry in entries] == [11, 12, 13]
    assert json.loads(json.dumps(entries)) == entries


def test_supervision_gets_boxes_scores_labels_and_names() -> None:
    pytest.importorskip("supervision")
    given = some_detections()
    taken = given.to_supervision()
    np.testing.assert_array_equal(taken.xyxy, given.boxes)
    np.testing.assert_array_equal(taken.confidence, given.scores)
    np.testing.assert_array_equal(taken.class_id, given.labels)
    assert taken.data["class_name"].tolist() == given.names
    assert len(some_detections()[[]].to_supervision()) == 0


def test_a_missing_supervision_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "supervision":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"'\.\[supervision\]'"):
        some_detections().to_supervision()


def test_draw_marks_a_copy_of_the_picture() -> None:
    picture = Image.new("RGB", (200, 100))
    drawn = some_detections().draw(picture)
    assert drawn.size == (200, 100)
    assert picture.getbbox() is None
    assert drawn.getbbox() is not None


def test_draw_refuses_a_picture_of_another_size() -> None:
    with pytest.raises(ImageError, match="200x100"):
        some_detections().draw(Image.new("RGB", (100, 200)))
    with pytest.raises(ImageError, match=r"draw\(\)"):
        some_detections(source=None).draw()


def test_progress_passes_results_on_and_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(with_progress(iter([1, 2, 3]), 3)) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_progress_shows_a_bar_on_a_terminal_when_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("detrkit.common.progress._PROGRESS_AFTER_SECONDS", -1.0)
    assert list(with_progress(iter([1, 2, 3]), 3)) == [1, 2, 3]
    output = capsys.readouterr()
    assert "Detecting" in output.err
    assert output.out == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_as_the_cpu(tiny_detr: Path, detector: Detector) -> None:
    on_gpu = Detector.from_pretrained(tiny_detr)
    assert next(on_gpu.model.parameters()).is_cuda
    image = make_picture(120, 80)
    assert_same(on_gpu(image, threshold=0), detector(image, threshold=0), tolerance=1e-2)


def test_the_callers_model_can_still_be_trained_and_saved(tiny_detr: Path, tmp_path: Path) -> None:
    from detrkit import DetrForObjectDetection, DetrImageProcessor

    model = DetrForObjectDetection.from_pretrained(tiny_detr).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    processor = DetrImageProcessor.from_pretrained(tiny_detr)
    detector, image = Detector(model, processor, device="cpu"), make_picture(120, 80)
    found = detector(image, threshold=0)

    assert model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    model.save_pretrained(tmp_path)
    saved = DetrForObjectDetection.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # as training would, in place
    np.testing.assert_array_equal(detector(image, threshold=0).boxes, found.boxes)


# Masks and segments


@pytest.fixture(scope="module", params=["tiny_panoptic", "tiny_conditional_panoptic"])
def segmenter(request: pytest.FixtureRequest) -> Detector:
    return Detector.from_pretrained(request.getfixturevalue(request.param), device="cpu")


def test_segments_are_those_of_forward_and_post_processing(tiny_panoptic: Path) -> None:
    from detrkit import DetrForSegmentation, DetrImageProcessor

    image = make_picture(120, 80)
    model = DetrForSegmentation.from_pretrained(tiny_panoptic).eval()
    processor = DetrImageProcessor.from_pretrained(tiny_panoptic)
    with torch.no_grad():
        inputs = processor(images=image, return_tensors="pt")
        outputs = model(**inputs)
    wanted = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.5, target_sizes=[(80, 120)], processed_sizes=[inputs["pixel_mask"].shape[-2:]]
    )[0]
    found = Detector.from_pretrained(tiny_panoptic, device="cpu").segment(image, threshold=0.5)
    assert len(found) >= 2
    assert [s["category_id"] for s in found.segments] == [s["label_id"] for s in wanted["segments_info"]]
    different = found.ids != wanted["segmentation"].numpy()
    assert different.mean() < 0.01  # rounding at the borders


def test_segments_have_the_promised_types(segmenter: Detector) -> None:
    found = segmenter.segment(make_picture(120, 80), threshold=0.5)
    assert (found.ids.dtype, found.ids.shape) == (np.int32, (80, 120))
    assert found.image_size == (80, 120)
    assert found.names == [TINY_NAMES[s["category_id"]] for s in found.segments]
    areas = dict(zip(*np.unique(found.ids[found.ids > 0], return_counts=True)))
    assert areas == {s["id"]: s["area"] for s in found.segments}
    assert all(s["isthing"] == (s["category_id"] != 3) for s in found.segments)
    assert found.draw(make_picture(120, 80)).size == (120, 80)


def test_segmenting_in_batches_keeps_results_and_order(segmenter: Detector) -> None:
    pictures = [make_picture(*size, seed=i) for i, size in enumerate([(120, 80), (80, 120), (120, 80)] * 2)]
    one_by_one = [segmenter.segment(picture, threshold=0.5) for picture in pictures]
    together = segmenter.segment(pictures, threshold=0.5, batch_size=3)
    for a, b in zip(one_by_one, together):
        assert (a.image_size, a.names) == (b.image_size, b.names)
        assert (a.ids != b.ids).mean() < 0.01


def test_detections_of_a_model_with_masks_have_them(segmenter: Detector) -> None:
    picture = make_picture(120, 80)
    found = segmenter(picture, threshold=0.3)
    boxes = segmenter(picture, threshold=0.3, masks=False)
    assert boxes.masks is None
    assert len(found) == len(boxes) >= 2
    np.testing.assert_allclose(found.boxes, boxes.boxes, atol=1e-2)
    assert found.masks is not None
    assert (found.masks.dtype, found.masks.shape) == (bool, (len(found), 80, 120))


def test_masks_belong_to_their_detections(tiny_panoptic: Path) -> None:
    """Each mask is the one that the old instance post-processing gives for the same query."""
    from detrkit import DetrForSegmentation, DetrImageProcessor

    image = make_picture(120, 80)
    model = DetrForSegmentation.from_pretrained(tiny_panoptic).eval()
    processor = DetrImageProcessor.from_pretrained(tiny_panoptic)
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = torch.tensor([[80, 120]])
    results = processor.post_process(outputs, sizes)
    processed = torch.tensor([inputs["pixel_mask"].shape[-2:]])
    results = processor.post_process_instance(results, outputs, sizes, processed)
    found = Detector.from_pretrained(tiny_panoptic, device="cpu")(image, threshold=0.3)
    assert len(found) >= 2
    for one in found:
        query = int((results[0]["scores"] - one.score).abs().argmin())
        wanted = results[0]["masks"][query, 0].numpy().astype(bool)
        assert (one.mask != wanted).mean() < 0.01


def test_a_model_without_masks_says_so(detector: Detector) -> None:
    for call in (detector.segment, lambda image: detector(image, masks=True)):
        with pytest.raises(SettingError, match="finds boxes only"):
            call(make_picture(120, 80))
    assert detector(make_picture(120, 80)).masks is None
    assert all("isthing" not in entry for entry in detector.categories())


def test_a_prediction_gives_at_any_threshold_what_a_call_gives_without_running_the_model_again(
    detector: Detector, segmenter: Detector, spy: SpyModel
) -> None:
    picture = make_picture(120, 80)
    prediction = detector.predict(picture, min_threshold=0.1)
    for threshold in (0.1, 0.3, 0.7, 1):
        assert_same(prediction.detections(threshold), detector(picture, threshold))
    assert len(spy.calls) == 1 + 4  # the prediction, and the calls it is compared with

    prediction = segmenter.predict(picture, min_threshold=0.1)
    for threshold in (0.1, 0.5, 0.85):
        found, wanted = prediction.segments(threshold), segmenter.segment(picture, threshold)
        assert found.names == wanted.names
        assert (found.ids != wanted.ids).mean() < 0.01  # another number of masks is computed at once
        assert_same(prediction.detections(threshold), segmenter(picture, threshold, masks=False))


def test_a_prediction_refuses_thresholds_that_the_model_was_not_run_for(detector: Detector) -> None:
    prediction = detector.predict(make_picture(120, 80), min_threshold=0.3)
    for threshold in (0.2, 1.1, float("nan")):
        with pytest.raises(SettingError, match=r"between 0\.3, which the model was run for, and 1"):
            prediction.detections(threshold)
    with pytest.raises(SettingError, match="finds boxes only"):
        prediction.segments(0.5)


def test_categories_say_what_is_a_thing(segmenter: Detector) -> None:
    assert segmenter.categories() == [
        {"id": 1, "name": "cat", "isthing": 1},
        {"id": 2, "name": "remote", "isthing": 1},
        {"id": 3, "name": "couch", "isthing": 0},
    ]


def test_a_config_without_architectures_is_told_by_the_weights(tiny_panoptic: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_panoptic, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert Detector.from_pretrained(folder, device="cpu").has_masks


def test_candidates_are_the_detections_at_every_threshold_with_their_queries(
    detector: Detector, tiny_detr: Path
) -> None:
    picture = make_picture(120, 80)
    prediction = detector.predict(picture, min_threshold=0)
    candidates = prediction.candidates()
    everything = prediction.detections(0)
    np.testing.assert_array_equal(candidates.detections.boxes, everything.boxes)
    best = detector.processor.query_probabilities(prediction.outputs["logits"])[0][0].amax(-1).numpy()
    np.testing.assert_array_equal(best[candidates.queries], everything.scores)
    middle = float(everything.scores[QUERIES // 2])
    kept = prediction.objects(middle)
    np.testing.assert_array_equal(kept.detections.scores, prediction.detections(middle).scores)
    np.testing.assert_array_equal(kept.queries, candidates.queries[: len(kept.queries)])


def test_a_stream_of_predictions_gives_the_calls_detections_in_order(
    detector: Detector, segmenter: Detector, pictures: list[Path]
) -> None:
    for one in (detector, segmenter):
        predictions = list(one.stream_predictions(pictures, batch_size=2))
        for prediction, wanted in zip(predictions, one(pictures, 0.3, masks=False), strict=True):
            assert_same(prediction.detections(0.3), wanted)
            assert prediction.frame.source == wanted.source
    with pytest.raises(SettingError, match="without masks"):
        predictions[0].segments(0.5)
