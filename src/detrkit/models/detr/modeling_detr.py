"""DETR for object detection and panoptic segmentation.

The model reads like figure 2 of the paper: a backbone gives a feature map, an encoder mixes it, a decoder
turns object queries into predictions, and two heads read classes and boxes off them. What the family shares
with others is in ``models/detection.py``, ``models/segmentation.py`` and ``models/layers``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.detection import ObjectDetectionModel, SingleScaleModel
from detrkit.models.detr.configuration_detr import DetrConfig
from detrkit.models.layers.attention import MultiHeadAttention
from detrkit.models.layers.transformer import DecoderStack, LayerResult, PredictionMLP, TransformerLayer
from detrkit.models.outputs import DecoderOutput, DetrModelOutput
from detrkit.models.segmentation import SegmentationModel


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
    ) -> LayerResult:
        """One layer; see :meth:`Decoder.forward` for the shapes."""
        state = self.sublayer_input(x, self.self_attn_layer_norm)
        placed = state + query_positions
        update, self_weights = self.self_attn(placed, placed, state, query_mask, output_attentions)
        x = self.add_and_norm(x, update, self.self_attn_layer_norm)
        placed = self.sublayer_input(x, self.encoder_attn_layer_norm) + query_positions
        update, cross_weights = self.encoder_attn(
            placed, placed_memory, memory, memory_mask, output_attentions
        )
        x = self.add_and_norm(x, update, self.encoder_attn_layer_norm)
        return self.feed_forward(x), self_weights, cross_weights


class Decoder(DecoderStack):
    """DETR's decoder: positions are added to queries and keys."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config, [DecoderLayer(config) for _ in range(config.decoder_layers)])

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

        def run_layer(layer: nn.Module, x: Tensor) -> LayerResult:
            return layer(
                x, query_positions, memory, placed_memory, query_mask, memory_mask, output_attentions
            )

        return self.run(x, run_layer, intermediate, output_attentions, output_hidden_states)


class DetrPreTrainedModel(DetrFamilyPreTrainedModel):
    """Base of the DETR models."""

    config_class = DetrConfig


class DetrModel(DetrPreTrainedModel, SingleScaleModel):
    """DETR's backbone, encoder and decoder without heads."""

    decoder_class = Decoder


class DetrForObjectDetection(DetrPreTrainedModel, ObjectDetectionModel):
    """DETR with heads for classes (the last one is no-object) and boxes."""

    base_class: ClassVar[type[DetrModel]] = DetrModel

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.model = self.base_class(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels + 1)
        self.bbox_predictor = PredictionMLP(config.d_model, config.d_model, 4, num_layers=3)
        self.post_init()

    def predict(self, states: Tensor, features: DetrModelOutput) -> tuple[Tensor, Tensor]:
        """Class logits, no-object last, and boxes; see :meth:`ObjectDetectionModel.predict`."""
        return self.class_labels_classifier(states), self.bbox_predictor(states).sigmoid()


class DetrForSegmentation(DetrPreTrainedModel, SegmentationModel):
    """DETR with a mask for each query: panoptic segmentation."""

    detector_class = DetrForObjectDetection
    detector_prefix = "detr."

    def object_scores(self, logits: Tensor) -> Tensor:
        """Softmax probability of each query's best class, no-object left aside."""
        return logits.softmax(-1)[..., :-1].amax(-1)
