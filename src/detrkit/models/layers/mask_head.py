"""The mask head of panoptic DETR (section 4 of the paper; ``models/segmentation.py`` of the original).

Two parts: an attention map of each query over the image, and a small convolutional network that turns the
map into a mask with the backbone's finer feature maps. What depends on the image alone is computed once for
all queries, and queries run in chunks, so that memory is bounded whatever their number.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.kernels.recording import is_exporting
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.layers.attention import split_heads
from detrkit.models.layers.group_norm import GroupNorm
from detrkit.models.layers.plain import is_plain

# Elements of the widest activation of one chunk of queries: 32 MiB in float32 on a CPU, where caches matter,
# and 256 MiB elsewhere.
_CHUNK_ELEMENTS = {"cpu": 2**23}
_CHUNK_ELEMENTS_ELSEWHERE = 2**26
# A graph cannot choose its number of chunks by the image's size.
_CHUNK_OF_A_GRAPH = 10

# Names of Transformers 5 -> those of the files, as regular expressions.
MASK_HEAD_RENAMES = {
    r"bbox_attention\.([qk])_proj": r"bbox_attention.\1_linear",
    r"mask_head\.conv([12])\.conv": r"mask_head.lay\1",
    r"mask_head\.conv([12])\.norm": r"mask_head.gn\1",
    **{rf"mask_head\.fpn_stages\.{i}\.fpn_adapter": f"mask_head.adapter{i + 1}" for i in range(3)},
    **{rf"mask_head\.fpn_stages\.{i}\.refine\.conv": f"mask_head.lay{i + 3}" for i in range(3)},
    **{rf"mask_head\.fpn_stages\.{i}\.refine\.norm": f"mask_head.gn{i + 3}" for i in range(3)},
    r"mask_head\.output_conv": "mask_head.out_lay",
}


class AttentionMap(nn.Module):
    """Attention weights of queries over an encoded image, one map for each head."""

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__()
        self.heads = config.encoder_attention_heads
        self.q_linear = nn.Linear(config.d_model, config.d_model)
        self.k_linear = nn.Linear(config.d_model, config.d_model)

    def reset_parameters(self) -> None:
        """Xavier uniform weights and zero biases."""
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends; one softmax spans all heads and places, unlike in an attention layer.

        Args:
            queries: (batch, queries, d_model), the decoder's normalised states.
            memory: (batch, height x width, d_model), the encoder's output.
            mask: (batch, 1, 1, height x width), True where pixels are real.

        Returns:
            (batch, queries, heads, height x width).
        """
        query = split_heads(self.q_linear(queries), self.heads)
        key = split_heads(self.k_linear(memory), self.heads)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        scores = scores.transpose(1, 2)
        return scores.flatten(2).softmax(-1).view(scores.shape)


class MaskHead(nn.Module):
    """From attention maps to mask logits, with three of the backbone's feature maps on the way up.

    Args:
        config: Gives the width and the number of heads.
        channels: Channels of the three feature maps, coarsest first.

    Raises:
        ValueError: The channels cannot be normalised in groups.
    """

    def __init__(self, config: DetrFamilyConfig, channels: list[int]) -> None:
        super().__init__()
        width = config.d_model
        self.image_channels = width
        widths = [width + config.encoder_attention_heads] * 2 + [width // 2**i for i in (1, 2, 3, 4)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            groups = min(8, after)
            if not after or after % groups:
                raise ValueError(
                    f"the mask head cannot normalise {after} channels in groups of 8: d_model={width} and "
                    f"encoder_attention_heads={config.encoder_attention_heads} must sum to a multiple of 8, "
                    "and d_model must be a power of two times 8"
                )
            setattr(self, f"lay{i}", nn.Conv2d(before, after, 3, padding=1))
            setattr(self, f"gn{i}", GroupNorm(groups, after))
        for i, (before, after) in enumerate(zip(channels, widths[2:]), start=1):
            setattr(self, f"adapter{i}", nn.Conv2d(before, after, 1))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def reset_parameters(self) -> None:
        """Kaiming uniform weights (a=1) and zero biases."""
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, feature_map: Tensor, finer: list[Tensor], attention: Tensor) -> Tensor:
        """Mask logits of queries.

        Args:
            feature_map: (batch, d_model, height, width), the projected map that the encoder read.
            finer: Three of the backbone's maps, coarsest first, (batch, channels, height, width).
            attention: (batch, queries, heads, height x width).

        Returns:
            (batch, queries, height, width) of the finest feature map.
        """
        if not attention.shape[0] or not attention.shape[1]:
            return attention.new_empty(*attention.shape[:2], *finer[-1].shape[-2:])
        base = feature_map
        if is_plain(self.lay1, nn.Conv2d):
            # The first convolution is linear: its part over the image channels does not know the query.
            weight = self.lay1.weight[:, : self.image_channels]
            base = F.conv2d(feature_map, weight, self.lay1.bias, padding=1)
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        adapted = [adapter(m) for adapter, m in zip(adapters, finer)]
        if is_exporting():
            return self._decode(base, adapted, attention)  # a number of queries that only the run knows
        chunks = attention.split(_chunk_size(base, *adapted), dim=1)
        masks = [self._decode(base, adapted, chunk) for chunk in chunks]
        return torch.cat(masks, dim=1) if len(masks) > 1 else masks[0]

    def _decode(self, base: Tensor, adapted: list[Tensor], attention: Tensor) -> Tensor:
        """Runs a chunk of queries, given the images' part of the first convolution and the adapted maps.

        A first convolution that is more than one (an adapter's) is given the images in ``base``.
        """
        maps = attention.flatten(0, 1).unflatten(-1, base.shape[-2:])
        if is_plain(self.lay1, nn.Conv2d):
            x = self._add(F.conv2d(maps, self.lay1.weight[:, self.image_channels :], padding=1), base)
        else:
            # Not repeat_interleave, which is exported for the recorded number of images only.
            image = base[:, None].expand(-1, attention.shape[1], -1, -1, -1)
            x = self.lay1(torch.cat([image.flatten(0, 1), maps], dim=1))
        x = F.relu_(self.gn1(x))
        x = F.relu_(self.gn2(self.lay2(x)))
        stages = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for (convolution, norm), finer in zip(stages, adapted):
            x = self._add(F.interpolate(x, size=finer.shape[-2:], mode="nearest"), finer)
            x = F.relu_(norm(convolution(x)))
        return self.out_lay(x)[:, 0].unflatten(0, attention.shape[:2])

    @staticmethod
    def _add(x: Tensor, image: Tensor) -> Tensor:
        """Adds the image's (batch, ...) part to that of each query, (batch x queries, ...)."""
        return x.unflatten(0, (image.shape[0], -1)).add_(image[:, None]).flatten(0, 1)


def _chunk_size(*image_parts: Tensor) -> int:
    """How many queries to run at once."""
    if torch.compiler.is_compiling():
        return _CHUNK_OF_A_GRAPH
    limit = _CHUNK_ELEMENTS.get(image_parts[0].device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(1, limit // max(tensor.numel() for tensor in image_parts))
