"""How often the guarantee of ``detrkit calibrate --recall R --confidence C`` holds, over random splits.

The model detects once in all images. Each split then chooses a threshold on some of them, and measures both
kinds of recall on the others: over all objects together, and as the mean of the images.

    python benchmarks/guarantee.py --model blood-cells --images DIR --annotations FILE
"""

from __future__ import annotations

import argparse

import numpy as np

from detrkit import DetectionConfig, Detector
from detrkit.data import DetectionDataset, check_dataset
from detrkit.errors import SettingError
from detrkit.evaluation.calibration_sample import collect
from detrkit.evaluation.guarantee import guaranteed_threshold
from detrkit.evaluation.operating_points import Judged


def outcomes(judged: Judged, known: int, splits: int, recall: float, confidence: float) -> np.ndarray:
    """For each split that is not refused: recall of all objects, mean of the images' recalls, threshold.

    Args:
        judged: All detections and the number of objects of each image.
        known: How many of the images a threshold is chosen on.
        splits: How many splits are tried.
        recall: The guaranteed recall.
        confidence: How sure.
    """
    numbers = judged.objects.sum(axis=1)
    random = np.random.default_rng(0)
    found = []
    for _ in range(splits):
        chosen = np.zeros(len(numbers), bool)
        chosen[random.permutation(len(numbers))[:known]] = True
        try:
            threshold = guaranteed_threshold(judged.of_images(chosen), recall, confidence).threshold
        except SettingError:
            continue
        right = judged.correct & (judged.scores > threshold)
        hits = np.bincount(judged.images[right], minlength=len(numbers))
        new = ~chosen & (numbers > 0)
        found.append((hits[new].sum() / numbers[new].sum(), (hits[new] / numbers[new]).mean(), threshold))
    return np.array(found).reshape(-1, 3)


def main() -> None:
    """Prints how often each guarantee holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="blood-cells")
    parser.add_argument("--images", required=True, help="images that the model was not trained on")
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--known", type=float, default=0.7, help="share of the images to choose on")
    options = parser.parse_args()
    dataset = check_dataset(DetectionDataset.from_coco(options.images, options.annotations)).dataset
    # Without the model's own filter, which may have been chosen on these images.
    detector = Detector.from_pretrained(options.model).with_config(DetectionConfig())
    sample = collect(detector, dataset, 1, None, False)
    judged = sample.judge(dict.fromkeys(range(len(sample.detections)), DetectionConfig(threshold=0.0)))
    known = round(options.known * len(judged.objects))
    print(f"{options.splits} splits of {len(judged.objects)} images, {known} to choose on")
    for recall, confidence in ((0.9, 0.95), (0.8, 0.95), (0.8, 0.9)):
        found = outcomes(judged, known, options.splits, recall, confidence)
        if not len(found):
            print(f"recall {recall}, confidence {confidence}: refused in every split")
            continue
        together, each = (found[:, :2] >= recall).mean(axis=0)
        print(
            f"recall {recall}, confidence {confidence}: kept in {together:.1%} of {len(found)} splits for "
            f"all objects together, in {each:.1%} for the mean of the images; median threshold "
            f"{np.median(found[:, 2]):.3f}, recall {np.median(found[:, 0]):.3f}; "
            f"{options.splits - len(found)} splits refused"
        )


if __name__ == "__main__":
    main()
