"""Panoptic segmentation on top of a detector: a mask for each of its queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from detrkit.common.errors import SettingError
from detrkit.common.schema import Target
from detrkit.losses.matcher import send
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.detection import ModelWithHeads, ObjectDetectionModel
from detrkit.models.layers.attention import key_mask
from detrkit.models.layers.backbone import downsample_mask
from detrkit.models.layers.mask_head import AttentionMap, MaskHead
from detrkit.models.outputs import DetrModelOutput, SegmentationOutput

# The mask head goes up through three feature maps from the one that the encoder reads.
_STAGES = 4


class SegmentationModel(ModelWithHeads):
    """A detector with a mask head.

    A family names its detector by ``detector_prefix`` and says what an object's score is.
    """

    detector_class: ClassVar[type[ObjectDetectionModel]]

    def __init__(self, config: DetrFamilyConfig) -> None:
        _ask_for_all_stages(config)
        super().__init__(config)
        setattr(self, self.detector_prefix.rstrip("."), self.detector_class(config))
        channels = self.detector.model.backbone.intermediate_channel_sizes
        if len(channels) < _STAGES:
            raise SettingError(
                f"masks need a backbone with at least {_STAGES} feature maps, and {config.backbone!r} has "
                f"{len(channels)}; choose another backbone"
            )
        self.mask_head = MaskHead(config, channels[-2 : -_STAGES - 1 : -1])
        self.bbox_attention = AttentionMap(config)
        self.post_init()

    @property
    def detector(self) -> ObjectDetectionModel:
        """The detector, under one name for all families."""
        return getattr(self, self.detector_prefix.rstrip("."))

    def freeze_detector(self) -> None:
        """Leaves only the mask head to train: the second step of the original's recipe."""
        self.detector.requires_grad_(False)

    def object_scores(self, logits: Tensor) -> Tensor:
        """Score of each query's best class: (batch, queries) of (batch, queries, classes)."""
        raise NotImplementedError

    def criterion(  # type: ignore[override] # Transformers' order: masks come before the configuration
        self,
        logits: Tensor,
        labels: list[Target],
        device: torch.device,
        pred_boxes: Tensor,
        pred_masks: Tensor,
        config: DetrFamilyConfig,
        *layers: Tensor | None,
        **named: Any,
    ) -> tuple[Tensor, dict[str, Tensor], None]:
        """See :meth:`~detrkit.models.detection.ModelWithHeads.criterion`."""
        masks = {**named, "pred_masks": pred_masks}
        return super().criterion(logits, labels, device, pred_boxes, config, *layers, **masks)

    def run(self, labels: list[Target] | None, **inputs: Any) -> SegmentationOutput:
        """See :meth:`~detrkit.models.detection.ModelWithHeads.forward`."""
        features, masks_of = self.features(**inputs)
        states: Tensor = features.last_hidden_state
        masks, custom_loss = None, self.custom_loss
        if labels is None or not self.training or custom_loss is not None:
            masks = masks_of(states)

        def predict_masks(image: Tensor, query: Tensor) -> Tensor:
            if masks is not None:
                return masks[image, query]
            counts = [min(len(label["class_labels"]), states.shape[1]) for label in labels or ()]
            rows, slot = _by_image(image, query, counts)
            return masks_of(gather_rows(states, rows))[image, slot]

        matched = predict_masks if labels is not None else None
        found = self.detector.read(features, labels, matched, custom_loss, masks)
        return SegmentationOutput(**found, pred_masks=masks)

    @torch.no_grad()
    def segment(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, threshold: float = 0.85
    ) -> SegmentationOutput:
        """Detects and gives only what scores above a threshold, without computing the other masks.

        Any post-processing with a threshold of at least this one gives the same as with ``forward``'s output.

        Args:
            pixel_values: (batch, channels, height, width) normalised images.
            pixel_mask: (batch, height, width), nonzero where pixels are real; None when nothing is padded.
            threshold: Least score (exclusive) of a query's best class, no-object left aside.

        Returns:
            ``logits``, ``pred_boxes`` and ``pred_masks`` of the surviving queries in their order, and
            ``query_indices``, their numbers. An image with fewer survivors than another of the
            batch also has its best queries below the threshold, so that all have the same number.

        Raises:
            ValueError: Shapes do not fit.
        """
        features, masks_of = self.features(pixel_values, pixel_mask)
        found = self.detector.read(features)
        rows = best_queries(self.object_scores(found["logits"].float()), threshold, at_least=0)
        return SegmentationOutput(
            logits=gather_rows(found["logits"], rows),
            pred_boxes=gather_rows(found["pred_boxes"], rows),
            pred_masks=masks_of(gather_rows(features.last_hidden_state, rows)),
            query_indices=rows,
        )

    def features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> tuple[DetrModelOutput, Callable[[Tensor], Tensor]]:
        """The base model's output, and what turns states (batch, n, d_model) into their mask logits."""
        if inputs_embeds is not None:
            raise ValueError("a segmentation model does not take inputs_embeds; pass pixel_values")
        model = self.detector.model
        size = pixel_values.shape[-2:]
        pixel_values, pixel_mask = model.backbone.long_enough(pixel_values, pixel_mask)
        maps = model.backbone(pixel_values)
        feature_map = model.input_projection(maps[-1])
        mask = downsample_mask(pixel_mask, feature_map.shape[-2:])
        features = model.transform(feature_map, mask, **options)
        memory_mask = key_mask(None if mask is None else mask.flatten(1))

        def masks_of(states: Tensor) -> Tensor:
            attention = self.bbox_attention(states, features.encoder_last_hidden_state, memory_mask)
            masks = self.mask_head(feature_map, maps[-2 : -_STAGES - 1 : -1], attention)
            if size == pixel_values.shape[-2:]:
                return masks
            # Of a thin image that was padded: what covers the image.
            rows, columns = (
                -(-n * m // padded) for n, m, padded in zip(size, masks.shape[-2:], pixel_values.shape[-2:])
            )
            return masks[..., :rows, :columns]

        return features, masks_of


def best_queries(scores: Tensor, threshold: float | Tensor, at_least: int) -> Tensor:
    """The queries whose scores (batch, queries) are above a threshold, and as many for each image.

    These are indices (batch, n) in ascending order: an image's n best ones, where n is the largest number of
    survivors in an image, or ``at_least``.
    """
    if not scores.shape[0]:  # no image
        return torch.zeros(0, at_least, dtype=torch.int64, device=scores.device)
    count = (scores > threshold).sum(1).max().clamp(min=at_least).item()
    # For torch.export, to which the number is a symbol.
    torch._check(count >= at_least)
    torch._check(count <= scores.shape[1])
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (batch, n, ...) by their indices (batch, k): (batch, k, ...)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _by_image(image: Tensor, query: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Queries (listed,) of all images, sorted by image, as a row for each image, filled up with query 0.

    ``counts``, how many are of each image, saves waiting for the device. Also gives the place of each listed
    query in its image's row.
    """
    places = torch.tensor([place for count in counts for place in range(count)], dtype=torch.int64)
    slot = send(places, query.device)
    rows = query.new_zeros(len(counts), max(1, *counts))
    rows[image, slot] = query
    return rows, slot


def _ask_for_all_stages(config: DetrFamilyConfig) -> None:
    """Makes the backbone give the maps that masks need, where the configuration asks for fewer."""
    backbone: Any = config.backbone_config  # a mapping only before the configuration settles it
    if backbone is None:
        options = dict(config.backbone_kwargs or {})
        indices = options.get("out_indices", _STAGES)
        if (indices if isinstance(indices, int) else len(indices)) < _STAGES:
            del options["out_indices"]
            config.backbone_kwargs = options or None
        return
    if len(backbone.out_features) < _STAGES:
        if len(backbone.stage_names) < _STAGES:
            raise ValueError(f"masks need a backbone of at least {_STAGES} stages, not {backbone.model_type}")
        backbone.out_features = backbone.stage_names[-_STAGES:]
