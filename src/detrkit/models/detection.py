"""What detectors share: from images to the decoder's states, and from those to detections and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import isqrt
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING

from detrkit.common.errors import SettingError
from detrkit.common.schema import Target
from detrkit.losses.criterion import MatchedMasks, detection_loss, proposal_loss
from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.label_masks import mask_from_labels
from detrkit.models.layers.attention import key_mask
from detrkit.models.layers.backbone import Backbone, downsample_mask
from detrkit.models.layers.plain import rows
from detrkit.models.layers.transformer import Encoder
from detrkit.models.outputs import DetrModelOutput, EncoderOutput, ObjectDetectionOutput

# A loss in the form of Transformers: called with logits, labels, device, boxes, masks if there are some,
# configuration, and logits and boxes of all layers; returns loss, terms and auxiliary outputs.
LossFunction: TypeAlias = Callable[..., tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]]


class EncoderDecoderModel(DetrFamilyPreTrainedModel):
    """A model without heads: from images to the decoder's states."""

    backbone: Backbone
    run: Callable[..., DetrModelOutput]  # what ``forward`` returns, of its arguments by name

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
        """Runs the model; the arguments are those of :meth:`ModelWithHeads.forward`, without the labels.

        Raises:
            ValueError: There is neither an image nor a substitute, or shapes do not fit.
        """
        output = self.run(
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            pixel_mask=pixel_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_attention_mask=decoder_attention_mask,
            **wanted_outputs(self.config, output_attentions, output_hidden_states),
        )
        return output if wants_dict(return_dict, self.config) else output.to_tuple()


class SingleScaleModel(EncoderDecoderModel):
    """Backbone, encoder over its last feature map, and decoder, without heads."""

    decoder_class: ClassVar[type[nn.Module]]  # called as DETR's is

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.input_projection = nn.Conv2d(self.backbone.intermediate_channel_sizes[-1], config.d_model, 1)
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = self.decoder_class(config)
        self.post_init()

    def run(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        **options: Any,
    ) -> DetrModelOutput:
        """See :meth:`EncoderDecoderModel.forward`."""
        return self.transform(*self._feature_map(pixel_values, pixel_mask, inputs_embeds), **options)

    def transform(
        self,
        feature_map: Tensor,
        mask: Tensor | None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutput | tuple[Tensor, ...] | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DetrModelOutput:
        """Encodes a feature map (batch, d_model, height, width) and decodes the queries.

        ``mask`` (batch, height, width) is True where pixels are real, None when nothing is padded. The other
        arguments are those of ``forward``.
        """
        config = self.config
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
            rows(self.query_position_embeddings, config.num_queries),
            memory,
            positions,
            query_mask=key_mask(decoder_attention_mask),
            memory_mask=memory_mask,
            intermediate=config.auxiliary_loss or self.training,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return DetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            reference_points=decoded.reference_points,
        )

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
            feature_map = inputs_embeds.transpose(1, 2).unflatten(2, (side, side))
            return feature_map, downsample_mask(pixel_mask, (side, side))
        if pixel_values is None:
            raise ValueError("pass pixel_values (an image batch) or inputs_embeds")
        pixel_values, pixel_mask = self.backbone.long_enough(pixel_values, pixel_mask)
        feature_map = self.input_projection(self.backbone(pixel_values)[-1])
        return feature_map, downsample_mask(pixel_mask, feature_map.shape[-2:])


class ModelWithHeads(DetrFamilyPreTrainedModel):
    """A base model with heads for classes and boxes, and a loss if labels are passed."""

    run: Callable[..., ObjectDetectionOutput]  # what ``forward`` returns, of its arguments by name
    loss_type: str

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__(config)
        self._own_loss_type = self.loss_type  # which Transformers derives from the name of the class
        self.loss_type = getattr(config, "loss_type", None) or self.loss_type

    @property
    def loss_function(self) -> LossFunction:
        """The function that computes the loss if labels are passed; can be set, as in Transformers.

        By default it is the original's criterion. A function that is set is called with ``logits``,
        ``labels``, ``device``, ``pred_boxes``, for a model with masks ``pred_masks``, ``config``, and logits
        and boxes of all layers (layers, batch, queries, ...). It returns the loss, a dict of its terms, and
        auxiliary outputs or None. Setting ``loss_type``, here or in the configuration, to the name of another
        of Transformers' losses has the same effect.

        Raises:
            SettingError: Transformers has no loss of the name ``loss_type``.
        """
        return self.custom_loss or self.criterion

    @loss_function.setter
    def loss_function(self, value: LossFunction | None) -> None:
        self._loss_function = value

    def criterion(
        self,
        logits: Tensor,
        labels: list[Target],
        device: torch.device,
        pred_boxes: Tensor,
        config: DetrFamilyConfig,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        pred_masks: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, dict[str, Tensor], None]:
        """The original's criterion in the form of ``loss_function``, without the loss of proposals."""
        all_logits = logits[None] if outputs_class is None else outputs_class
        all_boxes = pred_boxes[None] if outputs_coord is None else outputs_coord
        masks = pred_masks
        predict_masks = None if masks is None else lambda image, query: masks[image, query]
        return *detection_loss(all_logits, all_boxes, labels, config, predict_masks), None

    @property
    def custom_loss(self) -> LossFunction | None:
        """The loss that takes the place of the original's criterion; None for the criterion."""
        function: LossFunction | None = getattr(self, "_loss_function", None)
        if function is not None or self.loss_type == self._own_loss_type:
            return function
        if self.loss_type not in LOSS_MAPPING:
            raise SettingError(
                f"loss_type is {self.loss_type!r}, which Transformers does not have; set it to "
                f"{self._own_loss_type!r} for the original's loss, or set model.loss_function"
            )
        return LOSS_MAPPING[self.loss_type]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: list[Target] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ObjectDetectionOutput | tuple:
        """Detects objects, and segments them where the model has masks.

        A training step of a segmentation model (training mode, with labels) runs the mask head for matched
        queries only, as the loss does not see the others, and gives no ``pred_masks``.

        Args:
            pixel_values: (batch, channels, height, width) normalised images.
            pixel_mask: (batch, height, width), nonzero where pixels are real; None when nothing is padded,
                or when there are labels to make it from, by their ``size``.
            decoder_attention_mask: (batch, queries), nonzero for queries that may be attended to.
            encoder_outputs: What the encoder returned before, to skip it.
            inputs_embeds: (batch, side x side, d_model) instead of the projected feature map of an image; not
                for Deformable DETR and models with masks, which need several maps.
            decoder_inputs_embeds: (batch, queries, d_model) instead of zeros or the queries' own content.
            labels: One dict an image with ``class_labels`` (objects,) and ``boxes`` (objects, 4) as
                normalised cxcywh of the unpadded image, for models with masks also ``masks`` (objects,
                height, width) padded as the images are; gives ``loss`` and ``loss_dict``.
            output_attentions: Return attention weights, for Deformable DETR sampling locations too (spells
                other attention out, which is slower).
            output_hidden_states: Return the states between layers.
            return_dict: Return the model's output class (default) or a tuple of its fields that are set.

        Raises:
            ValueError: There is neither an image nor a substitute, shapes do not fit, or labels lack masks.
            FloatingPointError: With labels, a prediction or target is not finite.
        """
        if labels is not None and pixel_mask is None and pixel_values is not None:
            pixel_mask = mask_from_labels(pixel_values, labels)
        output = self.run(
            labels=labels,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            pixel_mask=pixel_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_attention_mask=decoder_attention_mask,
            **wanted_outputs(self.config, output_attentions, output_hidden_states),
        )
        return output if wants_dict(return_dict, self.config) else output.to_tuple()


class ObjectDetectionModel(ModelWithHeads):
    """A base model ``self.model`` with heads for classes and boxes, which a family reads in ``predict``.

    Attributes:
        output_class: What ``forward`` returns; fields that the base model's output has too are taken from it.
        head_lists: Attributes with a head for each decoder layer, or one for all, and then for proposals.
    """

    output_class: ClassVar[type[ObjectDetectionOutput]] = ObjectDetectionOutput
    head_lists: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__(config)
        # Here and not in ``forward``, where torch.compile would stumble over it.
        self._output_fields = frozenset(field.name for field in fields(self.output_class))

    def predict(self, states: Tensor, features: DetrModelOutput) -> tuple[Tensor, Tensor]:
        """Reads classes and boxes off decoder states.

        Args:
            states: (layers, batch, queries, d_model), normalised; all layers, or only the last one.
            features: The base model's output that the states are from.

        Returns:
            Class logits (layers, batch, queries, classes), and boxes (layers, batch, queries, 4), cxcywh,
            normalised.
        """
        raise NotImplementedError

    def run(self, labels: list[Target] | None, **inputs: Any) -> ObjectDetectionOutput:
        """See :meth:`ModelWithHeads.forward`."""
        features = self.model(**inputs, return_dict=True)
        return self.output_class(**self.read(features, labels, custom_loss=self.custom_loss))

    @torch.no_grad()
    def predict_layers(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the heads read off the state that each decoder layer leaves.

        Args:
            pixel_values: As for ``forward``.
            pixel_mask: As for ``forward``.

        Returns:
            ``logits`` (layers, batch, queries, classes) and ``pred_boxes`` (layers, batch, queries, 4); the
            last layer's are those of ``forward``, bit by bit.
        """
        features = self.model(
            pixel_values=pixel_values, pixel_mask=pixel_mask, output_hidden_states=True, return_dict=True
        )
        last = self.read(features)
        earlier = self.predict(self.states_of_layers(features), features)
        # With the states of all layers, a product of matrices may round otherwise than with those of one.
        return {
            name: torch.cat([layers[:-1], last[name][None]])
            for name, layers in zip(("logits", "pred_boxes"), earlier)
        }

    def keep_decoder_layers(self, count: int) -> None:
        """Leaves out the decoder layers after the first ones, in place: an early exit.

        Auxiliary losses teach the heads to read every layer's state, so the model then gives what
        :meth:`predict_layers` gives of the last layer that is kept.

        Args:
            count: How many to keep.

        Raises:
            SettingError: The model does not have so many.
        """
        layers = self.model.decoder.layers
        if not 1 <= count <= len(layers):
            raise SettingError(f"the model has {len(layers)} decoder layers; keep 1 or more, not {count}")
        self.model.decoder.layers = layers[:count]
        self.config.decoder_layers = count
        for name in self.head_lists:
            heads = getattr(self, name)
            setattr(self, name, heads[:count].extend(heads[len(layers) :]))

    def states_of_layers(self, features: DetrModelOutput) -> Tensor:
        """All layers' states (layers, batch, queries, d_model), of an output that has its hidden states."""
        earlier = map(self.model.decoder.layernorm, features["decoder_hidden_states"][1:-1])
        return torch.stack([*earlier, features["last_hidden_state"]])

    def states_to_read(self, features: DetrModelOutput) -> Tensor:
        """The decoder states (layers, batch, queries, d_model) to read: of all layers, or the last one."""
        states: Tensor | None = features.intermediate_hidden_states
        return features["last_hidden_state"][None] if states is None else states

    def read(
        self,
        features: DetrModelOutput,
        labels: list[Target] | None = None,
        predict_masks: MatchedMasks | None = None,
        custom_loss: LossFunction | None = None,
        masks: Tensor | None = None,
    ) -> dict[str, Any]:
        """The fields of ``output_class``, read off the base model's output; losses if there are labels.

        Args:
            features: The base model's output.
            labels: As in ``forward``.
            predict_masks: As for :func:`detection_loss`.
            custom_loss: Takes the place of the original's criterion.
            masks: The masks of all queries, which a custom loss is given.
        """
        all_logits, all_boxes = self.predict(self.states_to_read(features), features)
        logits, boxes = all_logits[-1], all_boxes[-1]
        earlier = [{"logits": a, "pred_boxes": b} for a, b in zip(all_logits[:-1], all_boxes[:-1])]

        loss, loss_dict, auxiliary = None, None, None
        if labels is not None and custom_loss is not None:
            predictions = (boxes,) if masks is None else (boxes, masks)
            loss, loss_dict, auxiliary = custom_loss(
                logits, labels, logits.device, *predictions, self.config, all_logits, all_boxes
            )
        elif labels is not None:
            loss, loss_dict = detection_loss(all_logits, all_boxes, labels, self.config, predict_masks)
            if features.get("enc_outputs_class") is not None:
                extra, extra_terms = proposal_loss(
                    features.enc_outputs_class,
                    features.enc_outputs_coord_logits.sigmoid(),
                    labels,
                    self.config,
                )
                loss, loss_dict = loss + extra, {**loss_dict, **extra_terms}
        return {
            "loss": loss,
            "loss_dict": loss_dict,
            "logits": logits,
            "pred_boxes": boxes,
            "auxiliary_outputs": auxiliary or (earlier if self.config.auxiliary_loss else None),
            **{name: value for name, value in features.items() if name in self._output_fields},
        }


def wanted_outputs(config: DetrFamilyConfig, attentions: bool | None, states: bool | None) -> dict[str, bool]:
    """Which extras to return: those of a call, or else of the configuration."""
    return {
        "output_attentions": config.output_attentions if attentions is None else attentions,
        "output_hidden_states": config.output_hidden_states if states is None else states,
    }


def wants_dict(return_dict: bool | None, config: DetrFamilyConfig) -> bool:
    """Whether an output is to be returned with names, rather than as a tuple."""
    return config.return_dict if return_dict is None else return_dict
