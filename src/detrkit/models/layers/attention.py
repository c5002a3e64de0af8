"""Multi-head attention with separate projections, fused (SDPA) or spelt out (eager)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.kernels.recording import is_exporting
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.layers.dropout import dropout as drop


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention.

    Args:
        query: (batch, heads, queries, head width).
        key: (batch, heads, keys, head width).
        value: (batch, heads, keys, value width).
        mask: Boolean, broadcast to (batch, heads, queries, keys); True where a key may be attended to.
        dropout: Probability of dropping an attention weight.
        return_weights: Spell the computation out, so that the weights can be returned.

    Returns:
        (batch, queries, heads x value width), and the weights (batch, heads, queries, keys) or None.
    """
    # A CPU has no fused kernel with dropout either.
    if return_weights or (dropout and query.device.type == "cpu"):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        attended = drop(weights, dropout) @ value
    else:
        weights = None
        width = value.shape[-1]
        if query.device.type == "cpu" and width < query.shape[-1] and not is_exporting():
            # The fused CPU kernel, twice as fast as the other, takes values only if they are as wide as keys.
            value = F.pad(value, (0, query.shape[-1] - width))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        attended = attended[..., :width]
    return attended.transpose(1, 2).flatten(2), weights


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, width) to (batch, heads, length, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """A (batch, keys) mask, nonzero where a key is real, as booleans for all heads and queries."""
    return None if mask is None else mask.bool()[:, None, None, :]


class ProjectedAttention(nn.Module):
    """Attention among queries, keys and values that others have projected, and a projection of what it gives.

    The configuration names the implementation: ``sdpa`` or ``eager``. ``heads`` must divide the width.
    """

    def __init__(self, config: DetrFamilyConfig, heads: int) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def reset_parameters(self) -> None:
        """Xavier uniform and zero biases, as in the original."""
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; shapes and mask as in :func:`attend`, the result (batch, queries, width)."""
        attended, weights = attend(
            query,
            key,
            value,
            mask,
            self.config.attention_dropout if self.training else 0.0,
            return_weights=output_attentions or self.config._attn_implementation == "eager",
        )
        return self.out_proj(attended), weights if output_attentions else None


class MultiHeadAttention(ProjectedAttention):
    """Attention from queries to keys and values, each with a projection of its own."""

    def __init__(self, config: DetrFamilyConfig, heads: int) -> None:
        super().__init__(config, heads)
        width = config.d_model
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Xavier uniform and zero biases, as the original's packed projection has them.

        The original draws q, k and v as one (3 x width, width) matrix, hence the gain.
        """
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
            nn.init.zeros_(projection.bias)
        super().reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; shapes (batch, length, width), mask as in :func:`attend`."""
        return super().forward(
            split_heads(self.q_proj(query), self.heads),
            split_heads(self.k_proj(key), self.heads),
            split_heads(self.v_proj(value), self.heads),
            mask,
            output_attentions,
        )
