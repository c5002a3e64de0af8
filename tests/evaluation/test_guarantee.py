from __future__ import annotations

import numpy as np
import pytest

from detrkit.errors import SettingError
from detrkit.evaluation.guarantee import guaranteed_threshold, least_images
from detrkit.evaluation.operating_points import Judged


def population(images: int, seed: int = 0) -> Judged:
    """Objects whose right detections score lower in crowded images, and some that nobody finds."""
    rng = np.random.default_rng(seed)
    objects = rng.integers(1, 30, images)
    place = np.repeat(np.arange(images), objects)
    scores = rng.beta(4, 1 + objects[place] / 20)
    found = rng.random(len(place)) < 0.99
    count = int(found.sum())
    return Judged(
        scores[found], np.zeros(count, np.int64), np.ones(count, bool), place[found], objects[:, None]
    )


@pytest.mark.parametrize(("recall", "confidence", "images"), [(0.9, 0.95, 60), (0.8, 0.9, 40)])
def test_the_guarantee_holds_at_least_as_often_as_its_confidence(
    recall: float, confidence: float, images: int
) -> None:
    everything = population(100)
    rng = np.random.default_rng(1)
    kept = []
    for _ in range(150):
        known = np.zeros(100, bool)
        known[rng.permutation(100)[:images]] = True
        threshold = guaranteed_threshold(everything.of_images(known), recall, confidence).threshold
        new = everything.of_images(~known)
        found = new.correct & (new.scores > threshold)
        shares = np.bincount(new.images[found], minlength=100)[~known] / new.objects[~known, 0]
        kept.append((found.sum() >= recall * new.objects.sum(), shares.mean() >= recall))
    together, each = np.mean(kept, axis=0)
    assert together >= confidence
    assert each >= confidence


def test_the_threshold_is_not_lower_than_it_must_be() -> None:
    point = guaranteed_threshold(population(2000), 0.9, 0.95)
    assert 0.9 <= point.recall < 0.93


def test_too_few_images_are_refused_with_the_number_that_is_needed() -> None:
    needed = least_images(0.9, 0.95)
    assert 28 <= needed <= 40
    with pytest.raises(SettingError, match=rf"needs at least {needed} images with objects, and there are 20"):
        guaranteed_threshold(population(20), 0.9, 0.95)


def test_images_without_objects_do_not_count() -> None:
    known = population(40)
    blank = Judged(
        known.scores, known.classes, known.correct, known.images, np.pad(known.objects, ((0, 500), (0, 0)))
    )
    assert guaranteed_threshold(blank, 0.8, 0.9) == guaranteed_threshold(known, 0.8, 0.9)


def test_a_detector_that_misses_too_much_is_refused() -> None:
    with pytest.raises(SettingError, match=r"do not show a recall of 0\.995"):
        guaranteed_threshold(population(1000), 0.995, 0.9)


@pytest.mark.parametrize(("recall", "confidence"), [(1.0, 0.9), (0.9, 0.0)])
def test_certainty_is_not_to_be_had(recall: float, confidence: float) -> None:
    with pytest.raises(SettingError, match="above 0 and below 1"):
        guaranteed_threshold(population(50), recall, confidence)
