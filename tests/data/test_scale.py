from __future__ import annotations

from pathlib import Path

from detrkit.data import DetectionDataset, training_scale


def dataset(sizes: list[tuple[int, int]], boxes: list[dict]) -> DetectionDataset:
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    annotations = [{"id": i, "image_id": 0, "category_id": 1, **box} for i, box in enumerate(boxes)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    return DetectionDataset(document, Path(), "cells")  # type: ignore[arg-type]


def test_the_scale_is_the_median_image_and_nearly_the_largest_object() -> None:
    boxes = [{"bbox": [0, 0, side, 5]} for side in range(1, 101)]
    crowd = {"bbox": [0, 0, 900, 900], "iscrowd": 1}
    scale = training_scale(dataset([(480, 640), (480, 640), (2000, 300)], [*boxes, crowd]))
    assert scale["image_size"] == [480, 640]
    assert scale["large_object_side"] is not None
    assert 94 < scale["large_object_side"] < 97


def test_without_objects_only_the_images_have_a_scale() -> None:
    assert training_scale(dataset([(48, 64)], [])) == {"image_size": [48, 64], "large_object_side": None}


def test_segments_of_things_count_as_objects() -> None:
    document = {
        "images": [{"id": 1, "file_name": "1.png", "height": 48, "width": 64}],
        "categories": [{"id": 1, "name": "cell", "isthing": 1}, {"id": 2, "name": "glass", "isthing": 0}],
        "annotations": [
            {
                "image_id": 1,
                "segments_info": [
                    {"id": 1, "category_id": 1, "bbox": [0, 0, 7, 20]},
                    {"id": 2, "category_id": 2, "bbox": [0, 0, 64, 48]},
                ],
            }
        ],
    }
    data = DetectionDataset(document, Path(), "cells", panoptic_dir=Path())  # type: ignore[arg-type]
    assert training_scale(data)["large_object_side"] == 20
