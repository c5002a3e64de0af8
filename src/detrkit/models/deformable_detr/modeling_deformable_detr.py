"""Deformable DETR for object detection.

Attention looks at a few sampled points of several feature maps instead of all pixels of one (section 4 of the
paper). Each object query starts from a reference point, or in the two-stage variant from a box that the
encoder proposes; with box refinement each decoder layer corrects the boxes of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.kernels.recording import is_exporting
from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from detrkit.models.detection import EncoderDecoderModel, ObjectDetectionModel
from detrkit.models.layers.attention import MultiHeadAttention, key_mask
from detrkit.models.layers.backbone import Backbone, downsample_mask, rename_while_loading
from detrkit.models.layers.feature_levels import (
    FeatureLevels,
    MultiScaleDeformableAttention,
    Samples,
    Surroundings,
    proposal_anchors,
    valid_ratio,
)
from detrkit.models.layers.group_norm import GroupNorm
from detrkit.models.layers.plain import rows
from detrkit.models.layers.position_encoding import sine_waves
from detrkit.models.layers.transformer import PredictionMLP, TransformerLayer
from detrkit.models.outputs import (
    DecoderOutput,
    DeformableDetrModelOutput,
    DeformableDetrObjectDetectionOutput,
    EncoderOutput,
)

if TYPE_CHECKING:
    from transformers.modeling_utils import LoadStateDictInfo

# The probability that a fresh class head gives every class, and how far from 0 and 1 a coordinate is kept
# before its inverse sigmoid is taken.
PRIOR_PROBABILITY = 0.01
BORDER = 1e-5

# What the detector calls its heads for classes and boxes.
_HEADS = ("class_embed", "bbox_embed")


class EncoderLayer(TransformerLayer):
    """Deformable self-attention over all levels, then feed-forward."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = MultiScaleDeformableAttention(
            config, config.encoder_attention_heads, config.encoder_n_points
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, positions: Tensor, around: Surroundings, levels: FeatureLevels
    ) -> tuple[Tensor, Samples]:
        """One layer; ``x`` is (batch, pixels, d_model).

        ``positions`` are those of the levels: gradients reach only arguments that are tensors when a layer is
        computed again for them (reentrant gradient checkpointing). ``around`` needs none.
        """
        update, samples = self.self_attn(x + positions, around, x, levels)
        x = self.add_and_norm(x, update, self.self_attn_layer_norm)
        return self.feed_forward(x), samples


class Encoder(nn.Module):
    """A stack of encoder layers over the pixels of all levels."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.heads, self.points = config.encoder_attention_heads, config.encoder_n_points
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self, levels: FeatureLevels, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> EncoderOutput:
        """Encodes feature maps; attentions are the weights (batch, pixels, heads, levels, points)."""
        around = levels.surroundings(levels.pixel_centres(), self.points)
        # Written out, as a sum that broadcasts over pairs of numbers takes several times as long.
        around = around.spread(self.heads, self.points)
        x = levels.pixels
        states, attentions, locations = [x], [], []
        for layer in self.layers:
            x, samples = layer(x, levels.positions, around, levels)
            if output_hidden_states:
                states.append(x)
            if output_attentions:
                locations.append(samples[0])
                attentions.append(samples[1])
        return EncoderOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            sampling_locations=tuple(locations) if output_attentions else None,
        )


class DecoderLayer(TransformerLayer):
    """Self-attention among object queries, deformable cross-attention to the image, feed-forward."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__(config, config.decoder_ffn_dim)
        heads = config.decoder_attention_heads
        self.self_attn = MultiHeadAttention(config, heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = MultiScaleDeformableAttention(config, heads, config.decoder_n_points)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        centre: Tensor,
        unit: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
        query_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Samples]:
        """One layer; see :meth:`Decoder.forward` for the shapes.

        ``centre`` and ``unit``, a :class:`Surroundings`, are tensors for the reason that
        :meth:`EncoderLayer.forward` tells.
        """
        placed = x + query_positions
        update, self_weights = self.self_attn(placed, placed, x, query_mask, output_attentions)
        x = self.add_and_norm(x, update, self.self_attn_layer_norm)
        around = Surroundings(centre, unit)
        update, samples = self.encoder_attn(x + query_positions, around, memory, levels)
        x = self.add_and_norm(x, update, self.encoder_attn_layer_norm)
        return self.feed_forward(x), self_weights, samples


class Decoder(nn.Module):
    """A stack of decoder layers that look around their reference points or boxes."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.points = config.decoder_n_points
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        reference: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
        box_heads: nn.ModuleList | None = None,
        query_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Decodes object queries.

        Args:
            x: (batch, queries, d_model), the content of the queries.
            query_positions: (batch or 1, queries, d_model).
            reference: (batch or 1, queries, 2 or 4) float32, points or cxcywh boxes relative to the image.
            memory: (batch, pixels, d_model), the encoder's output.
            levels: Shapes, mask and valid ratios of ``memory``.
            box_heads: A head for each layer, to refine the references with; None leaves them.
            query_mask: (batch, 1, 1, queries), True for queries that may be attended to.
            output_attentions: Return the weights of both attentions and where the second one sampled.
            output_hidden_states: Return the input of each layer and the final state.

        Returns:
            ``intermediate_reference_points`` are what each layer leaves to the next: refined references, or
            the same. The last layer's are not refined, which is the box head's part.
        """
        states, references, self_weights = [x], [], []
        cross: list[Samples] = []
        reference = reference.expand(x.shape[0], -1, -1)
        for index, layer in enumerate(self.layers):
            around = levels.surroundings(reference, self.points)
            x, weights, samples = layer(
                x, query_positions, *around, memory, levels, query_mask, output_attentions
            )
            states.append(x)
            self_weights.append(weights)
            cross += [samples] if output_attentions else []
            if box_heads is not None and index < len(self.layers) - 1:
                reference = (box_heads[index](x).float() + _logits_of(reference)).sigmoid().detach()
            references.append(reference)
        return DecoderOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(self_weights) if output_attentions else None,
            cross_attentions=tuple(s[1] for s in cross) if output_attentions else None,
            sampling_locations=tuple(s[0] for s in cross) if output_attentions else None,
            intermediate_hidden_states=torch.stack(states[1:], dim=1),
            intermediate_reference_points=torch.stack(references, dim=1),
        )


def _logits_of(reference: Tensor) -> Tensor:
    """Inverse sigmoid of points or boxes (..., 2 or 4), as (..., 4)."""
    return F.pad(reference.logit(eps=BORDER), (0, 4 - reference.shape[-1]))


class DeformableDetrPreTrainedModel(DetrFamilyPreTrainedModel):
    """Base of the Deformable DETR models."""

    config_class = DeformableDetrConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(
            module, (MultiScaleDeformableAttention, DeformableDetrModel, DeformableDetrForObjectDetection)
        ):
            module.reset_parameters()


class DeformableDetrModel(DeformableDetrPreTrainedModel, EncoderDecoderModel):
    """Deformable DETR's backbone, encoder and decoder without heads.

    Without the heads of :class:`DeformableDetrForObjectDetection` nothing is proposed or refined, so a
    two-stage model does not run.
    """

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, position_offset=-0.5)
        self.input_proj = _input_projections(config, self.backbone.intermediate_channel_sizes)
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, config.d_model))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        width = config.d_model
        if config.two_stage:
            self.enc_output = nn.Linear(width, width)
            self.enc_output_norm = nn.LayerNorm(width)
            self.pos_trans = nn.Linear(2 * width, 2 * width)
            self.pos_trans_norm = nn.LayerNorm(2 * width)
        else:
            self.query_position_embeddings = nn.Embedding(config.num_queries, 2 * width)
            self.reference_points = nn.Linear(width, 2)
        if config.with_box_refine:  # files hold the decoder's heads under its name, the owner's, or both
            rename_while_loading({r"^(?:model\.)?decoder\.(class_embed|bbox_embed)\.": r"\1."})
        # A tuple keeps the owner's heads out of this module's own.
        self.heads: tuple[nn.ModuleList, nn.ModuleList] | None = None
        self.post_init()

    def reset_parameters(self) -> None:
        """Xavier uniform projections; the biases of points and maps start at zero."""
        nn.init.normal_(self.level_embed)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        if self.config.two_stage:
            nn.init.xavier_uniform_(self.enc_output.weight)
            nn.init.xavier_uniform_(self.pos_trans.weight)
        else:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def run(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None,
        decoder_attention_mask: Tensor | None,
        encoder_outputs: EncoderOutput | tuple[Tensor, ...] | None,
        inputs_embeds: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> DeformableDetrModelOutput:
        """See :meth:`~detrkit.models.detection.EncoderDecoderModel.forward`."""
        config = self.config
        if inputs_embeds is not None or pixel_values is None:
            raise ValueError("Deformable DETR does not take inputs_embeds: pass pixel_values (images)")
        levels = self._feature_levels(*self.backbone.long_enough(pixel_values, pixel_mask))
        if isinstance(encoder_outputs, tuple):
            encoded = EncoderOutput(*encoder_outputs)
        else:
            encoded = encoder_outputs or self.encoder(levels, output_attentions, output_hidden_states)
        memory: Tensor = encoded.last_hidden_state

        classes = boxes = None  # of the proposals
        if config.two_stage:
            queries, query_positions, reference, classes, boxes = self._propose(memory, levels)
        else:
            learned = rows(self.query_position_embeddings, config.num_queries)
            query_positions, queries = learned[None].chunk(2, dim=-1)
            queries = queries.expand(memory.shape[0], -1, -1)
            reference = self.reference_points(query_positions).float().sigmoid()
        decoded = self.decoder(
            queries if decoder_inputs_embeds is None else decoder_inputs_embeds,
            query_positions,
            reference,
            memory,
            levels,
            box_heads=self.heads[1] if self.heads is not None and config.with_box_refine else None,
            query_mask=key_mask(decoder_attention_mask),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return DeformableDetrModelOutput(
            init_reference_points=reference.expand(memory.shape[0], -1, -1),
            last_hidden_state=decoded.last_hidden_state,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            intermediate_reference_points=decoded.intermediate_reference_points,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            cross_sampling_locations=decoded.sampling_locations,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            encoder_sampling_locations=encoded.sampling_locations,
            enc_outputs_class=classes,
            enc_outputs_coord_logits=boxes,
        )

    def _feature_levels(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> FeatureLevels:
        """The projected feature maps of an image batch."""
        maps = self.backbone(pixel_values)
        if self.config.num_feature_levels == 1:
            maps = maps[-1:]
        projected: list[Tensor] = []
        for index, projection in enumerate(self.input_proj):
            # Levels beyond the backbone's: the first is made from its last map, the next from the one before.
            source = maps[index] if index < len(maps) else maps[-1] if index == len(maps) else projected[-1]
            projected.append(projection(source))
        shapes = [(m.shape[-2], m.shape[-1]) for m in projected]
        masks = [downsample_mask(pixel_mask, shape) for shape in shapes]
        real = [mask for mask in masks if mask is not None]
        positions = [
            self.backbone.position_embedding(m, mask).to(m.dtype).flatten(2).transpose(1, 2) + embedding
            for m, mask, embedding in zip(projected, masks, self.level_embed)
        ]
        return FeatureLevels(
            pixels=torch.cat([m.flatten(2).transpose(1, 2) for m in projected], dim=1),
            positions=torch.cat(positions, dim=1),
            shapes=shapes,
            mask=torch.cat([m.flatten(1) for m in real], dim=1) if real else None,
            valid_ratios=torch.stack([valid_ratio(m) for m in real], dim=1) if real else None,
        )

    def _propose(self, memory: Tensor, levels: FeatureLevels) -> tuple[Tensor, ...]:
        """The first stage (section 4.2 of the paper): each pixel of the encoder's output proposes a box.

        Returns:
            The content (batch, proposals, d_model) and positions of the queries, the boxes (batch, proposals,
            4) that they start from, and for all pixels class logits and box logits (batch, pixels, classes)
            and (batch, pixels, 4).
        """
        if self.heads is None:
            raise ValueError(
                "a two-stage model proposes with its heads: use DeformableDetrForObjectDetection"
            )
        class_head, box_head = self.heads[0][-1], self.heads[1][-1]
        anchors, usable = proposal_anchors(levels)
        states = memory.masked_fill(~usable, 0.0)
        states = self.enc_output_norm(self.enc_output(states))
        class_logits = class_head(states)
        box_logits = box_head(states).float() + anchors

        count = self.config.two_stage_num_proposals
        # An exported graph is for images that have so many and for others.
        if is_exporting():
            count = torch.sym_min(count, box_logits.shape[1])
        elif box_logits.shape[1] < count:
            if torch.jit.is_tracing():  # a trace would keep all pixels as proposals of larger images too
                raise ValueError(
                    f"trace the model with a larger image: it has fewer than {count} pixels to propose"
                )
            count = box_logits.shape[1]
        best = class_logits[..., 0].topk(count, dim=1).indices
        boxes = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        encoded = sine_waves(boxes, self.config.d_model // 2).flatten(-2).to(memory.dtype)
        positions, content = self.pos_trans_norm(self.pos_trans(encoded)).chunk(2, dim=-1)
        return content, positions, boxes, class_logits, box_logits


def _input_projections(config: DeformableDetrConfig, channels: list[int]) -> nn.ModuleList:
    """A 1x1 convolution for each of the backbone's maps, a 3x3 one of stride 2 for each level beyond."""
    if config.num_feature_levels == 1:
        channels = channels[-1:]
    projections = [nn.Conv2d(c, config.d_model, 1) for c in channels[: config.num_feature_levels]]
    for index in range(config.num_feature_levels - len(channels)):
        source = channels[-1] if index == 0 else config.d_model
        projections.append(nn.Conv2d(source, config.d_model, 3, stride=2, padding=1))
    return nn.ModuleList(nn.Sequential(p, GroupNorm(32, config.d_model)) for p in projections)


def _is_new(parameter: Tensor) -> bool:
    """Whether a parameter is to be initialised, and was not loaded."""
    return not getattr(parameter, "_is_hf_initialized", False)


class DeformableDetrForObjectDetection(DeformableDetrPreTrainedModel, ObjectDetectionModel):
    """Deformable DETR with heads for classes (without a no-object class) and boxes.

    All layers share one pair of heads, unless boxes are refined: then each layer has its own, and in a
    two-stage model one more pair makes the proposals.
    """

    output_class = DeformableDetrObjectDetectionOutput
    head_lists = _HEADS

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__(config)
        self.model = DeformableDetrModel(config)
        count = config.decoder_layers + config.two_stage if config.with_box_refine else 1
        width = config.d_model
        self.class_embed = nn.ModuleList(nn.Linear(width, config.num_labels) for _ in range(count))
        self.bbox_embed = nn.ModuleList(PredictionMLP(width, width, 4, num_layers=3) for _ in range(count))
        if not config.with_box_refine:  # files hold the heads once, or once for each layer that shares them
            rename_while_loading({r"^(class_embed|bbox_embed)\.\d+\.": r"\1.0."})
        self.post_init()

    def __setattr__(self, name: str, value: object) -> None:
        """Sets an attribute; heads that replace others are also the ones that refine and propose."""
        super().__setattr__(name, value)
        if name in _HEADS and all(head in self._modules for head in _HEADS):
            self.model.heads = (self.class_embed, self.bbox_embed)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Classes begin improbable, boxes small and at their reference; all layers begin as the first one.

        That holds where the first one was loaded, too: a file may have one head for all layers.
        """
        nn.init.constant_(self.class_embed[0].bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        last = self.bbox_embed[0].layers[-1]
        nn.init.zeros_(last.weight)
        new = _is_new(last.bias)
        if new:
            nn.init.zeros_(last.bias)
        for heads in (self.class_embed, self.bbox_embed):
            for head in heads[1:]:
                for parameter, first in zip(head.parameters(), heads[0].parameters()):
                    if _is_new(parameter):
                        parameter.copy_(first)
        # A refining layer after the first, and those of a two-stage model, start from a box's own size.
        if new and not self.config.two_stage:
            last.bias[2:] = -2.0

    def _adjust_missing_and_unexpected_keys(self, loading_info: LoadStateDictInfo) -> None:
        """Does not report heads as missing that a file has once for all layers."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        for name in _HEADS:
            missing = {key for key in loading_info.missing_keys if key.startswith(f"{name}.")}
            later = {f"{name}.{key}" for key in getattr(self, name).state_dict() if not key.startswith("0.")}
            if missing == later:
                loading_info.missing_keys = loading_info.missing_keys - later

    def second_names(self, names: Iterable[str]) -> dict[str, str]:
        """Heads are saved for each layer that shares them, and as the decoder's where it uses them."""
        own = [n for n in names if n.startswith(("class_embed.", "bbox_embed."))]
        seconds = super().second_names(names)
        if not self.config.with_box_refine:
            layers = range(1, self.config.decoder_layers)
            seconds |= {n.replace("_embed.0.", f"_embed.{i}."): n for n in own for i in layers}
        else:
            used = ("bbox_embed.", "class_embed.") if self.config.two_stage else ("bbox_embed.",)
            seconds |= {f"model.decoder.{n}": n for n in own if n.startswith(used)}
        return seconds

    def states_of_layers(self, features: DeformableDetrModelOutput) -> Tensor:
        """See :meth:`ObjectDetectionModel.states_of_layers`; every output has them."""
        return features["intermediate_hidden_states"].transpose(0, 1)

    def states_to_read(self, features: DeformableDetrModelOutput) -> Tensor:
        """See :meth:`ObjectDetectionModel.states_to_read`."""
        states = self.states_of_layers(features)
        return states if self.config.auxiliary_loss or self.training else states[-1:]

    def read(self, features: DeformableDetrModelOutput, *args: Any, **options: Any) -> dict[str, Any]:
        """See :meth:`ObjectDetectionModel.read`; the last layer's refined reference points are its boxes."""
        found = super().read(features, *args, **options)
        if self.config.with_box_refine:
            earlier = features["intermediate_reference_points"].unbind(1)[:-1]
            refined = torch.stack([*earlier, found["pred_boxes"].detach()], dim=1)
            found["intermediate_reference_points"] = refined
        return found

    def predict(self, states: Tensor, features: DeformableDetrModelOutput) -> tuple[Tensor, Tensor]:
        """Class logits, and boxes in float32; see :meth:`ObjectDetectionModel.predict`."""
        first = self.config.decoder_layers - len(states)
        looked_from = [features.init_reference_points, *features["intermediate_reference_points"].unbind(1)]
        anchors = torch.stack([_logits_of(r) for r in looked_from[first : first + len(states)]])
        heads = [i if self.config.with_box_refine else 0 for i in range(first, self.config.decoder_layers)]
        logits = torch.stack([self.class_embed[i](state) for i, state in zip(heads, states)])
        updates = torch.stack([self.bbox_embed[i](state) for i, state in zip(heads, states)])
        return logits, (updates.float() + anchors).sigmoid()
