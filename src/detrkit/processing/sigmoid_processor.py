"""The image processor of the families that score classes by sigmoids: Conditional and Deformable DETR."""

from __future__ import annotations

import torch

from detrkit.processing.image_processor import DetrImageProcessorBase
from detrkit.processing.options import default
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

# Candidates of an image before any threshold, in the originals' evaluation and in Transformers.
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
        return select_detections(self.candidates(outputs, top_k), threshold, target_sizes)

    def candidates(self, outputs: Outputs, top_k: int | None = None) -> Candidates:
        """See :meth:`DetrImageProcessorBase.candidates`; the best pairs of query and class, or TOP_K."""
        logits, boxes = output(outputs, "logits"), output(outputs, "pred_boxes")
        return sigmoid_top_k_detections(logits, boxes, default(top_k, TOP_K))

    def object_limit(self, queries: int) -> int:
        """As many as queries, but with few of them as many pairs of query and class as the originals take."""
        return max(queries, TOP_K)

    def candidate_queries(
        self, logits: torch.Tensor, top_k: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`DetrImageProcessorBase.candidate_queries`."""
        scores, queries, _ = best_pairs(logits, default(top_k, TOP_K))
        return scores, queries

    def query_probabilities(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`DetrImageProcessorBase.query_probabilities`; every query is likelier an object."""
        check_classes(logits, least=1)
        probabilities = logits.float().sigmoid()
        return probabilities, probabilities.new_ones(probabilities.shape[:-1], dtype=torch.bool)
