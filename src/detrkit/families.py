"""The families of detectors. Everything that depends on a family asks its entry in ``FAMILIES``.

A family is a folder under ``models/`` and an entry here. The entry holds text only, so importing this module
imports neither torch nor Transformers; classes are imported by :meth:`Family.load` when they are needed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from detrkit.common.errors import CheckpointError, SettingError
from detrkit.common.schema import JsonObject
from detrkit.common.text import did_you_mean

if TYPE_CHECKING:
    from detrkit.models.original import OriginalLayout


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The paper that introduced a family.

    Attributes:
        key: BibTeX key.
        title: Title.
        authors: As BibTeX writes them.
        venue: Conference.
        year: Year of the conference.
        url: Address of the paper.
    """

    key: str
    title: str
    authors: str
    venue: str
    year: int
    url: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one family has of its own, apart from its network.

    The modules of the family's package are named after the package: ``configuration_<name>``,
    ``modeling_<name>``, ``image_processing_<name>`` and ``original_<name>``.

    Attributes:
        model_type: As ``config.json`` has it.
        title: Name in a sentence.
        package: Package of the family.
        class_prefix: What the names of the family's classes begin with, such as "Detr".
        class_scores: "softmax" over the classes and no-object, or a "sigmoid" for each class.
        has_masks: Whether there is a ``...ForSegmentation`` model.
        multi_scale: Whether the encoder can attend to several feature maps.
        processor_of: ``model_type`` of the family whose image processor this one uses; by default its own.
        learning_rate: The original's, for everything but the backbone.
        backbone_factor: Learning rate of the backbone, relative to the others.
        paper: Where the family was published.
        repository: Address of the original implementation.
        description: How the model works, for model cards.
        drawing: Address of a drawing of the architecture, for model cards.
        published_training: How the released checkpoints were trained, for model cards.
        published_mask_training: How those with masks were trained.
        licence: Of the released checkpoints, as the Hub calls it.
    """

    model_type: str
    title: str
    package: str
    class_prefix: str
    class_scores: Literal["softmax", "sigmoid"]
    has_masks: bool = False
    multi_scale: bool = False
    processor_of: str | None = None
    learning_rate: float = 1e-4
    backbone_factor: float = 0.1
    paper: Paper
    repository: str
    description: str
    published_training: str
    drawing: str = ""
    published_mask_training: str = ""
    licence: str = "apache-2.0"

    @property
    def option_name(self) -> str:
        """Name on the command line and in the tags of the Hub, such as "conditional-detr"."""
        return self.model_type.replace("_", "-")

    @property
    def config(self) -> str:
        """Name of the configuration class."""
        return f"{self.class_prefix}Config"

    @property
    def detector(self) -> str:
        """Name of the model class that finds boxes."""
        return f"{self.class_prefix}ForObjectDetection"

    @property
    def segmenter(self) -> str | None:
        """Name of the model class that finds boxes and masks, if the family has one."""
        return f"{self.class_prefix}ForSegmentation" if self.has_masks else None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the model classes: without heads, for boxes and, if there is one, for boxes and masks."""
        return f"{self.class_prefix}Model", self.detector, *filter(None, [self.segmenter])

    @property
    def processor(self) -> str:
        """Name of the image processor class."""
        return f"{self._processor_family.class_prefix}ImageProcessor"

    @property
    def processor_aliases(self) -> tuple[str, ...]:
        """Other names of the image processor that ``preprocessor_config.json`` files on the Hub carry."""
        prefix = self._processor_family.class_prefix
        return f"{prefix}ImageProcessorFast", f"{prefix}ImageProcessorPil", f"{prefix}FeatureExtractor"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes."""
        return (self.config, *self.models, self.processor, *self.processor_aliases)

    @property
    def original(self) -> OriginalLayout:
        """What the tensors of the original implementation's checkpoints are called."""
        layout: OriginalLayout = self._module("original").ORIGINAL
        return layout

    def load(self, name: str) -> Any:
        """The class called ``name``, from the module of the family that defines it."""
        if name in (self.processor, *self.processor_aliases):
            return getattr(self._processor_family._module("image_processing"), name)
        return getattr(self._module("configuration" if name == self.config else "modeling"), name)

    def load_model_class(self, masks: bool) -> Any:
        """The class of the model that finds boxes, or boxes and masks.

        Raises:
            SettingError: The family has no model with masks.
        """
        if not masks:
            return self.load(self.detector)
        if self.segmenter is None:
            able = " or ".join(family.title for family in FAMILIES.values() if family.has_masks)
            raise SettingError(f"{self.title} has no models with masks; use {able}")
        return self.load(self.segmenter)

    @property
    def _processor_family(self) -> Family:
        return FAMILIES[self.processor_of] if self.processor_of else self

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"{self.package}.{kind}_{self.package.rpartition('.')[2]}")


_DRAWINGS = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main"

_FAMILIES = (
    Family(
        model_type="detr",
        title="DETR",
        package="detrkit.models.detr",
        class_prefix="Detr",
        class_scores="softmax",
        has_masks=True,
        paper=Paper(
            key="carion2020detr",
            title="End-to-End Object Detection with Transformers",
            authors="Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas and "
            "Kirillov, Alexander and Zagoruyko, Sergey",
            venue="European Conference on Computer Vision",
            year=2020,
            url="https://arxiv.org/abs/2005.12872",
        ),
        repository="https://github.com/facebookresearch/detr",
        description="""\
DETR predicts all objects of an image at once, as a set. A convolutional backbone computes a feature map.
In a Transformer encoder, every position of the map attends to every other. A decoder turns a fixed number
of learned *object queries* into the same number of predictions: each is a box with a class, or *no
object*. During training, a bipartite matching assigns every annotated object to one query, so the model
learns to detect each object once. It needs neither anchors nor non-maximum suppression.""",
        drawing=f"{_DRAWINGS}/detr_architecture.png",
        published_training="""\
AdamW with a learning rate of 1e-4 (backbone 1e-5) and weight decay 1e-4, gradients clipped to a norm of
0.1, dropout 0.1. The loss adds the cross-entropy of the classes, 5 times the L1 distance and 2 times the
generalised IoU of the boxes, after every decoder layer; *no object* has a tenth of the weight of a class.
The published numbers are those of 500 epochs. For a shorter schedule of 300 epochs, the authors report
three days on 16 V100 GPUs with batches of 64 images.""",
        published_mask_training="""\
First the detector, on the boxes of things and stuff: AdamW with a learning rate of 1e-4 (backbone 1e-5)
and weight decay 1e-4, gradients clipped to a norm of 0.1, dropout 0.1. The loss adds the cross-entropy of
the classes, 5 times the L1 distance and 2 times the generalised IoU of the boxes, after every decoder
layer; *no object* has a tenth of the weight of a class. Then the mask head on the frozen detector, with a
focal loss and a Dice loss of the masks. The number of epochs of this checkpoint was not published.""",
    ),
    Family(
        model_type="conditional_detr",
        title="Conditional DETR",
        package="detrkit.models.conditional_detr",
        class_prefix="ConditionalDetr",
        class_scores="sigmoid",
        has_masks=True,
        paper=Paper(
            key="meng2021conditional",
            title="Conditional DETR for Fast Training Convergence",
            authors="Meng, Depu and Chen, Xiaokang and Fan, Zejia and Zeng, Gang and Li, Houqiang and "
            "Yuan, Yuhui and Sun, Lei and Wang, Jingdong",
            venue="IEEE/CVF International Conference on Computer Vision",
            year=2021,
            url="https://arxiv.org/abs/2108.06152",
        ),
        repository="https://github.com/Atten4Vis/ConditionalDETR",
        description="""\
Conditional DETR is DETR with a different cross-attention in the decoder. A query attends to content and to
position separately. The position is computed from the decoder's state and a reference point of the query,
so each head can attend to a narrow part of an object, such as one edge of its box. Training takes a tenth
of DETR's epochs. Each class has its own sigmoid and is trained with the focal loss.""",
        drawing=f"{_DRAWINGS}/detr_architecture.png",
        published_training="""\
50 epochs with AdamW and a learning rate of 1e-4 (backbone 1e-5), divided by ten after 40 epochs. The loss
adds 2 times the focal loss of the classes (alpha 0.25), 5 times the L1 distance and 2 times the
generalised IoU of the boxes, after every decoder layer.""",
    ),
    Family(
        model_type="deformable_detr",
        title="Deformable DETR",
        package="detrkit.models.deformable_detr",
        class_prefix="DeformableDetr",
        class_scores="sigmoid",
        multi_scale=True,
        learning_rate=2e-4,
        paper=Paper(
            key="zhu2021deformable",
            title="Deformable DETR: Deformable Transformers for End-to-End Object Detection",
            authors="Zhu, Xizhou and Su, Weijie and Lu, Lewei and Li, Bin and Wang, Xiaogang and Dai, Jifeng",
            venue="International Conference on Learning Representations",
            year=2021,
            url="https://arxiv.org/abs/2010.04159",
        ),
        repository="https://github.com/fundamentalvision/Deformable-DETR",
        description="""\
Deformable DETR replaces attention over all positions by *deformable attention*: a query samples a few
points around a reference point, and the model learns to predict their offsets and weights. The cost grows
linearly with the number of pixels instead of with its square, and training takes a tenth of DETR's epochs.
Each class has its own sigmoid and is trained with the focal loss.""",
        drawing=f"{_DRAWINGS}/deformable_detr_architecture.png",
        published_training="""\
50 epochs with batches of 32 images: AdamW with a learning rate of 2e-4 (backbone, sampling offsets and
reference points 2e-5), divided by ten after 40 epochs, gradients clipped to a norm of 0.1. The loss adds 2
times the focal loss of the classes (alpha 0.25), 5 times the L1 distance and 2 times the generalised IoU
of the boxes, after every decoder layer.""",
    ),
    Family(
        model_type="table-transformer",
        title="Table Transformer",
        package="detrkit.models.table_transformer",
        class_prefix="TableTransformer",
        class_scores="softmax",
        processor_of="detr",
        learning_rate=5e-5,
        backbone_factor=0.2,
        licence="mit",
        paper=Paper(
            key="smock2022pubtables",
            title="PubTables-1M: Towards Comprehensive Table Extraction from Unstructured Documents",
            authors="Smock, Brandon and Pesala, Rohith and Abraham, Robin",
            venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
            year=2022,
            url="https://arxiv.org/abs/2110.00061",
        ),
        repository="https://github.com/microsoft/table-transformer",
        description="""\
Table Transformer is DETR for documents: one model detects tables in pages, another one detects rows,
columns, headers and spanning cells in the image of a table. A convolutional backbone computes a feature
map. In a Transformer encoder, every position of the map attends to every other. A decoder turns a fixed
number of learned *object queries* into the same number of predictions: each is a box with a class, or *no
object*. Its layers are *pre-norm*: each attention and feed-forward part normalises its input instead of
its output, and the encoder ends with a norm.""",
        drawing=f"{_DRAWINGS}/detr_architecture.png",
        published_training="""\
20 epochs of batches of 2 images: AdamW with a learning rate of 5e-5 (backbone 1e-5), which falls by a
tenth after each epoch, and weight decay 1e-4, gradients clipped to a norm of 0.1, dropout 0.1. The loss
adds the cross-entropy of the classes, 5 times the L1 distance and 2 times the generalised IoU of the
boxes, after the last decoder layer only; *no object* has 0.4 of the weight of a class.""",
    ),
)

#: Every family by its ``model_type``.
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}


def has_masks(config: JsonObject) -> bool | None:
    """Whether a config.json is that of a model with masks; None if it does not name the model's class."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures[:100]):
        return None
    return any("Segmentation" in architecture for architecture in architectures)


def family_of(model_type: str | None, where: str) -> Family:
    """The family of a ``model_type``.

    Args:
        model_type: As a config.json has it.
        where: Name of the model, for the message.

    Raises:
        CheckpointError: No family of detrkit has this ``model_type``.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    found = f"is a {model_type!r} model" if model_type else "has no model_type in its config.json"
    hint = did_you_mean(model_type or "", FAMILIES)
    raise CheckpointError(f"{where} {found}; this version of detrkit has {', '.join(FAMILIES)}{hint}")
