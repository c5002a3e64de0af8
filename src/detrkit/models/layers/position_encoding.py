"""Position encodings of feature maps: fixed sines (section A.4 of the DETR paper) or learned tables.

Both are computed in float32 whatever the activations' type, since a bfloat16 cannot tell apart the
positions of a large map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.layers.plain import rows

# Ratio of the longest to the shortest wavelength; the shortest is the whole extent.
_TEMPERATURE = 10_000.0


class SinePositionEncoding(nn.Module):
    """Sines and cosines of the row and column, normalised by the real (unpadded) extent of each image.

    Args:
        num_features: Channels for each of the two axes.
        offset: Added to row and column numbers that start at 1: 0 in DETR, -0.5 in Deformable DETR.
    """

    def __init__(self, num_features: int, offset: float = 0.0) -> None:
        super().__init__()
        self.num_features = num_features
        self.offset = offset

    def forward(self, feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encodes the positions of a map.

        Args:
            feature_map: (batch, channels, height, width); only its shape and device count.
            mask: (batch, height, width), True where pixels are real; None when nothing is padded.

        Returns:
            (batch or 1, 2 x num_features, height, width) float32; the rows' channels come first.
        """
        height, width = feature_map.shape[-2:]
        if mask is None:
            rows = torch.arange(1, height + 1, dtype=torch.float32, device=feature_map.device)
            columns = torch.arange(1, width + 1, dtype=torch.float32, device=feature_map.device)
            rows = self._waves(rows, height).unsqueeze(1).expand(-1, width, -1)
            columns = self._waves(columns, width).unsqueeze(0).expand(height, -1, -1)
            return torch.cat([rows, columns], dim=-1).permute(2, 0, 1).unsqueeze(0)
        rows = mask.cumsum(1, dtype=torch.float32)
        columns = mask.cumsum(2, dtype=torch.float32)
        rows = self._waves(rows, rows[:, -1:, :])
        columns = self._waves(columns, columns[:, :, -1:])
        return torch.cat([rows, columns], dim=-1).permute(0, 3, 1, 2)

    def _waves(self, number: Tensor, extent: Tensor | int) -> Tensor:
        """Row or column numbers, of ``extent`` real ones, to (..., num_features) sines and cosines."""
        return sine_waves((number + self.offset) / (extent + 1e-6), self.num_features)


def sine_waves(fraction: Tensor, num_features: int) -> Tensor:
    """Sines and cosines, alternating, of a coordinate at ever longer wavelengths.

    Of a coordinate (...) float32, normalised to [0, 1], these are (..., num_features) float32.
    """
    index = torch.arange(0, num_features, 2, dtype=torch.float32, device=fraction.device)
    angle = (fraction * (2 * math.pi)).unsqueeze(-1) / _TEMPERATURE ** (index / num_features)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def encode_points(points: Tensor, num_features: int) -> Tensor:
    """The encoding that :class:`SinePositionEncoding` would give a map at some points.

    Of points (..., 2) float32, x and y, normalised, it is (..., 2 x num_features); channels of y come first.
    """
    x, y = points.unbind(-1)
    return torch.cat([sine_waves(y, num_features), sine_waves(x, num_features)], dim=-1)


class LearnedPositionEncoding(nn.Module):
    """A learned vector for each of the first 50 rows and columns; ``num_features`` channels for each axis."""

    MAX_SIZE = 50

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.row_embeddings = nn.Embedding(self.MAX_SIZE, num_features)
        self.column_embeddings = nn.Embedding(self.MAX_SIZE, num_features)

    def reset_parameters(self) -> None:
        """Uniform in [0, 1), as in the original."""
        nn.init.uniform_(self.row_embeddings.weight)
        nn.init.uniform_(self.column_embeddings.weight)

    def forward(self, feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encodes the positions of a map; padding plays no part.

        Returns:
            (1, 2 x num_features, height, width) float32; the columns' channels come first.

        Raises:
            ValueError: The map has more than 50 rows or columns.
        """
        height, width = feature_map.shape[-2:]
        if max(height, width) > self.MAX_SIZE:
            raise ValueError(
                f"learned position embeddings cover {self.MAX_SIZE}x{self.MAX_SIZE} feature maps, not "
                f"{height}x{width}; use smaller images or position_embedding_type='sine'"
            )
        down = rows(self.row_embeddings, height).float().unsqueeze(1).expand(-1, width, -1)
        across = rows(self.column_embeddings, width).float().unsqueeze(0).expand(height, -1, -1)
        return torch.cat([across, down], dim=-1).permute(2, 0, 1).unsqueeze(0)


def build_position_encoding(config: DetrFamilyConfig, offset: float = 0.0) -> nn.Module:
    """The encoding that ``config.position_embedding_type`` names, for maps of ``config.d_model`` channels."""
    if config.position_embedding_type == "learned":
        return LearnedPositionEncoding(config.d_model // 2)
    return SinePositionEncoding(config.d_model // 2, offset=offset)
