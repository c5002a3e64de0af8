import io
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from detrkit import ConditionalDetrImageProcessor, DetrFeatureExtractor, DetrImageProcessor, rgb_to_id
from detrkit.processing import segmentation
from tests.golden import OUTPUTS

CLASSES = 201  # labels 0 to 200, of which those above 90 are stuff
PERSON, CAR, SKY, GRASS = 1, 3, 187, 193


def logits_of(labels, scores):
    """DETR's logits (1, queries, CLASSES + 1) under which each query has a label with a score."""
    probabilities = torch.full((1, len(labels), CLASSES + 1), 1e-9)
    for k, (label, score) in enumerate(zip(labels, scores)):
        probabilities[0, k, -1] = 1 - score
        probabilities[0, k, label] = score
    return probabilities.clamp(min=1e-9).log()


def outputs_of(labels, masks, scores=None):
    masks = torch.as_tensor(masks, dtype=torch.float32)
    return SimpleNamespace(
        logits=logits_of(labels, scores or [0.95] * len(labels)),
        pred_masks=masks[None],
        pred_boxes=torch.full((1, len(labels), 4), 0.5),
    )


def quarters(size=8):
    """Masks of the four quarters of a square."""
    masks = torch.full((4, size, size), -5.0)
    half = size // 2
    for k, (y, x) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
        masks[k, y : y + half, x : x + half] = 5.0
    return masks


def panoptic_by_hand(logits, masks, processed_size, target_size, threshold=0.85):
    """The original's rule, pixel by pixel, in NumPy: ids from 0, and (category, area) of each segment."""
    scores, labels = logits.softmax(-1).max(-1)
    kept = [k for k in range(len(labels)) if labels[k] != logits.shape[-1] - 1 and scores[k] > threshold]
    labels = [int(labels[k]) for k in kept]
    height, width = target_size
    if not kept:
        return np.zeros((height, width), int), []
    resized = F.interpolate(masks[kept][:, None], processed_size, mode="bilinear", align_corners=False)
    maps = list(resized[:, 0].flatten(1))
    first_pass = True
    while True:
        low = np.zeros(processed_size, int)
        probabilities = torch.stack(maps, dim=1).softmax(-1).tolist() if maps else []
        for y in range(processed_size[0]):
            for x in range(processed_size[1]):
                column = probabilities[y * processed_size[1] + x] if maps else []
                low[y, x] = column.index(max(column)) if column else 0
                if first_pass and column and labels[low[y, x]] > 90:
                    low[y, x] = labels.index(labels[low[y, x]])
        first_pass = False
        image = PIL.Image.fromarray(low.astype(np.uint8))
        ids = np.array(image.resize((width, height), PIL.Image.Resampling.NEAREST)).astype(int)
        areas = [int((ids == k).sum()) for k in range(len(labels))]
        if not labels or min(areas) > 4:
            return ids, list(zip(labels, areas))
        maps = [map_ for map_, area in zip(maps, areas) if area > 4]
        labels = [label for label, area in zip(labels, areas) if area > 4]


def assert_same_panoptic(ids, segments, expected_ids, expected_segments):
    """Ids may be numbered otherwise; each segment has its pixels, category and area."""
    assert [(s["category_id"], s["area"]) for s in segments] == expected_segments
    assert [s["id"] for s in segments] == list(range(1, len(segments) + 1))
    np.testing.assert_array_equal(ids, expected_ids + (1 if segments else 0))


GOLDEN_CASES = [pytest.param(case, id=case.name) for case in OUTPUTS]


@pytest.mark.parametrize("target", ["size", "orig"])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_panoptic_segmentations_equal_the_originals(case, target):
    outputs, data, expected = case.outputs(), case.expected(), case.segments(target)
    processed = torch.from_numpy(data["size"])[None]
    targets = torch.from_numpy(data["size" if target == "size" else "orig_size"])[None]
    result = DetrImageProcessor().post_process_panoptic(outputs, processed, targets)[0]
    ids = rgb_to_id(np.array(PIL.Image.open(io.BytesIO(result["png_string"]))))
    pairs = [(segment["category_id"], segment["area"]) for segment in expected]
    assert_same_panoptic(ids, result["segments_info"], data[f"panoptic_{target}_ids"], pairs)
    assert [s["isthing"] for s in result["segments_info"]] == [s["isthing"] for s in expected]

    maps = DetrImageProcessor().panoptic_maps(outputs, processed, targets)[0]
    np.testing.assert_array_equal(maps[0], ids)
    new = DetrImageProcessor().post_process_panoptic_segmentation(
        outputs, target_sizes=targets, processed_sizes=processed
    )[0]
    np.testing.assert_array_equal(new["segmentation"], ids)
    assert [s["area"] for s in new["segments_info"]] == [s["area"] for s in expected]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_instance_masks_equal_the_originals(case):
    outputs, data = case.outputs(), case.expected()
    processor = DetrImageProcessor()
    size, orig_size = (torch.from_numpy(data[name])[None] for name in ("size", "orig_size"))
    results = processor.post_process(outputs, orig_size)
    masks = processor.post_process_instance(results, outputs, orig_size, size)[0]["masks"]
    assert masks.dtype == torch.uint8
    assert masks.shape == (len(data["logits"]), 1, *data["orig_size"])
    np.testing.assert_array_equal(np.packbits(masks.numpy()), data["segm_masks_packed"])

    rows = torch.from_numpy(np.flatnonzero(results[0]["scores"] > 0.5))
    found = processor.detection_masks(outputs, [rows], size, orig_size)[0]
    kept = processor.post_process_object_detection(outputs, 0.5, orig_size)[0]
    assert len(found) == len(kept["scores"])
    np.testing.assert_array_equal(found, masks[results[0]["scores"] > 0.5, 0].bool())


random_scenes = st.builds(
    lambda seed, queries, scale: (seed, queries, scale),
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.sampled_from([1e-7, 0.1, 3.0]),  # so small, that a softmax makes equals of some
)


def random_outputs(scene):
    seed, queries, scale = scene
    generator = torch.Generator().manual_seed(seed)
    labels = [
        [PERSON, CAR, SKY, GRASS][k] for k in torch.randint(4, (queries,), generator=generator).tolist()
    ]
    scores = (torch.rand(queries, generator=generator) * 0.3 + 0.7).tolist()
    return outputs_of(labels, torch.randn(queries, 4, 5, generator=generator) * scale, scores)


@given(random_scenes, st.sampled_from([(16, 20), (32, 40), (9, 7)]))
@settings(max_examples=25)
def test_panoptic_segmentations_follow_the_rule_pixel_by_pixel(scene, target):
    outputs = random_outputs(scene)
    ids, segments = DetrImageProcessor().panoptic_maps(outputs, [(16, 20)], [target])[0]
    expected = panoptic_by_hand(outputs.logits[0], outputs.pred_masks[0], (16, 20), target)
    assert ids.dtype == torch.int32
    assert_same_panoptic(ids.numpy(), segments, *expected)


@given(random_scenes)
@settings(max_examples=25)
def test_segments_partition_the_pixels(scene):
    processor = DetrImageProcessor()
    for options in ({}, {"overlap_mask_area_threshold": 0.6}):
        result = processor.post_process_panoptic_segmentation(
            random_outputs(scene), target_sizes=[(16, 20)], **options
        )[0]
        ids, segments = result["segmentation"], result["segments_info"]
        assert len({s["id"] for s in segments}) == len(segments)
        assert {s["id"]: s["area"] for s in segments} == {
            int(k): int(n) for k, n in zip(*ids.unique(return_counts=True)) if k
        }
        stuff = [s["label_id"] for s in segments if not s["isthing"]]
        assert len(stuff) == len(set(stuff))


@given(random_scenes)
@settings(max_examples=10)
def test_masks_computed_in_parts_give_the_same(scene):
    outputs = random_outputs(scene)
    processor = DetrImageProcessor()

    def everything():
        return [
            processor.post_process_panoptic_segmentation(outputs, 0.5, 0.5, 0.3)[0],
            processor.post_process_instance_segmentation(outputs)[0],
            processor.post_process_semantic_segmentation(outputs)[0],
            processor.post_process_segmentation(outputs, [(8, 9)])[0],
        ]

    whole = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "_MASKS_AT_ONCE", 3)
        torch.testing.assert_close(everything(), whole, atol=0, rtol=0)


def test_the_padding_of_a_batch_changes_nothing():
    labels, masks = [PERSON, CAR, SKY, GRASS], quarters()
    processor = DetrImageProcessor()
    # Padding as a multiple of the stride, where masks go on as they end: resizing sees the same neighbours.
    padded = F.pad(masks[None], (0, 4, 0, 6), mode="replicate")[0]
    sizes, targets = [(32, 32)], [(50, 70)]
    small, large = outputs_of(labels, masks), outputs_of(labels, padded)
    options = {"processed_sizes": sizes, "padded_size": (56, 48)}
    alone = processor.panoptic_maps(small, sizes, targets)[0]
    cropped = processor.panoptic_maps(large, sizes, targets, padded_size=(56, 48))[0]
    torch.testing.assert_close(cropped, alone)
    for method in ("post_process_instance_segmentation", "post_process_semantic_segmentation"):
        call = getattr(processor, method)
        expected = call(small, target_sizes=targets, processed_sizes=sizes)
        torch.testing.assert_close(call(large, target_sizes=targets, **options), expected)
    # In a batch the largest image gives the padded size.
    batch = SimpleNamespace(
        logits=torch.cat([large.logits] * 2),
        pred_masks=torch.cat([large.pred_masks] * 2),
        pred_boxes=torch.cat([large.pred_boxes] * 2),
    )
    both = processor.panoptic_maps(batch, [(56, 48), (32, 32)], [(56, 48), (50, 70)])
    torch.testing.assert_close(both[1], alone)
    rows = torch.arange(0, small.logits.shape[1], 2)
    found = processor.detection_masks(batch, [rows, rows], [(56, 48), (32, 32)], [(56, 48), (50, 70)])
    torch.testing.assert_close(found[1], processor.detection_masks(small, [rows], sizes, targets)[0])


def test_classes_to_fuse_have_one_segment_and_ids_stay_unique():
    outputs = outputs_of([100, 1, 100, 2], quarters())
    result = DetrImageProcessor().post_process_panoptic_segmentation(outputs, label_ids_to_fuse={100})[0]
    segments = result["segments_info"]
    assert [(s["id"], s["label_id"], s["was_fused"]) for s in segments] == [
        (1, 100, True),
        (2, 1, False),
        (3, 2, False),
    ]
    assert sorted(result["segmentation"].unique().tolist()) == [1, 2, 3]
    apart = DetrImageProcessor().post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set())[0]
    assert [s["label_id"] for s in apart["segments_info"]] == [100, 1, 100, 2]
    assert not any(s["was_fused"] for s in apart["segments_info"])


def test_a_map_of_things_takes_the_place_of_cocos(tmp_path):
    outputs = outputs_of([1, 1, 120, 120], quarters())
    things = {"1": False, "120": True}
    processor = DetrImageProcessor(is_thing_map=things)
    processor.save_pretrained(tmp_path)
    loaded = DetrImageProcessor.from_pretrained(tmp_path)
    assert loaded.is_thing_map == {1: False, 120: True}
    assert "is_thing_map" not in DetrImageProcessor().to_dict()
    expected = [(1, False), (120, True), (120, True)]
    for result in (
        loaded.panoptic_maps(outputs, [(8, 8)])[0][1],
        DetrImageProcessor().panoptic_maps(outputs, [(8, 8)], is_thing_map=things)[0][1],
        loaded.post_process_panoptic(outputs, [(8, 8)])[0]["segments_info"],
    ):
        assert [(s["category_id"], s["isthing"]) for s in result] == expected
    with pytest.raises(ValueError, match="is_thing_map"):
        DetrImageProcessor(is_thing_map=[1, 2])


def test_a_label_that_a_map_of_things_leaves_out_is_a_thing():
    outputs = outputs_of([120, 120, 7, 7], quarters())
    segments = DetrImageProcessor().panoptic_maps(outputs, [(8, 8)], is_thing_map={120: False})[0][1]
    assert [(s["category_id"], s["isthing"]) for s in segments] == [(120, False), (7, True), (7, True)]


def test_the_mask_threshold_is_one_of_probability_alone():
    masks = quarters()
    masks[masks > 0] = float(torch.logit(torch.tensor(0.55)))
    outputs = outputs_of([1, 2, 3, 4], masks, [0.8] * 4)
    for method in ("post_process_panoptic_segmentation", "post_process_instance_segmentation"):
        result = getattr(DetrImageProcessor(), method)(outputs, 0.5, 0.5, 0.8)[0]
        assert [s["area"] for s in result["segments_info"]] == [16, 16, 16, 16]
    stricter = DetrImageProcessor().post_process_panoptic_segmentation(outputs, 0.5, mask_threshold=0.6)[0]
    assert stricter["segments_info"] == []
    assert not stricter["segmentation"].any()


def test_instances_leave_the_background_and_the_weaker_of_two_out():
    masks = quarters()[[0, 0, 3]]
    outputs = outputs_of([1, 2, 3], masks, [0.7, 0.9, 0.9])
    result = DetrImageProcessor().post_process_instance_segmentation(outputs, target_sizes=[(8, 8)])[0]
    assert [(s["id"], s["label_id"], s["area"]) for s in result["segments_info"]] == [(1, 2, 16), (2, 3, 16)]
    assert [s["was_fused"] for s in result["segments_info"]] == [False, False]
    assert result["segmentation"].dtype == torch.int32
    assert result["segmentation"][0, 7] == 0
    runs = DetrImageProcessor().post_process_instance_segmentation(outputs, return_coco_annotation=True)[0]
    assert runs["segmentation"][0] == [1, 4, 9, 4, 17, 4, 25, 4]


@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_found_is_a_map_of_zeros(queries):
    outputs = outputs_of([PERSON] * queries, torch.zeros(queries, 4, 4), [0.1] * queries)
    processor = DetrImageProcessor()
    panoptic = processor.post_process_panoptic_segmentation(outputs, 0.0, target_sizes=[(6, 5)])[0]
    instances = processor.post_process_instance_segmentation(outputs, target_sizes=[(6, 5)])[0]
    for result in (panoptic, instances):
        assert result["segmentation"].dtype == torch.int32
        assert result["segmentation"].shape == (6, 5)
        assert not result["segmentation"].any()
        assert result["segments_info"] == []
    assert processor.post_process_segmentation(outputs, [(6, 5)])[0]["masks"].shape == (0, 6, 5)
    assert processor.detection_masks(outputs, [torch.empty(0, dtype=torch.int64)], [(8, 8)], [(6, 5)])[
        0
    ].shape == (0, 6, 5)
    semantic = processor.post_process_semantic_segmentation(outputs, [(6, 5)])[0]
    assert semantic.shape == (6, 5)
    png = processor.post_process_panoptic(outputs, [(8, 8)], [(6, 5)])[0]
    assert png["segments_info"] == []
    assert not np.array(PIL.Image.open(io.BytesIO(png["png_string"]))).any()


def test_semantic_segmentation_is_the_likeliest_class():
    outputs = outputs_of([PERSON, SKY, SKY, 0], quarters())
    ids = DetrImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(16, 16)])[0]
    assert [int(ids[y, x]) for y in (0, 15) for x in (0, 15)] == [PERSON, SKY, SKY, 0]


def test_sigmoid_families_know_their_last_class_and_no_other_than_objects():
    logits = torch.full((1, 4, 3), -6.0)
    for query, label in enumerate([0, 2, 2, 1]):
        logits[0, query, label] = 6.0
    boxes = torch.full((1, 4, 4), 0.5)
    outputs = {"logits": logits, "pred_masks": quarters()[None], "pred_boxes": boxes}
    processor = ConditionalDetrImageProcessor()
    panoptic = processor.post_process_panoptic_segmentation(outputs)[0]["segments_info"]
    assert [s["label_id"] for s in panoptic] == [0, 2, 2, 1]
    assert panoptic[0]["score"] == round(float(torch.tensor(6.0).sigmoid()), 6)
    instances = processor.post_process_instance_segmentation(outputs)[0]["segments_info"]
    assert [s["label_id"] for s in instances] == [0, 2, 2, 1]
    semantic = processor.post_process_semantic_segmentation(outputs)[0]
    assert semantic.unique().tolist() == [0, 1, 2]
    # Each row of masks belongs to the row of boxes, whichever query that came from.
    results = processor.post_process(outputs, [(8, 8)])
    masks = processor.post_process_instance(results, outputs, [(8, 8)], [(8, 8)])[0]["masks"]
    assert masks.shape == (12, 1, 8, 8)
    by_label = {int(label): mask for label, mask in zip(results[0]["labels"][:4], masks[:4])}
    np.testing.assert_array_equal(by_label[1][0].bool(), quarters()[3] > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_read_in_full_precision(dtype):
    half = outputs_of([PERSON, CAR, SKY, GRASS], quarters())
    half.logits, half.pred_masks = half.logits.to(dtype), half.pred_masks.to(dtype)
    full = SimpleNamespace(logits=half.logits.float(), pred_masks=half.pred_masks.float())
    processor = DetrImageProcessor()
    for method in ("panoptic_segmentation", "instance_segmentation", "semantic_segmentation"):
        call = getattr(processor, f"post_process_{method}")
        torch.testing.assert_close(call(half, target_sizes=[(20, 30)]), call(full, target_sizes=[(20, 30)]))


def test_the_snippet_of_the_panoptic_model_card():
    feature_extractor = DetrFeatureExtractor()
    encoding = feature_extractor(images=np.zeros((48, 64, 3), np.uint8), return_tensors="pt")
    outputs = outputs_of([PERSON, CAR, SKY, SKY], quarters())
    processed_sizes = torch.as_tensor(encoding["pixel_values"].shape[-2:]).unsqueeze(0)
    result = feature_extractor.post_process_panoptic(outputs, processed_sizes)[0]
    panoptic_seg = np.array(PIL.Image.open(io.BytesIO(result["png_string"])), dtype=np.uint8)
    ids = rgb_to_id(panoptic_seg)
    assert ids.shape == tuple(processed_sizes[0].tolist())
    assert set(np.unique(ids)) == {segment["id"] for segment in result["segments_info"]}
    assert set(result["segments_info"][0]) == {"id", "isthing", "category_id", "area"}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"pred_masks": None}, {}, "no pred_masks"),
        ({"pred_masks": torch.zeros(1, 3, 8, 8)}, {}, "must be"),
        ({}, {"target_sizes": [(8, 8)] * 2}, "target_sizes has 2 entries for 1 images"),
        ({}, {"target_sizes": [8]}, "target_sizes must hold"),
        ({}, {"target_sizes": [(0, 8)]}, "target_sizes must hold"),
        ({}, {"processed_sizes": torch.ones(3, 2)}, "processed_sizes has 3"),
        ({}, {"processed_sizes": [(8, 8)], "padded_size": (4, 8)}, "smaller than an image"),
        ({}, {"threshold": -0.1}, "threshold must be from 0 to 1"),
        ({}, {"mask_threshold": 1.5}, "mask_threshold must be from 0 to 1"),
        ({}, {"overlap_mask_area_threshold": 2}, "overlap_mask_area_threshold must be from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(change, options, message):
    outputs = outputs_of([PERSON, CAR, SKY, GRASS], quarters())
    for name, value in change.items():
        setattr(outputs, name, value)
    processor = DetrImageProcessor()
    for method in (
        processor.post_process_panoptic_segmentation,
        processor.post_process_instance_segmentation,
    ):
        with pytest.raises(ValueError, match=message):
            method(outputs, **options)


def test_results_with_a_threshold_get_no_masks():
    outputs = outputs_of([PERSON, CAR, SKY, GRASS], quarters(), [0.95, 0.2, 0.95, 0.95])
    processor = DetrImageProcessor()
    results = processor.post_process_object_detection(outputs, 0.5, [(8, 8)])
    with pytest.raises(ValueError, match="3 boxes where the outputs give 4"):
        processor.post_process_instance(results, outputs, [(8, 8)], [(8, 8)])


def test_the_scores_behind_a_semantic_map_come_on_request():
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 8, 8, generator=generator)
    outputs = {"logits": logits, "pred_masks": masks}
    for sizes in (None, [(6, 5), (20, 30)]):
        maps = DetrImageProcessor().post_process_semantic_segmentation(outputs, sizes)
        scored = DetrImageProcessor().post_process_semantic_segmentation(outputs, sizes, True)
        for found, expected in zip(scored, maps, strict=True):
            assert torch.equal(found.segmentation, expected)
            assert found["segmentation_scores"].shape == (3, *expected.shape)
            assert torch.equal(found.segmentation_scores.argmax(0), expected)
    expected = torch.einsum("qc,qhw->chw", logits[0].softmax(-1)[:, :-1], masks[0].sigmoid())
    found = DetrImageProcessor().post_process_semantic_segmentation(outputs, None, True)[0]
    torch.testing.assert_close(found.segmentation_scores, expected)
