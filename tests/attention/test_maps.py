"""Attention in the image's coordinates: the model's own numbers, at the right places."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detrkit
from detrkit import Detector
from detrkit.attention.maps import (
    AttentionMaps,
    AttentionSamples,
    NothingDetectedError,
    decoder_attention,
    encoder_attention,
    query_statistics,
)
from detrkit.checkpoints.loading import load_pretrained
from detrkit.engines.export import export_model
from detrkit.errors import ImageError, SettingError
from detrkit.models.layers import attention as attention_layer
from detrkit.models.layers import feature_levels
from tests.closeness import assert_same_numbers
from tests.conftest import make_picture

WIDTH, HEIGHT = 150, 97  # resized to a size that is no multiple of any stride
MAPS = ["tiny_detr", "tiny_conditional_detr", "tiny_panoptic"]
MODELS = [*MAPS, "tiny_deformable_detr"]
PADDINGS = [None, (160, 224)]


@pytest.fixture
def picture() -> Image.Image:
    return make_picture(WIDTH, HEIGHT, seed=3)


@cache
def loaded(folder: Path) -> Detector:
    return Detector.from_pretrained(folder, device="cpu")


def detector_of(
    folder: Path, pad_size: Any = None, shortest_edge: int = 100, fresh: bool = False
) -> Detector:
    """A detector, shared among tests unless ``fresh``, that pads images to a size."""
    detector = Detector.from_pretrained(folder, device="cpu") if fresh else loaded(folder)
    detector.processor.size = {"shortest_edge": shortest_edge, "longest_edge": 2 * shortest_edge}
    detector.processor.pad_size = pad_size
    return detector


@pytest.fixture(params=MODELS)
def any_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=MAPS)
def maps_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=PADDINGS, ids=["whole", "padded"])
def pad_size(request: pytest.FixtureRequest) -> Any:
    return request.param


@cache
def plain_model(folder: Path) -> Any:
    """The model as it is for Transformers, not prepared for speed."""
    model = getattr(detrkit, type(loaded(folder).model).__name__).from_pretrained(folder).eval()
    return getattr(model, "detector", model)


def plain_outputs(folder: Path, detector: Detector, picture: Image.Image) -> Any:
    """What the model itself says of the picture."""
    with torch.no_grad():
        return plain_model(folder)(**detector.processor(picture, return_tensors="pt"), output_attentions=True)


# The model's own numbers


def test_detections_are_those_of_the_detector(any_folder: Path, picture: Image.Image) -> None:
    detector = detector_of(any_folder)
    attention = decoder_attention(detector, picture, 0.3)
    expected = detector(picture, 0.3, masks=False)
    assert len(attention) == len(expected) > 1
    assert attention.detections is not None
    np.testing.assert_allclose(attention.detections.boxes, expected.boxes, atol=1e-3)
    np.testing.assert_array_equal(attention.detections.labels, expected.labels)
    np.testing.assert_allclose(
        attention.points, (expected.boxes[:, :2] + expected.boxes[:, 2:]) / 2, atol=1e-3
    )


def test_each_row_is_of_the_query_that_found_the_object(any_folder: Path, picture: Image.Image) -> None:
    detector = detector_of(any_folder)
    attention = decoder_attention(detector, picture, 0.3)
    outputs = plain_outputs(any_folder, detector, picture)
    assert attention.detections is not None
    assert attention.queries is not None
    boxes = outputs.pred_boxes[0, attention.queries].numpy() * np.tile((WIDTH, HEIGHT), 2)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    np.testing.assert_allclose(attention.detections.boxes, corners, atol=1e-3)
    for layer in (0, -1):
        attention = decoder_attention(detector, picture, 0.3, layer=layer)
        weights = outputs.cross_attentions[layer][0]
        if isinstance(attention, AttentionMaps):
            weights = weights.transpose(0, 1).unflatten(-1, attention.maps.shape[1:])
        assert_same_numbers(attention.weights, weights[attention.queries])
        assert attention.layer == layer % len(outputs.cross_attentions)


def test_weights_of_a_head_sum_to_one(any_folder: Path, picture: Image.Image, pad_size: Any) -> None:
    detector = detector_of(any_folder, pad_size)
    found = decoder_attention(detector, picture, 0.3)
    for attention in (found, encoder_attention(detector, picture, found.points.clip(0, picture.size))):
        sums = attention.weights.reshape(*attention.weights.shape[:2], -1).sum(-1)
        np.testing.assert_allclose(sums, 1, atol=1e-5)
        if isinstance(attention, AttentionMaps):
            np.testing.assert_allclose(attention.maps.sum(axis=(1, 2)), 1, atol=1e-5)
        everywhere = np.tile((-1e6, -1e6, 1e6, 1e6), (len(attention), 1))
        np.testing.assert_allclose(attention.share_inside(everywhere), 1, atol=1e-5)


def test_half_precision_is_read_too(tiny_detr: Path, picture: Image.Image) -> None:
    detector = Detector.from_pretrained(tiny_detr, device="cpu", dtype="bfloat16")
    attention = decoder_attention(detector, picture, 0.3)
    assert attention.weights.dtype == np.float32
    np.testing.assert_allclose(attention.weights.sum(axis=(2, 3)), 1, atol=0.02)


# Places


def look_at_one_key(monkeypatch: pytest.MonkeyPatch, key: Any) -> None:
    """Makes every attention to an image look at one cell alone; ``key`` gives it for each query's number."""
    attend = attention_layer.attend

    def at_one(query: Any, keys: Any, value: Any, *args: Any, **options: Any) -> Any:
        attended, weights = attend(query, keys, value, *args, **options)
        if weights is not None and weights.shape[-1] != 12:  # not among the 12 queries
            wanted = torch.as_tensor([key(number) for number in range(weights.shape[-2])])
            weights = nn.functional.one_hot(wanted, weights.shape[-1]).to(weights).expand_as(weights)
        return attended, weights

    monkeypatch.setattr(attention_layer, "attend", at_one)


def test_attention_to_one_cell_lands_on_its_pixels(
    maps_folder: Path, picture: Image.Image, pad_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 x 154 pixels are 4 x 5 cells of stride 32; padded to 160 x 224 they are so many of 5 x 7."""
    detector = detector_of(maps_folder, pad_size)
    row, column = 2, 3
    look_at_one_key(monkeypatch, lambda _: row * (7 if pad_size else 5) + column)
    cell = (WIDTH * 3 / 5, HEIGHT * 2 / 4, WIDTH * 4 / 5, HEIGHT * 3 / 4)
    found = decoder_attention(detector, picture, 0.3)
    for attention in (found, encoder_attention(detector, picture, [(0, 0), (10, 90)])):
        assert isinstance(attention, AttentionMaps)
        assert attention.maps.shape[1:] == (4, 5)
        assert (attention.maps[:, row, column] == 1).all()
        np.testing.assert_allclose(attention.share_inside([cell] * len(attention)), 1)
        half = (cell[0], cell[1], (cell[0] + cell[2]) / 2, cell[3])
        np.testing.assert_allclose(attention.share_inside([half] * len(attention)), 0.5)
        beside = (cell[2], cell[1], WIDTH, cell[3])
        np.testing.assert_allclose(attention.share_inside([beside] * len(attention)), 0, atol=1e-9)


def test_a_point_is_answered_by_the_cell_it_lies_in(
    maps_folder: Path, picture: Image.Image, pad_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = detector_of(maps_folder, pad_size)
    look_at_one_key(monkeypatch, lambda number: number)  # every cell looks at itself
    points = np.random.default_rng(0).uniform(0, 1, (40, 2)) * (WIDTH, HEIGHT)
    points = np.concatenate([points, [(0, 0), (WIDTH, 0), (0, HEIGHT), (WIDTH, HEIGHT)]])
    attention = encoder_attention(detector, picture, points)
    assert isinstance(attention, AttentionMaps)
    for point, centre, cells in zip(points, attention.points, attention.maps):
        row, column = np.argwhere(cells == 1)[0]
        cell = np.array([WIDTH / 5, HEIGHT / 4])
        assert (np.array([column, row]) * cell <= point).all()
        assert (point <= np.array([column + 1, row + 1]) * cell).all()
        np.testing.assert_allclose(centre, (np.array([column, row]) + 0.5) * cell)


def test_a_spot_in_the_image_changes_the_cells_that_cover_it(tiny_detr: Path) -> None:
    """Independent of the rule: what the backbone sees at a cell is what lies at the cell's place."""
    detector = detector_of(tiny_detr, shortest_edge=320)
    backbone = detector.model.model.backbone
    dark = Image.new("RGB", (300, 200))
    points = [(x, y) for x in (40, 150, 260) for y in (30, 95, 170)]
    centres = encoder_attention(detector, dark, points).points

    def features(image: Image.Image) -> torch.Tensor:
        with torch.inference_mode():
            return backbone(detector.processor(image, return_tensors="pt")["pixel_values"])[-1][0]

    for (x, y), centre in zip(points, centres):
        spotted = dark.copy()
        spotted.paste((255, 255, 255), (x - 8, y - 8, x + 8, y + 8))
        change = (features(spotted) - features(dark)).abs().sum(0).numpy()
        change = (change - 0.3 * change.max()).clip(min=0)
        change /= change.sum()
        rows, columns = change.shape
        weight_x = (change.sum(0) * (np.arange(columns) + 0.5)).sum() / columns * 300
        weight_y = (change.sum(1) * (np.arange(rows) + 0.5)).sum() / rows * 200
        assert abs(weight_x - x) < 300 / columns
        assert abs(weight_y - y) < 200 / rows
        assert abs(centre[0] - x) <= 300 / columns / 2
        assert abs(centre[1] - y) <= 200 / rows / 2


def test_even_attention_falls_into_a_box_by_its_area(
    tiny_detr: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = detector_of(tiny_detr)
    attend = attention_layer.attend

    def even(*args: Any, **options: Any) -> Any:
        attended, weights = attend(*args, **options)
        return attended, None if weights is None else torch.full_like(weights, 1 / weights.shape[-1])

    monkeypatch.setattr(attention_layer, "attend", even)
    attention = encoder_attention(detector, picture, [(1, 1), (2, 2)])
    boxes = np.array([(13.3, 20.1, 77.7, 90.4), (-50, -50, WIDTH / 2, HEIGHT / 2)])
    inside = boxes.clip(0, [WIDTH, HEIGHT] * 2)
    areas = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    np.testing.assert_allclose(attention.share_inside(boxes), areas / (WIDTH * HEIGHT), atol=1e-6)


# Samples


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """Shapes, locations and weights of every call of the operator: encoder's layers, then the decoder's."""
    made = []
    operator = feature_levels.deformable_attention

    def noting(value: Any, shapes: Any, locations: Any, weights: Any, *args: Any) -> Any:
        made.append((shapes, locations.numpy().copy(), weights.numpy().copy()))
        return operator(value, shapes, locations, weights, *args)

    monkeypatch.setattr(feature_levels, "deformable_attention", noting)
    return made


def test_samples_are_those_that_the_layers_took(
    tiny_deformable_detr: Path, picture: Image.Image, calls: list
) -> None:
    detector = detector_of(tiny_deformable_detr)
    for layer in (0, 1):
        calls.clear()
        attention = decoder_attention(detector, picture, 0.3, layer=layer)
        _, locations, weights = calls[2 + layer]
        assert isinstance(attention, AttentionSamples)
        # Without padding a location relative to any level is one relative to the image.
        expected = locations[0, attention.queries] * (WIDTH, HEIGHT)
        np.testing.assert_allclose(attention.locations, expected, rtol=1e-5)
        np.testing.assert_array_equal(attention.weights, weights[0, attention.queries])


@pytest.mark.parametrize("level", [0, 2, 3])
def test_encoder_samples_are_those_of_the_cell_at_the_point(
    tiny_deformable_detr: Path, picture: Image.Image, calls: list, pad_size: Any, level: int
) -> None:
    """Of 100 x 154 pixels level 0 is 13 x 20 cells, level 3 2 x 3."""
    detector = detector_of(tiny_deformable_detr, pad_size)
    points = [(0.0, 0.0), (70.0, 33.0), (WIDTH, HEIGHT)]
    attention = encoder_attention(detector, picture, points, level=level, layer=0)
    shapes, locations, weights = calls[0]
    real = [(13, 20), (7, 10), (4, 5), (2, 3)]
    assert (shapes != real) == (pad_size is not None)
    start = sum(height * width for height, width in shapes[:level])
    scales = [(WIDTH * s[1] / r[1], HEIGHT * s[0] / r[0]) for s, r in zip(shapes, real)]
    assert isinstance(attention, AttentionSamples)
    for row, (x, y) in enumerate(points):
        column = min(int(x / WIDTH * real[level][1]), real[level][1] - 1)
        line = min(int(y / HEIGHT * real[level][0]), real[level][0] - 1)
        cell = start + line * shapes[level][1] + column
        np.testing.assert_array_equal(attention.weights[row], weights[0, cell])
        expected = locations[0, cell] * np.array(scales)[:, None]
        np.testing.assert_allclose(attention.locations[row], expected, rtol=1e-4, atol=1e-3)


def test_samples_without_offsets_lie_on_the_point_that_attends(
    tiny_deformable_detr: Path, picture: Image.Image, pad_size: Any
) -> None:
    """The model goes from image to padded levels itself; the way back must lead to the same place."""
    detector = detector_of(tiny_deformable_detr, pad_size, fresh=True)

    class Nothing(nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return query.new_zeros(*query.shape[:-1], 4 * 4 * 4 * 2)

    for part in detector.model.model.encoder.layers:
        part.self_attn.sampling_offsets = Nothing()
    points = np.random.default_rng(0).uniform(0, 1, (20, 2)) * (WIDTH, HEIGHT)
    for level in range(4):
        attention = encoder_attention(detector, picture, points, level=level)
        assert isinstance(attention, AttentionSamples)
        wanted = np.broadcast_to(attention.points[:, None, None, None], attention.locations.shape)
        np.testing.assert_allclose(attention.locations, wanted, rtol=1e-4, atol=1e-2)
        cell = np.array([WIDTH, HEIGHT]) / [(20, 13), (10, 7), (5, 4), (3, 2)][level]
        assert (np.abs(attention.points - points) <= cell / 2 + 1e-6).all()


def test_the_share_of_samples_counts_their_weights() -> None:
    attention = AttentionSamples(
        weights=np.array([[[[0.5, 0.2], [0.3, 0.0]], [[0.1, 0.6], [0.1, 0.2]]]], dtype=np.float32),
        locations=np.array(
            [[[[(5, 5), (50, 5)], [(5, 50), (9, 9)]], [[(-5, 5), (6, 6)], [(10, 10), (11, 11)]]]],
            dtype=np.float32,
        ),
        points=np.zeros((1, 2)),
        image_size=(60, 60),
        layer=0,
    )
    np.testing.assert_allclose(attention.share_inside([(0, 0, 10, 10)]), [(0.5 + 0.0 + 0.6 + 0.1) / 2])
    with pytest.raises(ValueError, match="2 boxes for 1 row"):
        attention.share_inside([(0, 0, 1, 1)] * 2)


def test_rows_can_be_chosen(any_folder: Path, picture: Image.Image) -> None:
    attention = decoder_attention(detector_of(any_folder), picture, 0.3)
    assert attention.queries is not None
    assert attention.detections is not None
    for index, rows in ((slice(1, 3), [1, 2]), ([2, 0], [2, 0]), (-1, [len(attention) - 1])):
        chosen = attention[index]
        assert type(chosen) is type(attention)
        np.testing.assert_array_equal(chosen.weights, attention.weights[rows])
        np.testing.assert_array_equal(chosen.points, attention.points[rows])
        np.testing.assert_array_equal(chosen.queries, attention.queries[rows])
        np.testing.assert_array_equal(chosen.detections.boxes, attention.detections.boxes[rows])
        np.testing.assert_allclose(
            chosen.share_inside(chosen.detections.boxes),
            attention.share_inside(attention.detections.boxes)[rows],
        )


# Queries


def test_queries_are_counted_over_images(any_folder: Path, pictures: list[Path]) -> None:
    detector = detector_of(any_folder)
    statistics = query_statistics(detector, pictures, 0.4, batch_size=2)
    expected = [plain_outputs(any_folder, detector, Image.open(path)) for path in pictures]
    rows = 0
    for position, outputs in enumerate(expected):
        logits = outputs.logits[0]
        softmax = type(detector.model).__name__.startswith("Detr")
        probabilities = logits.softmax(-1)[:, :-1] if softmax else logits.sigmoid()
        scores, labels = probabilities.max(-1)
        fired = (scores > 0.4).nonzero()[:, 0].numpy()
        here = statistics.images == position
        np.testing.assert_array_equal(statistics.queries[here], fired)
        np.testing.assert_allclose(statistics.scores[here], scores[fired], atol=1e-4)
        np.testing.assert_array_equal(statistics.labels[here], labels[fired])
        np.testing.assert_allclose(statistics.boxes[here], outputs.pred_boxes[0, fired], atol=1e-4)
        rows += len(fired)
    assert len(statistics.queries) == rows > 0
    assert statistics.counts.shape == (statistics.query_count,) == (12,)
    assert statistics.counts.sum() == rows
    assert statistics.image_count == 4
    assert statistics.ranked == ("deformable" in any_folder.name)


def test_queries_of_an_exported_model_are_counted_too(
    tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model, processor = load_pretrained(str(tiny_detr), None)
    export_model(model, tmp_path / "out", "onnx", processor=processor, verify=False)
    wanted = query_statistics(Detector.from_pretrained(tiny_detr, device="cpu"), pictures, 0.3)
    found = query_statistics(Detector.from_pretrained(tmp_path / "out"), pictures, 0.3)
    np.testing.assert_array_equal(found.queries, wanted.queries)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-4)


def test_below_zero_every_query_counts(tiny_detr: Path, pictures: list[Path]) -> None:
    detector = detector_of(tiny_detr)
    assert query_statistics(detector, pictures, -1).counts.tolist() == [4] * 12
    nothing = query_statistics(detector, pictures, 1)
    assert (nothing.counts.tolist(), nothing.image_count) == ([0] * 12, 4)


def test_mistakes_about_queries_are_named(tiny_detr: Path, pictures: list[Path]) -> None:
    detector = detector_of(tiny_detr)
    with pytest.raises(ImageError, match="no images"):
        query_statistics(detector, [])
    with pytest.raises(SettingError, match="threshold"):
        query_statistics(detector, pictures, 1.5)
    with pytest.raises(SettingError, match="batch_size"):
        query_statistics(detector, pictures, batch_size=0)


# Mistakes


@pytest.mark.parametrize("point", [(-1, 5), (WIDTH + 0.5, 5), (5, HEIGHT + 1), (5, float("nan"))])
def test_a_point_outside_of_the_image_is_refused(tiny_detr: Path, picture: Image.Image, point: Any) -> None:
    with pytest.raises(SettingError, match="outside the image, which is 150 pixels wide and 97 high"):
        encoder_attention(detector_of(tiny_detr), picture, [(3, 3), point])


def test_mistakes_are_named(tiny_detr: Path, picture: Image.Image) -> None:
    detector = detector_of(tiny_detr)
    with pytest.raises(SettingError, match="pair of numbers"):
        encoder_attention(detector, picture, [(1, 2, 3)])
    with pytest.raises(SettingError, match="at least one point"):
        encoder_attention(detector, picture, [])
    with pytest.raises(SettingError, match="feature level 1 does not exist: this model has 1 levels"):
        encoder_attention(detector, picture, [(1, 2)], level=1)
    with pytest.raises(SettingError, match="encoder layer 2 does not exist: this model has 2 layers"):
        encoder_attention(detector, picture, [(1, 2)], layer=2)
    with pytest.raises(SettingError, match="decoder layer -3 does not exist: this model has 2 layers"):
        decoder_attention(detector, picture, 0.3, layer=-3)
    with pytest.raises(NothingDetectedError, match=r"above 1: the best score is 0\.\d+; lower the threshold"):
        decoder_attention(detector, picture, 1)
    with pytest.raises(SettingError, match="between 0 and 1"):
        decoder_attention(detector, picture, 1.1)
    with pytest.raises(ImageError, match=r"nowhere\.jpg"):
        decoder_attention(detector, "nowhere.jpg")


def test_a_model_that_left_pytorch_or_is_compiled_is_refused(tiny_detr: Path, picture: Image.Image) -> None:
    from detrkit.engines.exported import ExportedModel

    detector = detector_of(tiny_detr, fresh=True)
    detector.model._compiled_call_impl = detector.model._call_impl  # as ``compile()`` does, in less time
    with pytest.raises(SettingError, match=r"compiled models .* engine='torch'"):
        decoder_attention(detector, picture)
    detector.model = ExportedModel(lambda _: [], [], detector.model.config)
    with pytest.raises(SettingError, match=r"exported models .* engine='torch'"):
        encoder_attention(detector, picture, [(1, 1)])
