"""A small COCO data set made by the tests: three pictures, gapped category ids, masks, one crowd."""

import json

import numpy as np
import PIL.Image

from detrkit.data.coco import DetectionDataset
from tests.conftest import make_picture

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "brush"}]
SIZES = {"a.jpg": (60, 40), "b.jpg": (40, 60), "c.png": (60, 40)}  # width, height


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def make_document():
    """Images 1 to 3, the last one empty; objects 1 to 4, the last one a crowd with run lengths."""
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 5, 20, 20], "segmentation": square(5, 5, 20)},
        {
            "id": 2,
            "image_id": 1,
            "category_id": 90,
            "bbox": [30, 8, 10, 10],
            "segmentation": square(30, 8, 10),
        },
        {
            "id": 3,
            "image_id": 2,
            "category_id": 2,
            "bbox": [4, 30, 12, 12],
            "segmentation": square(4, 30, 12),
        },
        {
            "id": 4,
            "image_id": 2,
            "category_id": 2,
            "bbox": [0, 0, 10, 60],
            "iscrowd": 1,
            "segmentation": {"size": [60, 40], "counts": [0, 600, 1800]},
        },
    ]
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    images = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]}
        for i, (name, size) in enumerate(SIZES.items(), start=1)
    ]
    return {"images": images, "annotations": annotations, "categories": [dict(c) for c in CATEGORIES]}


def make_images(folder):
    folder.mkdir(exist_ok=True, parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        make_picture(*size, seed=seed).save(folder / name)
    return folder


def write_dataset(folder, document=None, **options):
    """Writes images and annotations below a folder, and reads them."""
    path = folder / "instances.json"
    path.write_text(json.dumps(make_document() if document is None else document))
    return DetectionDataset.from_coco(make_images(folder / "images"), path, **options)


def make_panoptic(folder):
    """Writes a panoptic data set of images 1 and 2; the PNG of each has segments 1 and 300 (a crowd)."""
    document = make_document()
    document["images"] = document["images"][:2]
    document["annotations"] = []
    (folder / "png").mkdir()
    for image in document["images"]:
        ids = np.zeros((image["height"], image["width"]), dtype=np.int64)
        ids[2:12, 3:23] = 1
        ids[20:30, 5:10] = 300
        colours = np.stack([ids % 256, ids // 256, ids * 0], axis=-1).astype(np.uint8)
        PIL.Image.fromarray(colours).save(folder / "png" / f"{image['id']}.png")
        segments = [
            {"id": 1, "category_id": 90, "area": 200, "bbox": [3, 2, 20, 10], "iscrowd": 0},
            {"id": 300, "category_id": 2, "area": 50, "bbox": [5, 20, 5, 10], "iscrowd": 1},
        ]
        document["annotations"].append(
            {"image_id": image["id"], "file_name": f"{image['id']}.png", "segments_info": segments}
        )
    document["categories"][0]["isthing"] = 0
    return document
