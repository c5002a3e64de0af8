"""Feature maps of several sizes, and Deformable DETR's attention to sampled points of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from detrkit.kernels.constants import constant
from detrkit.models.layers.deformable_attention import deformable_attention

if TYPE_CHECKING:
    from detrkit.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig

# Where a query sampled, and how much each sample weighed.
Samples: TypeAlias = tuple[Tensor, Tensor]

# Where a proposal may be. The original's bounds are 0.01 and 0.99, themselves excluded, which is just where
# the first and last of 50 pixels have their centres: a rounding error, as other runtimes make it, must not
# let those in.
_INSIDE = (0.01 + 1e-6, 0.99 - 1e-6)


class Surroundings(NamedTuple):
    """What offsets of samples are added to and measured in.

    Both broadcast to (batch, queries, heads, levels, points, 2), float32, relative to each padded level.
    """

    centre: Tensor  # the point, or the centre of the box
    unit: Tensor  # a pixel around a point; half the size of a box, divided by the number of points

    def spread(self, heads: int, points: int) -> Surroundings:
        """The same, written out for all heads and points: worth it where many layers read it."""
        layout = (-1, -1, heads, self.unit.shape[-3], points, -1)
        return Surroundings(
            self.centre.expand(layout).contiguous(), self.unit.expand(layout[2:]).contiguous()
        )


@dataclass
class FeatureLevels:
    """Feature maps of several sizes as one sequence of pixels, finest level first.

    Attributes:
        pixels: (batch, pixels of all levels, d_model).
        positions: (batch or 1, pixels, d_model), with the embedding of the level.
        shapes: (height, width) of each level.
        mask: (batch, pixels), True where pixels are real; None when nothing is padded.
        valid_ratios: (batch, levels, 2), the share of width and height that is real; None as ``mask``.
    """

    pixels: Tensor
    positions: Tensor
    shapes: list[tuple[int, int]]
    mask: Tensor | None
    valid_ratios: Tensor | None

    def surroundings(self, reference: Tensor, points: int) -> Surroundings:
        """Where around references an attention samples, in the coordinates of each level with its padding.

        Args:
            reference: (batch or 1, queries, 2 or 4) float32, points or cxcywh boxes relative to the image.
            points: Points that each head samples in each level.
        """
        reference = reference[:, :, None]
        if self.valid_ratios is not None:
            reference = reference * self.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]
        reference = reference[:, :, None, :, None]
        if reference.shape[-1] == 4:
            return Surroundings(reference[..., :2], reference[..., 2:] * (0.5 / points))
        return Surroundings(reference, (1 / self._extents(reference))[:, None])

    def _extents(self, like: Tensor) -> Tensor:
        """Width and height of each level: (levels, 2), of the type and on the device of ``like``."""
        return constant(tuple((width, height) for height, width in self.shapes), like.dtype, like.device)

    def pixel_centres(self) -> Tensor:
        """Centre of every pixel relative to the real image: (batch or 1, pixels, 2) float32, x then y."""
        levels, device = [], self.pixels.device
        extents = self._extents(torch.empty(0, dtype=torch.float32, device=device))
        for level, (height, width) in enumerate(self.shapes):
            y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
            x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
            grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)
            extent = extents[level]
            if self.valid_ratios is not None:
                extent = extent * self.valid_ratios[:, level, None]
            levels.append((grid / extent).reshape(-1, height * width, 2))
        return torch.cat(levels, dim=1)


def valid_ratio(mask: Tensor) -> Tensor:
    """Share of the width and height of each (batch, height, width) mask that is real: (batch, 2) float32."""
    height, width = mask.shape[-2:]
    return torch.stack([mask[:, 0].sum(1) / width, mask[:, :, 0].sum(1) / height], dim=-1)


def proposal_anchors(levels: FeatureLevels) -> tuple[Tensor, Tensor]:
    """A box around every pixel, larger in coarser levels, in logit space.

    Returns:
        (batch or 1, pixels, 4) float32, infinite where unusable, and (batch or 1, pixels, 1), True where the
        pixel is real and its box well inside the image.
    """
    centres = levels.pixel_centres()
    sides = torch.cat(
        [
            centres.new_full((height * width, 2), 0.05 * 2.0**level)
            for level, (height, width) in enumerate(levels.shapes)
        ]
    )
    boxes = torch.cat([centres, sides.expand_as(centres)], dim=-1)
    usable = ((boxes > _INSIDE[0]) & (boxes < _INSIDE[1])).all(-1, keepdim=True)
    if levels.mask is not None:
        usable = usable & levels.mask[..., None]
    return boxes.logit().masked_fill(~usable, float("inf")), usable


class MultiScaleDeformableAttention(nn.Module):
    """Attention to sampled points (equation 3 of the paper), with its projections.

    Each head samples ``points`` points in each level.
    """

    def __init__(self, config: DeformableDetrConfig, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, config.num_feature_levels, points
        width = config.d_model
        self.sampling_offsets = nn.Linear(width, heads * self.levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * self.levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each head begins with points along a direction of its own, at growing distance, equal in weight."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        bias = self.sampling_offsets.bias
        if not getattr(bias, "_is_hf_initialized", False):
            bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, around: Surroundings, source: Tensor, levels: FeatureLevels
    ) -> tuple[Tensor, Samples]:
        """Attends.

        Args:
            query: (batch, queries, d_model).
            around: Where each query samples.
            source: (batch, pixels, d_model), what is sampled.
            levels: Shapes and mask of ``source``.

        Returns:
            (batch, queries, d_model), and the sampling locations (batch, queries, heads, levels, points, 2)
            and weights (batch, queries, heads, levels, points).
        """
        value = self.value_proj(source)
        if levels.mask is not None:
            value = value.masked_fill(~levels.mask[..., None], 0.0)
        layout = (self.heads, self.levels, self.points)
        # Locations in float32: a bfloat16 cannot tell neighbouring pixels of a large map apart.
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*layout, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, layout[1:])
        locations = torch.addcmul(around.centre, offsets, around.unit)
        attended = deformable_attention(
            value.unflatten(-1, (self.heads, -1)), levels.shapes, locations, weights
        )
        return self.output_proj(attended), (locations, weights)
