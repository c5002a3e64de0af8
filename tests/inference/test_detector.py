from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit import Detections, Detector
from detrkit.common.progress import with_progress
from detrkit.errors import ImageError, SettingError
from detrkit.families import family_of
from tests.conftest import make_picture
from tests.inference.conftest import QUERIES, SpyModel, assert_same
from tests.tiny import FAMILIES, TINY_NAMES

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


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_half_precision_finds_nearly_the_same(tiny_detr: Path, detector: Detector, dtype: object) -> None:
    half = Detector.from_pretrained(tiny_detr, device="cpu", dtype=dtype)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    found, wanted = (d(make_picture(120, 80), threshold=0) for d in (half, detector))
    assert found.boxes.dtype == np.float32
    np.testing.assert_allclose(found.scores, wanted.scores, atol=0.1)


# Detections


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
