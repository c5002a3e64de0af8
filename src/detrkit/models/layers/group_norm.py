"""Group normalisation that takes maps of a single pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """As PyTorch's, also where a group of a batch of one has one value.

    PyTorch refuses that, but not in a batch of two, which it normalises one by one just the same. A narrow
    model meets such groups in images so small that a feature map has one pixel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (batch, channels, ...)."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
