from __future__ import annotations

import warnings

import numpy as np
import pytest

from detrkit.evaluation.score_calibration import (
    METHODS,
    apply_curve,
    brier_score,
    calibration_error,
    fit_curve,
    reliability,
)
from detrkit.results.detection_config import DetectionConfig


def outcomes(seed: int, number: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are too low above 0.3 and too high below, as a focal loss makes them."""
    rng = np.random.default_rng(seed)
    scores = rng.random(number)
    odds = (scores / (1 - scores)) ** 3
    return scores, rng.random(number) < odds / (odds + 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_curve_makes_the_scores_of_other_detections_true(method: str) -> None:
    curve = fit_curve(*outcomes(0), method)
    assert curve is not None
    scores, correct = outcomes(1)
    calibrated = apply_curve(scores, curve)
    assert calibration_error(scores, correct) > 0.1
    assert calibration_error(calibrated, correct) < 0.03
    assert brier_score(calibrated, correct) < brier_score(scores, correct)


@pytest.mark.parametrize("method", METHODS)
def test_a_curve_keeps_the_order_and_fits_the_settings(method: str) -> None:
    curve = fit_curve(*outcomes(0), method)
    assert curve is not None
    DetectionConfig(calibration={"cell": curve})  # which refuses curves that fall
    values = apply_curve(np.linspace(0, 1, 2001), curve)
    assert (np.diff(values) > 0).all()
    assert values.min() >= 0
    assert values.max() <= 1


def test_scores_that_separate_right_from_wrong_give_a_steep_curve_without_a_warning():
    scores = np.linspace(0.01, 0.99, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = fit_curve(scores, scores > 0.5, "temperature")
    assert [round(float(value), 2) for value in apply_curve(np.array([0.3, 0.7]), curve)] == [0.0, 1.0]


def test_few_outcomes_make_no_curve() -> None:
    scores = np.linspace(0, 1, 100)
    assert fit_curve(scores, scores > 0.85, "isotonic") is None
    assert fit_curve(scores, np.ones(100, bool), "temperature") is None


def test_the_error_is_the_mean_gap_of_the_bins() -> None:
    scores, correct = np.array([0.15, 0.15, 0.95, 1.0]), np.array([False, True, True, True])
    assert calibration_error(scores, correct) == pytest.approx((2 * 0.35 + 2 * 0.025) / 4)
    assert [(round(x, 3), y, n) for x, y, n in reliability(scores, correct)] == [
        (0.15, 0.5, 2),
        (0.975, 1.0, 2),
    ]
    assert np.isnan(calibration_error(np.empty(0), np.empty(0)))
