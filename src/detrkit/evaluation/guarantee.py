"""A threshold that guarantees a minimum recall on new images from the same source.

The guarantee is for two kinds of recall, each with the requested confidence over the choice of the images:

- the mean over images of each one's recall. This holds whatever the images are like, as long as the new ones
  come from where these came from;
- the recall of all objects of a new set together, which crowded images pull down. This takes the mean of many
  images' misses to be normal, and leaves room for a new set that is five times smaller than this one.

Sources: Bates et al., "Distribution-free, risk-controlling prediction sets", J. ACM 2021, for the search
along the thresholds; Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS-B 2024, for the first bound.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import t as student_t

from detrkit.common.errors import SettingError
from detrkit.evaluation.operating_points import Judged, OperatingPoint, point_at

_MOST_THRESHOLDS = 1000
# Share of the largest stake that no single image can lose. It is fixed beforehand, so that the bound does not
# depend on the order of the images; near the largest is best where losses are small.
_STAKE = 0.9
# Of the deviation of a mean, for a new set of a fifth as many images: the square root of 1 + 5, and a little.
_NEW_SET = 2.5


def least_images(recall: float, confidence: float) -> int:
    """The number of images with objects that a guarantee needs if nothing is missed on any of them."""
    win = math.log1p(_STAKE * (1 - recall) / recall)
    return max(2, math.ceil(math.log(1 / (1 - confidence)) / win))


def guaranteed_threshold(judged: Judged, recall: float, confidence: float) -> OperatingPoint:
    """The highest threshold for which the images show that a share of the objects is found.

    Args:
        judged: All detections, whatever their score, on images that the model and its settings do not know.
        recall: The share of the objects, above 0 and below 1.
        confidence: How sure, above 0 and below 1.

    Raises:
        SettingError: There are too few images, or too many objects are missed whatever the threshold.
    """
    for name, value in (("recall", recall), ("confidence", confidence)):
        if not 0 < value < 1:
            raise SettingError(f"{name} must be above 0 and below 1, not {value}")
    numbers = judged.objects.sum(axis=1)
    images = np.flatnonzero(numbers)
    needed = least_images(recall, confidence)
    if len(images) < needed:
        raise SettingError(
            f"a recall of {recall:g} with confidence {confidence:g} needs at least {needed} images with "
            f"objects, and there are {len(images)}; give more images, or ask for less"
        )
    # From the lowest threshold up to the first that fails: trying others beyond it would cost confidence.
    best: OperatingPoint | None = None
    for threshold in _thresholds(judged):
        rows = judged.correct & (judged.scores > threshold)
        missed = (numbers - np.bincount(judged.images[rows], minlength=len(numbers)))[images]
        if not _holds(missed, numbers[images], 1 - recall, 1 - confidence):
            break
        best = point_at(judged, threshold)
    if best is None:
        found = point_at(judged, 0.0)
        raise SettingError(
            f"{len(images)} images do not show a recall of {recall:g} with confidence {confidence:g}, "
            f"whatever the threshold: {found.recall:.3f} of the objects are found at best; give more images, "
            "or ask for less"
        )
    return best


def _thresholds(judged: Judged) -> list[float]:
    """Thresholds to try, from 0 on; recall only falls at the score of a right detection."""
    scores = np.unique(judged.scores[judged.correct])
    step = max(1, len(scores) // _MOST_THRESHOLDS)
    # Rounded down, which only finds more.
    return np.unique(np.floor(np.concatenate([[0.0], scores[::step]]) * 1e4) / 1e4).tolist()


def _holds(missed: np.ndarray, objects: np.ndarray, risk: float, doubt: float) -> bool:
    """Whether images show that at most ``risk`` of the objects are missed, with a doubt of at most ``doubt``.

    Args:
        missed: (n,) objects of each image that are not found.
        objects: (n,) objects of each image, at least 1.
        risk: Above 0 and below 1.
        doubt: Above 0 and below 1.
    """
    # Bets against a mean loss above the risk: they win 1 / doubt times the stake with a probability of at
    # most the doubt, if it is above.
    wins = np.log1p(_STAKE / (1 - risk) * (risk - missed / objects))
    excess = missed - risk * objects
    number = len(excess)
    margin = student_t.ppf(1 - doubt, number - 1) * _NEW_SET * excess.std(ddof=1) / math.sqrt(number)
    return bool(wins.sum() >= math.log(1 / doubt) and excess.mean() + margin <= 0)
