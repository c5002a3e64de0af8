"""DETR for object detection.

The model reads like figure 2 of the paper: a backbone gives a feature map, an encoder mixes it, a decoder
turns object queries into predictions, and two heads read classes and boxes off them.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from detrkit.losses.criterion import detection_loss
from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.detr.configuration_detr import DetrConfig
from detrkit.models.layers.attention import MultiHeadAttention, key_mask
from detrkit.models.layers.backbone import Backbone, downsample_mask, padding_mask
from detrkit.models.layers.transformer import Encoder, PredictionMLP, TransformerLayer
from detrkit.models.outputs import DecoderOutput, DetrModelOutput, EncoderOutput, ObjectDetectionOutput


class DecoderLayer(TransformerLayer):
    """Self-attention among object queries, cross-attention to the image, feed-forward."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config, config.decoder_ffn_dim)
        self.self_attn = MultiHeadAttention(config, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = MultiHeadAttention(config, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        placed_memory: Tensor,
        query_mask: Tensor | None,
        memory_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer; see :meth:`Decoder.forward` for the shapes."""
        placed = x + query_positions
        update, self_weights = self.self_attn(placed, placed, x, query_mask, output_attentions)
        x = self.self_attn_layer_norm(self.add(x, update))
        update, cross_weights = self.encoder_attn(
            x + query_positions, placed_memory, memory, memory_mask, output_attentions
        )
        x = self.encoder_attn_layer_norm(self.add(x, update))
        return self.feed_forward(x), self_weights, cross_weights


class Decoder(nn.Module):
    """A stack of decoder layers and the norm that reads each layer's state."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.layernorm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        positions: Tensor,
        query_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        intermediate: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Decodes object queries.

        Args:
            x: (batch, queries, d_model), zeros unless the caller has better.
            query_positions: (queries, d_model), added to the queries of both attentions in every layer.
            memory: (batch, height x width, d_model), the encoder's output.
            positions: (batch or 1, height x width, d_model), added to the keys of the cross-attention.
            query_mask: (batch, 1, 1, queries), True for queries that may be attended to.
            memory_mask: (batch, 1, 1, height x width), True where pixels are real.
            intermediate: Return every layer's normalised state, for auxiliary outputs.
            output_attentions: Return the weights of both attentions of every layer.
            output_hidden_states: Return the input of each layer and the final, normalised state.
        """
        placed_memory = memory + positions
        states, layers_out, attentions, cross_attentions = [x], [], [], []
        for layer in self.layers:
            x, self_weights, cross_weights = layer(
                x, query_positions, memory, placed_memory, query_mask, memory_mask, output_attentions
            )
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


class DetrPreTrainedModel(DetrFamilyPreTrainedModel):
    """Base of the DETR models."""

    config_class = DetrConfig


class DetrModel(DetrPreTrainedModel):
    """Backbone, encoder and decoder without heads."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.input_projection = nn.Conv2d(self.backbone.intermediate_channel_sizes[-1], config.d_model, 1)
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    def freeze_backbone(self) -> None:
        """Excludes the whole backbone from training."""
        self.backbone.conv_encoder.requires_grad_(False)

    def unfreeze_backbone(self) -> None:
        """Trains the whole backbone, the stem and the first stage included."""
        self.backbone.conv_encoder.requires_grad_(True)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DetrModelOutput | tuple:
        """Runs the model.

        Args:
            pixel_values: (batch, channels, height, width) normalised images.
            pixel_mask: (batch, height, width), nonzero where pixels are real; None when nothing is padded.
            decoder_attention_mask: (batch, queries), nonzero for queries that may be attended to.
            encoder_outputs: What the encoder returned before, to skip it.
            inputs_embeds: (batch, side x side, d_model) instead of the projected feature map of an image.
            decoder_inputs_embeds: (batch, queries, d_model) instead of zeros.
            output_attentions: Return attention weights (spells the attention out, which is slower).
            output_hidden_states: Return the states between layers.
            return_dict: Return a :class:`DetrModelOutput` (default) or a tuple of its fields that are set.

        Raises:
            ValueError: There is neither an image nor a substitute, or shapes do not fit.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )

        feature_map, mask = self._feature_map(pixel_values, pixel_mask, inputs_embeds)
        positions = self.backbone.position_embedding(feature_map, mask).to(feature_map.dtype)
        positions = positions.flatten(2).transpose(1, 2)
        memory_mask = key_mask(None if mask is None else mask.flatten(1))

        if isinstance(encoder_outputs, tuple):
            encoded = EncoderOutput(*encoder_outputs)
        else:
            encoded = encoder_outputs or self.encoder(
                feature_map.flatten(2).transpose(1, 2),
                positions,
                memory_mask,
                output_attentions,
                output_hidden_states,
            )
        memory: Tensor = encoded.last_hidden_state

        queries = decoder_inputs_embeds
        if queries is None:
            queries = memory.new_zeros(memory.shape[0], config.num_queries, config.d_model)
        decoded = self.decoder(
            queries,
            self.query_position_embeddings.weight,
            memory,
            positions,
            query_mask=key_mask(decoder_attention_mask),
            memory_mask=memory_mask,
            intermediate=config.auxiliary_loss or self.training,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        output = DetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
        )
        return output if _wants_dict(return_dict, config) else output.to_tuple()

    def _feature_map(
        self, pixel_values: Tensor | None, pixel_mask: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The projected map (batch, d_model, height, width) and its mask (batch, height, width) or None."""
        if inputs_embeds is not None:
            side = isqrt(inputs_embeds.shape[1])
            if side * side != inputs_embeds.shape[1]:
                raise ValueError(
                    "inputs_embeds must hold a square feature map, (batch, side x side, d_model); "
                    f"{inputs_embeds.shape[1]} is not a square"
                )
            return inputs_embeds.transpose(1, 2).unflatten(2, (side, side)), downsample_mask(
                pixel_mask, (side, side)
            )
        if pixel_values is None:
            raise ValueError("pass pixel_values (an image batch) or inputs_embeds")
        pixel_mask = padding_mask(pixel_mask, pixel_values)
        feature_map = self.input_projection(self.backbone(pixel_values)[-1])
        return feature_map, downsample_mask(pixel_mask, feature_map.shape[-2:])


class DetrForObjectDetection(DetrPreTrainedModel):
    """DETR with heads for classes (the last one is no-object) and boxes."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.model = DetrModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels + 1)
        self.bbox_predictor = PredictionMLP(config.d_model, config.d_model, 4, num_layers=3)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ObjectDetectionOutput | tuple:
        """Detects objects; arguments as in :meth:`DetrModel.forward`.

        Args:
            pixel_values: (batch, channels, height, width) normalised images.
            pixel_mask: (batch, height, width), nonzero where pixels are real; None when nothing is padded.
            decoder_attention_mask: (batch, queries), nonzero for queries that may be attended to.
            encoder_outputs: What the encoder returned before, to skip it.
            inputs_embeds: (batch, side x side, d_model) instead of the projected feature map of an image.
            decoder_inputs_embeds: (batch, queries, d_model) instead of zeros.
            labels: One dict an image with ``class_labels`` (objects,) and ``boxes`` (objects, 4) as
                normalised cxcywh of the unpadded image; gives ``loss`` and ``loss_dict``.
            output_attentions: Return attention weights (spells the attention out, which is slower).
            output_hidden_states: Return the states between layers.
            return_dict: Return an :class:`ObjectDetectionOutput` (default) or a tuple of its set fields.
        """
        features = self.model(
            pixel_values,
            pixel_mask,
            decoder_attention_mask,
            encoder_outputs,
            inputs_embeds,
            decoder_inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        intermediate = features.intermediate_hidden_states
        if intermediate is None:
            logits, boxes = self._heads(features.last_hidden_state)
            auxiliary = None
        else:
            all_logits, all_boxes = self._heads(intermediate)
            logits, boxes = all_logits[-1], all_boxes[-1]
            auxiliary = [{"logits": a, "pred_boxes": b} for a, b in zip(all_logits[:-1], all_boxes[:-1])]

        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = detection_loss(logits, boxes, labels, self.config, auxiliary)
        output = ObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=boxes,
            auxiliary_outputs=auxiliary if self.config.auxiliary_loss else None,
            last_hidden_state=features.last_hidden_state,
            decoder_hidden_states=features.decoder_hidden_states,
            decoder_attentions=features.decoder_attentions,
            cross_attentions=features.cross_attentions,
            encoder_last_hidden_state=features.encoder_last_hidden_state,
            encoder_hidden_states=features.encoder_hidden_states,
            encoder_attentions=features.encoder_attentions,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _heads(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and boxes (cxcywh, normalised) of states (..., queries, d_model)."""
        return self.class_labels_classifier(states), self.bbox_predictor(states).sigmoid()


def _wants_dict(return_dict: bool | None, config: DetrConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict
