"""What the models return; the field names are those of Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers.utils import ModelOutput

_Tensor: TypeAlias = torch.Tensor | None
_OfEachLayer: TypeAlias = tuple[torch.Tensor, ...] | None


@dataclass
class EncoderOutput(ModelOutput):
    """Output of an encoder.

    Attributes:
        last_hidden_state: (batch, height x width, d_model).
        hidden_states: The input of every layer and the output of the last, on request.
        attentions: Per layer (batch, heads, height x width, height x width), on request.
        sampling_locations: Of Deformable DETR, whose ``attentions`` are the samples' weights. Per layer
            (batch, pixels, heads, levels, points, 2), x then y, relative to each padded level.
    """

    last_hidden_state: _Tensor = None
    hidden_states: _OfEachLayer = None
    attentions: _OfEachLayer = None
    sampling_locations: _OfEachLayer = None


@dataclass
class DecoderOutput(ModelOutput):
    """Output of a decoder.

    Attributes:
        last_hidden_state: (batch, queries, d_model), normalised.
        hidden_states: The input of every layer and the last hidden state, on request.
        attentions: Self-attention per layer (batch, heads, queries, queries), on request.
        cross_attentions: Cross-attention per layer (batch, heads, queries, height x width), on request.
        intermediate_hidden_states: (layers, batch, queries, d_model), normalised, for auxiliary outputs.
        reference_points: (queries, batch, 2) float32, x and y, normalised: where the queries of Conditional
            DETR look; queries come first, as in Transformers.
        intermediate_reference_points: Of Deformable DETR, as in :class:`DeformableDetrModelOutput`; so are
            its ``intermediate_hidden_states``.
        sampling_locations: Of Deformable DETR's cross-attention, as in :class:`EncoderOutput`.
    """

    last_hidden_state: _Tensor = None
    hidden_states: _OfEachLayer = None
    attentions: _OfEachLayer = None
    cross_attentions: _OfEachLayer = None
    intermediate_hidden_states: _Tensor = None
    reference_points: _Tensor = None
    intermediate_reference_points: _Tensor = None
    sampling_locations: _OfEachLayer = None


@dataclass
class DetrModelOutput(ModelOutput):
    """Output of a model without heads; fields as in :class:`EncoderOutput` and :class:`DecoderOutput`."""

    last_hidden_state: _Tensor = None
    decoder_hidden_states: _OfEachLayer = None
    decoder_attentions: _OfEachLayer = None
    cross_attentions: _OfEachLayer = None
    encoder_last_hidden_state: _Tensor = None
    encoder_hidden_states: _OfEachLayer = None
    encoder_attentions: _OfEachLayer = None
    intermediate_hidden_states: _Tensor = None
    reference_points: _Tensor = None


@dataclass
class ObjectDetectionOutput(ModelOutput):
    """Output of a detector.

    Attributes:
        loss: Weighted sum of all loss terms, when labels are given.
        loss_dict: The terms by name, unweighted, when labels are given.
        logits: (batch, queries, classes), for DETR with the no-object class last.
        pred_boxes: (batch, queries, 4), cxcywh, normalised by the size of each unpadded image.
        auxiliary_outputs: ``logits`` and ``pred_boxes`` of each decoder layer but the last.
        last_hidden_state: (batch, queries, d_model); the other fields as in :class:`DetrModelOutput`.
    """

    loss: _Tensor = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: _Tensor = None
    pred_boxes: _Tensor = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: _Tensor = None
    decoder_hidden_states: _OfEachLayer = None
    decoder_attentions: _OfEachLayer = None
    cross_attentions: _OfEachLayer = None
    encoder_last_hidden_state: _Tensor = None
    encoder_hidden_states: _OfEachLayer = None
    encoder_attentions: _OfEachLayer = None


@dataclass
class SegmentationOutput(ObjectDetectionOutput):
    """Output of a panoptic model: also the fields of :class:`ObjectDetectionOutput`.

    Attributes:
        pred_masks: (batch, queries, height, width) mask logits at the stride of the backbone's finest feature
            map, over the padded batch. None from a training step, which computes matched masks only.
        query_indices: (batch, queries), of ``segment`` only: which of the model's queries each row is.
    """

    pred_masks: _Tensor = None
    query_indices: _Tensor = None


@dataclass
class DeformableDetrModelOutput(ModelOutput):
    """Output of Deformable DETR without heads; the other fields as in :class:`DetrModelOutput`.

    Attributes:
        init_reference_points: (batch, queries, 2 or 4) float32, points or cxcywh boxes that the decoder
            starts from, normalised.
        intermediate_hidden_states: (batch, layers, queries, d_model).
        intermediate_reference_points: (batch, layers, queries, 2 or 4) float32, what each layer leaves to the
            next: refined boxes, or what it started from.
        cross_attentions: Weights of the samples, per layer (batch, queries, heads, levels, points).
        enc_outputs_class: Of a two-stage model, class logits of all pixels (batch, pixels, classes).
        enc_outputs_coord_logits: Their boxes (batch, pixels, 4) before the sigmoid, float32; infinite where a
            pixel proposes nothing.
        cross_sampling_locations: As in :class:`EncoderOutput`; ``encoder_sampling_locations`` too.
    """

    init_reference_points: _Tensor = None
    last_hidden_state: _Tensor = None
    intermediate_hidden_states: _Tensor = None
    intermediate_reference_points: _Tensor = None
    decoder_hidden_states: _OfEachLayer = None
    decoder_attentions: _OfEachLayer = None
    cross_attentions: _OfEachLayer = None
    encoder_last_hidden_state: _Tensor = None
    encoder_hidden_states: _OfEachLayer = None
    encoder_attentions: _OfEachLayer = None
    enc_outputs_class: _Tensor = None
    enc_outputs_coord_logits: _Tensor = None
    cross_sampling_locations: _OfEachLayer = None
    encoder_sampling_locations: _OfEachLayer = None


@dataclass
class DeformableDetrObjectDetectionOutput(ObjectDetectionOutput):
    """Output of a Deformable DETR detector: also the fields of :class:`DeformableDetrModelOutput`."""

    init_reference_points: _Tensor = None
    intermediate_hidden_states: _Tensor = None
    intermediate_reference_points: _Tensor = None
    enc_outputs_class: _Tensor = None
    enc_outputs_coord_logits: _Tensor = None
    cross_sampling_locations: _OfEachLayer = None
    encoder_sampling_locations: _OfEachLayer = None
