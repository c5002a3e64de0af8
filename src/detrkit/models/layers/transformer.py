"""Transformer layers that families share, post-norm or pre-norm as in the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.layers.attention import MultiHeadAttention
from detrkit.models.layers.dropout import dropout
from detrkit.models.outputs import DecoderOutput, EncoderOutput

# What a layer gives: the next state, and the weights of its self- and cross-attention where asked for.
LayerResult: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]


class TransformerLayer(GradientCheckpointingLayer):
    """What every layer ends with, the feed-forward part, and where its norms stand.

    A post-norm layer normalises each residual sum, a pre-norm layer the input of each sub-layer.
    """

    def __init__(self, config: DetrFamilyConfig, ffn_dim: int) -> None:
        super().__init__()
        self.normalize_before = config.normalize_before
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        # In place, a ReLU touches the widest activation of the layer once instead of twice.
        relu = config.activation_function == "relu"
        self.activation_fn = nn.ReLU(inplace=True) if relu else ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def reset_parameters(self) -> None:
        """Xavier uniform weights; the biases keep their layer's own initialisation."""
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.xavier_uniform_(self.fc2.weight)

    def sublayer_input(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """What a sub-layer reads of the state: in a pre-norm layer its norm."""
        return norm(x) if self.normalize_before else x

    def add_and_norm(self, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The residual sum, with dropout on the update; in a post-norm layer normalised."""
        total = x + dropout(update, self.dropout, self.training)
        return total if self.normalize_before else norm(total)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward sub-layer with its residual sum and norm."""
        hidden = self.activation_fn(self.fc1(self.sublayer_input(x, self.final_layer_norm)))
        hidden = dropout(hidden, self.activation_dropout, self.training)
        return self.add_and_norm(x, self.fc2(hidden), self.final_layer_norm)


class EncoderLayer(TransformerLayer):
    """Self-attention over the feature map, positions added to queries and keys, then feed-forward."""

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = MultiHeadAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One layer; ``x`` and ``positions`` are (batch, height x width, d_model)."""
        state = self.sublayer_input(x, self.self_attn_layer_norm)
        placed = state + positions
        update, weights = self.self_attn(placed, placed, state, mask, output_attentions)
        x = self.add_and_norm(x, update, self.self_attn_layer_norm)
        return self.feed_forward(x), weights


class Encoder(nn.Module):
    """A stack of encoder layers over a flattened feature map, with a norm at the end of pre-norm layers."""

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layernorm = nn.LayerNorm(config.d_model) if config.normalize_before else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encodes a feature map.

        Args:
            x: (batch, height x width, d_model).
            positions: (batch or 1, height x width, d_model), added to queries and keys of every layer.
            mask: (batch, 1, 1, height x width), True where pixels are real.
            output_attentions: Return the attention weights of each layer.
            output_hidden_states: Return the input of each layer and the output of the last.
        """
        states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, positions, mask, output_attentions)
            states.append(x)
            attentions.append(weights)
        return EncoderOutput(
            last_hidden_state=x if self.layernorm is None else self.layernorm(x),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class DecoderStack(nn.Module):
    """Decoder layers and the norm that reads the state of each."""

    def __init__(self, config: DetrFamilyConfig, layers: Iterable[TransformerLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layernorm = nn.LayerNorm(config.d_model)

    def run(
        self,
        x: Tensor,
        run_layer: Callable[[nn.Module, Tensor], LayerResult],
        intermediate: bool,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> DecoderOutput:
        """Takes a state (batch, queries, d_model) through all layers.

        Args:
            x: The state.
            run_layer: Applies a layer to a state, with whatever else the layer is given.
            intermediate: Return every layer's normalised state, for auxiliary outputs.
            output_attentions: Return the weights of both attentions of every layer.
            output_hidden_states: Return the input of each layer and the final, normalised state.
        """
        states, layers_out, attentions, cross_attentions = [x], [], [], []
        for layer in self.layers:
            x, self_weights, cross_weights = run_layer(layer, x)
            states.append(x)
            if intermediate:
                # The norm reads a copy; the next layer gets the state as it is.
                layers_out.append(self.layernorm(x))
            attentions.append(self_weights)
            cross_attentions.append(cross_weights)
        states[-1] = layers_out[-1] if intermediate else self.layernorm(x)
        return DecoderOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            intermediate_hidden_states=torch.stack(layers_out) if intermediate else None,
        )


class PredictionMLP(nn.Module):
    """Linear layers with ReLU between them, such as the three-layer box head."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        return self.layers[-1](x)
