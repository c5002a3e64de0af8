"""The image processor of the families that score classes by sigmoids: Conditional and Deformable DETR."""

from __future__ import annotations

import torch

from detrkit.processing.image_processor import DetrImageProcessorBase
from detrkit.processing.post_processing import (
    Candidates,
    Outputs,
    TargetSizes,
    best_pairs,
    check_classes,
    output,
    select_detections,
    sigmoid_top_k_detections,
)

# Detections of an image before any threshold, in the originals' evaluation and here.
TOP_K = 100


class SigmoidImageProcessorBase(DetrImageProcessorBase):
    """The shared image processor, with the best pairs of query and class as candidates."""

    def post_process_object_detection(
        self,
        outputs: Outputs,
        threshold: float = 0.5,
        target_sizes: TargetSizes | None = None,
        top_k: int = TOP_K,
    ) -> list[dict[str, torch.Tensor]]:
        """Turns a detector's outputs into boxes.

        Args:
            outputs: Outputs with ``logits`` and ``pred_boxes``.
            threshold: Least score of a detection (exclusive).
            target_sizes: (height, width) of each image in pixels, as a tensor (batch, 2) or a list.
            top_k: Candidates of each image before the threshold, over all queries and classes.

        Returns:
            For each image, best first, ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), xyxy; in pixels
            of ``target_sizes``, or normalised without it.

        Raises:
            ValueError: The number of sizes is not that of the images.
        """
        return select_detections(self._candidates(outputs, top_k), threshold, target_sizes)

    def _candidates(self, outputs: Outputs, top_k: int = TOP_K) -> Candidates:
        return sigmoid_top_k_detections(output(outputs, "logits"), output(outputs, "pred_boxes"), top_k)

    def candidate_queries(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`DetrImageProcessorBase.candidate_queries`; the best TOP_K pairs."""
        scores, queries, _ = best_pairs(logits, TOP_K)
        return scores, queries

    def query_probabilities(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`DetrImageProcessorBase.query_probabilities`; every query is likelier an object."""
        check_classes(logits, least=1)
        probabilities = logits.float().sigmoid()
        return probabilities, probabilities.new_ones(probabilities.shape[:-1], dtype=torch.bool)
