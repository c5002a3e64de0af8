"""Configuration of Deformable DETR."""

from __future__ import annotations

from typing import Any

from detrkit.common.errors import SettingError
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.ranges import check_ranges


class DeformableDetrConfig(DetrFamilyConfig):
    """Configuration of Deformable DETR; the shared fields are those of ``DetrFamilyConfig``.

    Args:
        num_queries: Object queries of a one-stage model.
        num_feature_levels: Feature maps to attend to; those beyond the backbone's are made by convolutions
            of stride 2. With 1 it is the backbone's last map alone.
        encoder_n_points: Points that each head samples in each level, in the encoder.
        decoder_n_points: The same in the decoder.
        with_box_refine: Let each decoder layer refine the boxes of the one before.
        two_stage: Let the encoder propose the boxes that the decoder starts from; needs ``with_box_refine``.
        two_stage_num_proposals: Number of proposals, which are the object queries of a two-stage model.
        class_cost: Weight of the focal classification cost in the matching.
        cls_loss_coefficient: Weight of the focal classification loss.
        focal_alpha: Share of the focal loss that falls to the right class, between 0 and 1.

    Example:
        >>> from detrkit import DeformableDetrConfig
        >>> DeformableDetrConfig(with_box_refine=True, two_stage=True).num_feature_levels
        4
    """

    model_type = "deformable_detr"

    num_queries: int = 300
    encoder_ffn_dim: int = 1024
    decoder_ffn_dim: int = 1024
    num_feature_levels: int = 4
    encoder_n_points: int = 4
    decoder_n_points: int = 4
    with_box_refine: bool = False
    two_stage: bool = False
    two_stage_num_proposals: int = 300
    class_cost: float | int = 2
    cls_loss_coefficient: float | int = 2
    focal_alpha: float | int = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks what a two-stage model needs, and as the shared configuration does."""
        super().__post_init__(**kwargs)
        if self.two_stage and not self.with_box_refine:
            raise ValueError("two_stage=True needs with_box_refine=True: the proposals are boxes to refine")

    @property
    def object_queries(self) -> int:
        """How many object queries there are; those of a two-stage model are its proposals."""
        return self.two_stage_num_proposals if self.two_stage else self.num_queries

    def set_object_queries(self, count: int) -> None:
        """Changes the number of proposals of a two-stage model; see the shared configuration."""
        if not self.two_stage:
            super().set_object_queries(count)
        try:
            check_ranges({"num_queries": count})
        except ValueError as error:
            raise SettingError(str(error)) from error
        self.num_queries = self.two_stage_num_proposals = count

    @property
    def default_out_indices(self) -> tuple[int, ...]:
        """Stages of the backbone that are attended to: 2 to 4, or the last one alone."""
        return (2, 3, 4) if self.num_feature_levels > 1 else (4,)
