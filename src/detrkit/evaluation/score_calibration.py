"""Scores that say how often a detection is right: curves from raw to calibrated scores, and their error."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

Curve: TypeAlias = "list[tuple[float, float]]"
"""Points (score, calibrated score) of a rising curve over [0, 1], straight between them."""

METHODS = ("temperature", "isotonic")

LEAST_OUTCOMES = 20
"""The least number of right, and of wrong, detections that a curve is fitted to."""

_BINS = 10
_KNOTS = 33
# What a curve gets of the raw score, so that it always rises and the order of the detections stays.
_RISE = 1e-3


def fit_curve(scores: np.ndarray, correct: np.ndarray, method: str) -> Curve | None:
    """Fits a curve to detections of one class.

    Args:
        scores: (n,) in [0, 1].
        correct: (n,) bool.
        method: "temperature": a logistic curve of the score's logit, whose slope and offset are fitted
            (Platt, 1999; Guo et al., 2017); "isotonic": the best rising steps (Zadrozny and Elkan, 2002).

    Returns:
        The curve; None with fewer than :data:`LEAST_OUTCOMES` right or wrong detections.
    """
    right = int(correct.sum())
    if min(right, len(correct) - right) < LEAST_OUTCOMES:
        return None
    return (_logistic if method == "temperature" else _isotonic)(scores.astype(np.float64), correct)


def apply_curve(scores: np.ndarray, curve: Curve) -> np.ndarray:
    """The calibrated scores, as a :class:`~detrkit.results.detection_config.DetectionRule` computes them."""
    points = np.asarray(curve)
    return np.interp(scores, points[:, 0], points[:, 1])


def calibration_error(scores: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: the mean gap between scores and the share of right detections.

    Over ten bins of equal width, weighted by the detections in each; NaN without detections.
    """
    if not len(scores):
        return float("nan")
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, scores - correct, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def reliability(scores: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean score, share of right detections and number of detections of each bin that has some."""
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    rows = (bins == place for place in range(_BINS))
    return [
        (float(scores[row].mean()), float(correct[row].mean()), int(row.sum())) for row in rows if row.any()
    ]


def brier_score(scores: np.ndarray, correct: np.ndarray) -> float:
    """The mean squared difference between scores and outcomes; smaller is better."""
    return float(np.mean((scores - correct) ** 2)) if len(scores) else float("nan")


def _logistic(scores: np.ndarray, correct: np.ndarray) -> Curve:
    logits = _logit(scores)
    targets = correct.astype(np.float64)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offset = np.exp(parameters[0]), parameters[1]  # a positive slope, so that the curve rises
        values = slope * logits + offset
        gap = expit(values) - targets
        total = np.mean(np.logaddexp(0, values) - targets * values)
        return float(total), np.array([np.mean(gap * logits) * slope, np.mean(gap)])

    slope, offset = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
    knots = expit(np.linspace(-7, 7, _KNOTS - 2))
    values = expit(np.exp(slope) * _logit(knots) + offset)
    return _curve(np.concatenate([[0.0], knots, [1.0]]), np.concatenate([[0.0], values, [1.0]]))


def _isotonic(scores: np.ndarray, correct: np.ndarray) -> Curve:
    known, place = np.unique(scores, return_inverse=True)
    numbers = np.bincount(place)
    shares = np.bincount(place, correct) / numbers
    steps = np.asarray(isotonic_regression(shares, weights=numbers).x)
    # A step becomes one point, in its middle: the curve between the points is straight.
    starts = np.flatnonzero(np.concatenate([[True], np.diff(steps) > 0]))
    ends = np.concatenate([starts[1:], [len(steps)]]) - 1
    middles = (known[starts] + known[ends]) / 2
    inside = (middles > 0) & (middles < 1)
    xs = np.concatenate([[0.0], middles[inside], [1.0]])
    ys = np.concatenate([[steps[0]], steps[starts][inside], [steps[-1]]])
    return _curve(xs, ys)


def _curve(xs: np.ndarray, ys: np.ndarray) -> Curve:
    """Points with seven digits, whose scores differ."""
    ys = (1 - _RISE) * np.clip(ys, 0, 1) + _RISE * xs
    xs, ys = np.round(xs, 7), np.round(ys, 7)
    kept = np.concatenate([[True], np.diff(xs) > 0])
    return list(zip(xs[kept].tolist(), np.maximum.accumulate(ys[kept]).tolist()))


def _logit(scores: np.ndarray) -> np.ndarray:
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))
