"""How good a model is: COCO average precision, panoptic quality, and what its mistakes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

if TYPE_CHECKING:
    from detrkit.evaluation.categories import match_categories as match_categories
    from detrkit.evaluation.coco import CocoEvaluator as CocoEvaluator
    from detrkit.evaluation.coco import evaluate_results as evaluate_results
    from detrkit.evaluation.evaluate import Evaluation as Evaluation
    from detrkit.evaluation.evaluate import evaluate_dataset as evaluate_dataset
    from detrkit.evaluation.evaluate import evaluate_detector as evaluate_detector
    from detrkit.evaluation.evaluate import evaluate_predictions as evaluate_predictions
    from detrkit.evaluation.panoptic_files import panoptic_quality_of_files as panoptic_quality_of_files
    from detrkit.evaluation.panoptic_quality import PanopticQuality as PanopticQuality
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__)
