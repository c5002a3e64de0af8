"""Small models: a ResNet of unusual widths, two layers, twelve queries.

``TinyFamily`` makes them in memory with random values everywhere, for tests of the networks. It also saves
detectors with scores all over [0, 1], for tests of what is done with detections.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ResNetConfig

import detrkit
from detrkit import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
    ConditionalDetrModel,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrModel,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrModel,
    TableTransformerConfig,
    TableTransformerForObjectDetection,
    TableTransformerModel,
)
from detrkit.families import family_of

TINY_NAMES = {0: "N/A", 1: "cat", 2: "remote", 3: "couch"}


def tiny_resnet(**options) -> ResNetConfig:
    settings = {
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 1, 2, 2],
        "layer_type": "bottleneck",
        "out_features": ["stage2", "stage3", "stage4"],
    }
    return ResNetConfig(**{**settings, **options})


def tiny_config(config_class=DetrConfig, **options):
    settings = {
        "backbone_config": tiny_resnet(),
        "use_timm_backbone": False,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 8,
        "num_queries": 12,
        "num_labels": 5,
    }
    return config_class(**{**settings, **options})


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere, norms' statistics included, so that nothing is equal by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise + 0.5)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(noise * 0.5 + 0.75)
            elif tensor.ndim == 1:
                tensor.copy_(noise * 0.2 - 0.1)
            else:
                tensor.copy_((noise - 0.5) * 2 * (3 / tensor[0].numel()) ** 0.5)
    return model


@torch.no_grad()
def spread_scores(whole: torch.nn.Module) -> None:
    """Makes queries and class head far larger than at initialisation.

    Queries then find different things with scores all over [0, 1], and masks that differ.
    """
    model = getattr(whole, "detector", whole)
    if hasattr(model, "bbox_embed"):
        for head in model.class_embed:
            head.weight.normal_(std=0.7)
            head.bias.zero_()
        for head in model.bbox_embed:
            head.layers[-1].reset_parameters()
    else:
        model.model.query_position_embeddings.weight.normal_(std=30)
        model.class_labels_classifier.weight.normal_(std=0.7)
        model.class_labels_classifier.bias.zero_()
    if hasattr(model.model.decoder, "ref_point_head"):
        # Reference points all over the image, and boxes of different sizes around them.
        model.model.decoder.ref_point_head.layers[-1].weight /= 30
        model.bbox_predictor.layers[-1].reset_parameters()
    if whole is not model:
        whole.bbox_attention.q_linear.weight *= 20
        whole.mask_head.lay1.weight[:, model.config.d_model :] *= 100
        whole.mask_head.out_lay.weight *= 30


@dataclass(frozen=True)
class TinyFamily:
    """The classes of a family, of detrkit and of Transformers, and tiny models of them.

    Attributes:
        segmentation_class: The detector with a mask head, of families that have one.
        options: What the configuration has beyond that of any other tiny model.
        stages: Those of the backbone that files of the Hub name.
        levels: (height, width) of the feature maps that the model attends to in ``padded_batch``.
        points: Samples of a head in each level, for a model that does not attend to every pixel.
        model_fields: What the bare model returns.
        detector_fields: What the detector returns beyond what all do, its attentions asked for.
        loss_terms: Terms of the loss beyond those that all have.
    """

    config_class: type
    base_class: type
    detector_class: type
    segmentation_class: type | None = None
    no_object_classes: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = (1, 2, 3, 4)
    levels: tuple[tuple[int, int], ...] = ((4, 5),)
    points: int | None = None
    model_fields: tuple[str, ...] = ("last_hidden_state", "encoder_last_hidden_state")
    detector_fields: tuple[str, ...] = ()
    loss_terms: tuple[str, ...] = ()

    @property
    def encoded(self) -> int:
        """Length of the encoder's sequence for ``padded_batch``."""
        return sum(height * width for height, width in self.levels)

    @property
    def proposes(self) -> bool:
        """Whether the queries are the encoder's proposals: the bare model does not run without heads."""
        return self.options.get("two_stage", False)

    def image_attention(self, heads: int, queries: int) -> tuple[int, ...]:
        """Shape of the weights of an attention to the images of ``padded_batch``."""
        if self.points is None:
            return (2, heads, queries, self.encoded)
        return (2, queries, heads, len(self.levels), self.points)

    def padding(self, mask: torch.Tensor) -> torch.Tensor:
        """Which places of the encoder's sequence are padded, for the mask of ``padded_batch``."""
        small = [torch.nn.functional.interpolate(mask[None].float(), size=size)[0] for size in self.levels]
        return torch.cat([level.flatten(1) for level in small], dim=1) == 0

    def config(self, **options):
        return tiny_config(self.config_class, **{**self.options, **options})

    def base(self, **options):
        return shake(self.base_class(self.config(**options))).eval()

    def detector(self, **options):
        return shake(self.detector_class(self.config(**options))).eval()

    def segmenter(self, **options):
        config = self.config(**{"encoder_attention_heads": 8, **options})  # heads of masks share its channels
        return shake(self.segmentation_class(config)).eval()

    def save(self, folder: Path, masks: bool = False) -> Path:
        """Saves a detector of three named classes, and an image processor that makes images small.

        Args:
            folder: Where to.
            masks: Whether to give it a mask head; the couch is stuff then, the other classes are things.
        """
        torch.manual_seed(0)
        config = self.config(
            backbone_config=tiny_resnet(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic"),
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=8 if masks else 4,
            decoder_attention_heads=4,
            num_labels=len(TINY_NAMES),
            id2label=TINY_NAMES,
            label2id={name: label for label, name in TINY_NAMES.items()},
        )
        model = (self.segmentation_class if masks else self.detector_class)(config).eval()
        spread_scores(model)
        model.save_pretrained(folder)
        processor_class = getattr(detrkit, family_of(config.model_type, "the tiny model").processor)
        things = {"is_thing_map": {1: True, 2: True, 3: False}} if masks else {}
        processor_class(size={"shortest_edge": 64, "longest_edge": 107}, **things).save_pretrained(folder)
        return folder

    def outputs(self, num_labels: int = 5) -> int:
        """Outputs of the class head."""
        return num_labels + self.no_object_classes

    @property
    def transformers_config_class(self):
        return getattr(transformers, self.config_class.__name__)

    @property
    def transformers_detector_class(self):
        return getattr(transformers, self.detector_class.__name__)

    def transformers_detector(self, **options):
        config = self.transformers_config_class(**self.config(**options).to_dict())
        return shake(self.transformers_detector_class(config)).eval()


_LEVELS = ((16, 20), (8, 10), (4, 5), (2, 3))
_REFERENCES = ("init_reference_points", "intermediate_hidden_states", "intermediate_reference_points")
_SAMPLED = ("cross_sampling_locations", "encoder_sampling_locations")

FAMILIES = {
    "detr": TinyFamily(
        DetrConfig, DetrModel, DetrForObjectDetection, DetrForSegmentation, no_object_classes=1
    ),
    "conditional_detr": TinyFamily(
        ConditionalDetrConfig,
        ConditionalDetrModel,
        ConditionalDetrForObjectDetection,
        ConditionalDetrForSegmentation,
        model_fields=("last_hidden_state", "encoder_last_hidden_state", "reference_points"),
    ),
    "deformable_detr": TinyFamily(
        DeformableDetrConfig,
        DeformableDetrModel,
        DeformableDetrForObjectDetection,
        stages=(2, 3, 4),
        levels=_LEVELS,
        points=4,
        model_fields=(
            "init_reference_points",
            "last_hidden_state",
            "intermediate_hidden_states",
            "intermediate_reference_points",
            "encoder_last_hidden_state",
        ),
        detector_fields=(*_REFERENCES, *_SAMPLED),
    ),
    "deformable_detr_two_stage": TinyFamily(
        DeformableDetrConfig,
        DeformableDetrModel,
        DeformableDetrForObjectDetection,
        options={"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 12},
        stages=(2, 3, 4),
        levels=_LEVELS,
        points=4,
        detector_fields=(*_REFERENCES, "enc_outputs_class", "enc_outputs_coord_logits", *_SAMPLED),
        loss_terms=("loss_ce_enc", "loss_bbox_enc", "loss_giou_enc", "cardinality_error_enc"),
    ),
    "table_transformer": TinyFamily(
        TableTransformerConfig, TableTransformerModel, TableTransformerForObjectDetection, no_object_classes=1
    ),
}


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, the second one smaller and padded: pixel values (2, 3, 128, 160) and mask."""
    pixels = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 128, 160, dtype=torch.long)
    mask[1, 90:] = 0
    mask[1, :, 100:] = 0
    return pixels * mask[:, None], mask


def some_labels(batch: int = 2, num_labels: int = 5) -> list[dict[str, torch.Tensor]]:
    """Three objects in each image but the last, which has none when there is more than one."""
    generator = torch.Generator().manual_seed(2)
    labels = []
    for i in range(batch):
        count = 0 if batch > 1 and i == batch - 1 else 3
        labels.append(
            {
                "class_labels": torch.randint(num_labels, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
            }
        )
    return labels
