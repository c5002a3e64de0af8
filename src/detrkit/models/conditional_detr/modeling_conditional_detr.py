"""Conditional DETR for object detection.

It is DETR with another decoder (section 3 of the paper). Each object query stands for a reference point, and
in the cross-attention the match of contents and the match of places are computed apart: queries and keys are
a content part and a spatial part side by side. The spatial part of a query is the encoding of its reference
point, scaled channel by channel by what the decoder has found so far. Boxes are offsets from that point, and
classes are scored by sigmoids without a no-object class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.conditional_detr.configuration_conditional_detr import ConditionalDetrConfig
from detrkit.models.detection import ObjectDetectionModel, SingleScaleModel
from detrkit.models.layers.attention import ProjectedAttention, split_heads
from detrkit.models.layers.position_encoding import encode_points
from detrkit.models.layers.transformer import DecoderStack, LayerResult, PredictionMLP, TransformerLayer
from detrkit.models.outputs import DecoderOutput, DetrModelOutput
from detrkit.models.segmentation import SegmentationModel

# The probability that a fresh class head gives every class (section 3.3 of the RetinaNet paper).
PRIOR_PROBABILITY = 0.01

# Reference points are kept this far from the image's borders, where their inverse sigmoid is infinite.
BORDER = 1e-5


class DecoderLayer(TransformerLayer):
    """Self-attention among object queries, conditional cross-attention to the image, feed-forward.

    The queries of the first layer have no content yet.
    """

    def __init__(self, config: ConditionalDetrConfig, is_first: bool) -> None:
        super().__init__(config, config.decoder_ffn_dim)
        self.is_first = is_first
        self.heads = config.decoder_attention_heads
        width = config.d_model
        # Self-attention (sa) and cross-attention (ca) of queries (q), keys (k) and values (v).
        self.sa_qcontent_proj = nn.Linear(width, width)
        self.sa_qpos_proj = nn.Linear(width, width)
        self.sa_kcontent_proj = nn.Linear(width, width)
        self.sa_kpos_proj = nn.Linear(width, width)
        self.sa_v_proj = nn.Linear(width, width)
        self.self_attn = ProjectedAttention(config, self.heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.ca_qcontent_proj = nn.Linear(width, width)
        if is_first:
            self.ca_qpos_proj = nn.Linear(width, width)
        self.ca_kcontent_proj = nn.Linear(width, width)
        self.ca_kpos_proj = nn.Linear(width, width)
        self.ca_v_proj = nn.Linear(width, width)
        self.ca_qpos_sine_proj = nn.Linear(width, width)
        self.encoder_attn = ProjectedAttention(config, self.heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Xavier uniform weights; the biases keep their layer's own initialisation."""
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.xavier_uniform_(child.weight)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        query_places: Tensor,
        memory: Tensor,
        positions: Tensor,
        query_mask: Tensor | None,
        memory_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> LayerResult:
        """One layer; shapes as in the :meth:`forward` of DETR's decoder.

        ``query_places``, ([batch,] queries, d_model), are the encoded reference points, scaled.
        """
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_positions)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_positions)
        value = self.sa_v_proj(x)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        update, self_weights = self.self_attn(query, key, value, query_mask, output_attentions)
        x = self.add_and_norm(x, update, self.self_attn_layer_norm)

        query, key = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)
        key_places = self.ca_kpos_proj(positions)
        if self.is_first:
            query = query + self.ca_qpos_proj(query_positions)
            key = key + key_places
        update, cross_weights = self.encoder_attn(
            self._side_by_side(query, self.ca_qpos_sine_proj(query_places)),
            self._side_by_side(key, key_places),
            split_heads(self.ca_v_proj(memory), self.heads),
            memory_mask,
            output_attentions,
        )
        x = self.add_and_norm(x, update, self.encoder_attn_layer_norm)
        return self.feed_forward(x), self_weights, cross_weights

    def _side_by_side(self, content: Tensor, places: Tensor) -> Tensor:
        """Both parts in each head: (batch, heads, length, 2 x head width)."""
        parts = (content, places.expand_as(content))
        return torch.cat([split_heads(part, self.heads) for part in parts], dim=-1)


class Decoder(DecoderStack):
    """The decoder that looks from reference points."""

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(
            config, [DecoderLayer(config, is_first=i == 0) for i in range(config.decoder_layers)]
        )
        self.width = config.d_model
        self.query_scale = PredictionMLP(config.d_model, config.d_model, config.d_model, num_layers=2)
        self.ref_point_head = PredictionMLP(config.d_model, config.d_model, 2, num_layers=2)

    def reset_parameters(self) -> None:
        """Xavier uniform weights; the biases keep their layer's own initialisation."""
        for layer in (*self.query_scale.layers, *self.ref_point_head.layers):
            nn.init.xavier_uniform_(layer.weight)

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
        """Decodes object queries; arguments as those of DETR's decoder."""
        # In float32 whatever the activations' type, and the same for all images.
        points = self.ref_point_head(query_positions).float().sigmoid()
        places = encode_points(points, self.width // 2).to(x.dtype)

        def run_layer(layer: nn.Module, x: Tensor) -> LayerResult:
            return layer(
                x,
                query_positions,
                places if layer.is_first else places * self.query_scale(x),
                memory,
                positions,
                query_mask,
                memory_mask,
                output_attentions,
            )

        output = self.run(x, run_layer, intermediate, output_attentions, output_hidden_states)
        output.reference_points = points[:, None].expand(-1, x.shape[0], -1)
        return output


class ConditionalDetrPreTrainedModel(DetrFamilyPreTrainedModel):
    """Base of the Conditional DETR models."""

    config_class = ConditionalDetrConfig

    # Transformers 5 keeps the projections inside the two attentions.
    checkpoint_renames = DetrFamilyPreTrainedModel.checkpoint_renames | {
        rf"(decoder\.layers\.\d+)\.{module}\.{part}_proj": rf"\1.{prefix}_{part.replace('_', '', 1)}_proj"
        for module, prefix in (("self_attn", "sa"), ("encoder_attn", "ca"))
        for part in ("q_content", "q_pos", "k_content", "k_pos", "v", "q_pos_sine")
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Decoder, ConditionalDetrForObjectDetection)):
            module.reset_parameters()


class ConditionalDetrModel(ConditionalDetrPreTrainedModel, SingleScaleModel):
    """Conditional DETR's backbone, encoder and decoder without heads."""

    decoder_class = Decoder


class ConditionalDetrForObjectDetection(ConditionalDetrPreTrainedModel, ObjectDetectionModel):
    """Conditional DETR with heads for classes (without a no-object class) and boxes."""

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self.model = ConditionalDetrModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels)
        self.bbox_predictor = PredictionMLP(config.d_model, config.d_model, 4, num_layers=3)
        self.post_init()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Classes begin improbable, as the focal loss needs, and boxes centred on their reference point."""
        log_odds = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))
        nn.init.constant_(self.class_labels_classifier.bias, log_odds)
        nn.init.zeros_(self.bbox_predictor.layers[-1].weight)
        nn.init.zeros_(self.bbox_predictor.layers[-1].bias)

    def predict(self, states: Tensor, features: DetrModelOutput) -> tuple[Tensor, Tensor]:
        """Class logits, and boxes in float32; see :meth:`ObjectDetectionModel.predict`."""
        points: Tensor = features.reference_points
        # A point moves the box's centre; width and height come from the head alone.
        shift = F.pad(points.transpose(0, 1).logit(eps=BORDER), (0, 2))
        boxes = self.bbox_predictor(states) + shift
        return self.class_labels_classifier(states), boxes.sigmoid()


class ConditionalDetrForSegmentation(ConditionalDetrPreTrainedModel, SegmentationModel):
    """Conditional DETR with a mask for each query; boxes come from the reference points, as in detection."""

    detector_class = ConditionalDetrForObjectDetection
    detector_prefix = "conditional_detr."

    def object_scores(self, logits: Tensor) -> Tensor:
        """Sigmoid of each query's best class."""
        return logits.amax(-1).sigmoid()
