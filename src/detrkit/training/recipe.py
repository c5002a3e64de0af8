"""All settings of a training run.

The fields of :class:`TrainingRecipe` are the options of ``detrkit train``: the command line is made from
them, with their defaults, limits and help. This module does not import torch.
"""

# ruff: noqa: RUF009 - the calls make fields, not values

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from detrkit.common.errors import SettingError
from detrkit.common.files import atomic_file, read_json
from detrkit.common.text import did_you_mean
from detrkit.families import FAMILIES


def _option(group: str, help: str, *, changes_result: bool = True, **settings: Any) -> Any:
    """A field from which the command line makes an option.

    Args:
        group: The heading of the option in the help.
        help: One or two sentences.
        changes_result: Whether a resumed run must have the same value.
        **settings: ``min`` and ``max`` of the value, and ``default`` or ``default_factory``.
    """
    limits = {name: settings.pop(name, None) for name in ("min", "max")}
    return field(
        metadata={"help": help, "group": group, "changes_result": changes_result, **limits}, **settings
    )


_data, _model, _optimisation, _run = (
    partial(_option, group) for group in ("Data", "Model", "Optimisation", "Run")
)


@dataclass(kw_only=True)
class TrainingRecipe:
    """The settings of a training run. Each field is an option of ``detrkit train`` with the same name.

    The defaults follow the originals: a loss for all decoder layers, AdamW with a lower learning rate for the
    backbone (and in Deformable DETR for sampling offsets and reference points), gradients clipped at 0.1. In
    addition, there is a warm-up, and an average of the weights is evaluated and saved.

    The help text of each field describes it. Paths may be strings.

    Raises:
        SettingError: A value is out of range, or two values contradict each other.
    """

    model: str = _model(
        "Checkpoint to fine-tune: Hub id, folder, or a name from: detrkit models. With --from-scratch, a "
        f"family: {', '.join(family.option_name for family in FAMILIES.values())}."
    )
    data: str | None = _data(
        "Data set in place of the four options below: a YOLO data.yaml, a folder or JSON file of COCO, a "
        "Pascal VOC folder, or a Hugging Face data set.",
        default=None,
        changes_result=False,
    )
    train_images: Path | None = _data("Folder of the training images.", default=None, changes_result=False)
    train_annotations: Path | None = _data(
        "COCO JSON of the training images.", default=None, changes_result=False
    )
    val_images: Path | None = _data("Folder of the validation images.", default=None, changes_result=False)
    val_annotations: Path | None = _data(
        "COCO JSON of the validation images.", default=None, changes_result=False
    )
    val_fraction: float | None = _data(
        "Share of the training images to validate on where there are no validation images, such as 0.2; "
        "every class keeps its share.",
        default=None,
        min=0.0001,
        max=0.9,
    )
    output: Path = _run("Folder for the model, its card, metrics and checkpoints.")

    masks: bool = _data("Train a model with masks; requires segmentations or PNG files.", default=False)
    train_panoptic_dir: Path | None = _data(
        "Folder of the PNG files of panoptic training annotations; implies --masks.",
        default=None,
        changes_result=False,
    )
    val_panoptic_dir: Path | None = _data(
        "Folder of the PNG files of panoptic validation annotations.", default=None, changes_result=False
    )
    strict: bool = _data("Stop if the data set has problems, instead of leaving out entries.", default=False)
    check_images: bool = _data(
        "Decode every image before the first step, to find damaged ones, and validation images that look "
        "like training images.  [default: only the latter, for up to 2000 images]",
        default=False,
        changes_result=False,
    )
    image_size: int | None = _data(
        "Shorter edge of the images in pixels.  [default: the checkpoint's, or 800]", default=None, min=32
    )
    max_image_size: int | None = _data(
        "Maximum length of the longer edge.  [default: 5/3 of --image-size if that is given]",
        default=None,
        min=32,
    )
    augmentation: str = _data("Preset: original, light, strong or none.", default="light")
    mosaic: float = _data("Probability of combining four images in one.", default=0.0, min=0, max=1)
    multi_scale: float = _data(
        "Resize each batch by a random factor between 1 - VALUE and 1 + VALUE.", default=0.0, min=0, max=0.5
    )

    repeat_rare: float = _data(
        "Show images more often if fewer than this fraction of the images have one of their classes "
        "(repeat-factor sampling), such as 0.1; 0 shows all equally often.",
        default=0.0,
        min=0,
        max=1,
    )

    from_scratch: bool = _model("Train a new model instead of fine-tuning a checkpoint.", default=False)
    backbone: str = _model("timm backbone of a new model.", default="resnet50")
    pretrained_backbone: bool = _model("Use ImageNet weights for the backbone of a new model.", default=False)
    backbone_weights: Path | None = _model(
        "Safetensors or PyTorch file with weights for the backbone of a new model, in place of a download.",
        default=None,
    )
    d_model: int = _model("Width of a new model's Transformer.", default=256, min=8)
    encoder_layers: int = _model("Encoder layers of a new model.", default=6, min=0)
    decoder_layers: int = _model("Decoder layers of a new model.", default=6, min=1)
    queries: int | None = _model(
        "Number of object queries, the maximum number of objects per image.  [default: that of the "
        "checkpoint or family]",
        default=None,
        min=1,
    )
    model_option: list[str] = _model(
        "Any other entry of the model's configuration, as NAME=VALUE; can be repeated.", default_factory=list
    )
    freeze: Literal["default", "nothing", "backbone", "detector"] = _model(
        "Weights that stay fixed: default (stem and first stage of a pretrained ResNet, as in the "
        "original), nothing, backbone, or detector (trains only the masks).",
        default="default",
    )
    lora: int | None = _model(
        "Train adapters of this rank, such as 8, on the Transformer's linear layers instead of their weights "
        "(LoRA), which takes less memory; heads and queries are trained in full, the backbone stays fixed. "
        "The model that is saved has them merged.",
        default=None,
        min=1,
    )
    live_batch_norm: bool | None = _model(
        "Train batch norm instead of freezing it.  [default: if the backbone has no pretrained weights]",
        default=None,
    )

    epochs: int = _optimisation("Number of passes over the training images.", default=50, min=1)
    batch_size: int = _optimisation("Number of images in a batch, per device.", default=4, min=1)
    gradient_accumulation: int = _optimisation("Number of batches for one step.", default=1, min=1)
    learning_rate: float | None = _optimisation(
        "Learning rate.  [default: 1e-4, Deformable DETR 2e-4]", default=None, min=0
    )
    backbone_learning_rate: float | None = _optimisation(
        "Learning rate of the backbone.  [default: a tenth of --learning-rate; the same if the backbone "
        "has no pretrained weights]",
        default=None,
        min=0,
    )
    weight_decay: float = _optimisation("Weight decay of AdamW.", default=1e-4, min=0)
    clip_norm: float = _optimisation("Maximum gradient norm; 0 disables clipping.", default=0.1, min=0)
    warmup: float = _optimisation(
        "Fraction of the run during which the learning rate rises.", default=0.02, min=0, max=1
    )
    schedule: Literal["cosine", "step", "constant"] = _optimisation(
        "Decay of the learning rate: cosine (to 0), step (to a tenth after 4/5 of the run) or constant.",
        default="cosine",
    )
    ema_decay: float = _optimisation(
        "Decay of the moving average of the weights, which is evaluated and saved; 0 disables averaging.",
        default=0.999,
        min=0,
        max=0.999999,
    )
    class_targets: Literal["one", "iou"] | None = _optimisation(
        "What the score of a found object is trained to be: one, as in the originals, or the IoU of its box, "
        "so that scores say how well boxes fit. iou is for Conditional and Deformable DETR.  [default: the "
        "checkpoint's, or one]",
        default=None,
    )
    precision: Literal["auto", "fp32", "bf16"] = _optimisation(
        "auto (bf16 on a GPU that supports it, otherwise fp32), fp32 or bf16.", default="auto"
    )
    patience: int | None = _optimisation(
        "Stop after this many evaluations without a better AP.", default=None, min=1
    )

    eval_every: int = _run("Number of epochs between evaluations.", default=1, min=1)
    eval_batch_size: int | None = _run(
        "Maximum number of images at once in an evaluation.  [default: --batch-size; 1 for DC5]",
        default=None,
        min=1,
        changes_result=False,
    )
    save_every: int | None = _run(
        "Number of steps between additional checkpoints.", default=None, min=1, changes_result=False
    )
    log_every: int = _run("Number of steps between rows of metrics.csv.", default=10, min=1)
    seed: int = _run("Random seed.", default=0, min=0)
    workers: int | None = _run(
        "Number of processes that read images.  [default: depends on the number of cores]",
        default=None,
        min=0,
        changes_result=False,
    )
    device: str | None = _run(
        "cpu or cuda.  [default: a GPU if available]", default=None, changes_result=False
    )
    report_to: list[str] = _run(
        "Additional logging: tensorboard, wandb, ...; can be repeated.",
        default_factory=list,
        changes_result=False,
    )
    resume: bool = _run(
        "Continue the run in --output from its last checkpoint, with the same options.",
        default=False,
        changes_result=False,
    )
    overwrite: bool = _run(
        "Also replace files in --output that detrkit did not write; never an input.",
        default=False,
        changes_result=False,
    )
    push_to_hub: bool = _run("Upload the model at the end.", default=False, changes_result=False)
    hub_id: str | None = _run(
        "Repository on the Hub.  [default: the name of --output, under your account]",
        default=None,
        changes_result=False,
    )

    def __post_init__(self) -> None:
        """Converts strings to paths and checks every value."""
        hints = get_type_hints(type(self))
        for option in fields(self):
            self._check(option, hints[option.name])
        if self.train_panoptic_dir is not None or self.val_panoptic_dir is not None:
            self.masks = True
            if self.train_panoptic_dir is None or self.val_panoptic_dir is None:
                raise SettingError("pass both --train-panoptic-dir and --val-panoptic-dir, or neither")
        if self.has_random_backbone and self.freeze in ("backbone", "detector"):
            raise SettingError(
                f"--freeze {self.freeze} would keep random weights fixed; fine-tune a checkpoint, or add "
                "--pretrained-backbone or --backbone-weights FILE"
            )
        if self.backbone_weights is not None and not self.from_scratch:
            raise SettingError(
                "--backbone-weights requires --from-scratch; a checkpoint has weights for its backbone"
            )
        if self.backbone_weights is not None and self.pretrained_backbone:
            raise SettingError("pass either --backbone-weights or --pretrained-backbone, not both")
        if self.live_batch_norm and self.freeze in ("backbone", "detector"):
            raise SettingError(f"--live-batch-norm contradicts --freeze {self.freeze}; leave one of them out")
        if self.lora is not None and self.from_scratch:
            raise SettingError("--lora adapts a checkpoint; leave out --from-scratch")
        if self.lora is not None and (self.freeze in ("nothing", "detector") or self.live_batch_norm):
            other = "--live-batch-norm" if self.live_batch_norm else f"--freeze {self.freeze}"
            raise SettingError(f"--lora freezes all other weights, such as the backbone's; leave out {other}")
        if self.freeze == "detector" and not self.masks:
            raise SettingError("--freeze detector leaves nothing to train; add --masks")
        if self.hub_id is not None and not self.push_to_hub:
            raise SettingError("--hub-id requires --push-to-hub")
        for text in self.model_option:
            if "=" not in text:
                raise SettingError(f"--model-option must be NAME=VALUE, not {text!r}")

    @property
    def has_random_backbone(self) -> bool:
        """Whether the backbone begins with random weights."""
        return self.from_scratch and not self.pretrained_backbone and self.backbone_weights is None

    def check_data(self) -> None:
        """Raises a SettingError unless the options name training and validation data, each in one way."""
        pairs = {
            "train": (self.train_images, self.train_annotations),
            "val": (self.val_images, self.val_annotations),
        }
        for split, pair in pairs.items():
            if (pair[0] is None) != (pair[1] is None):
                raise SettingError(f"pass both --{split}-images and --{split}-annotations, or neither")
        if self.data is not None and (self.train_images or self.val_images):
            raise SettingError("--data replaces --train-images, --val-images and their annotations")
        if self.data is None and self.train_images is None:
            raise SettingError("pass --data PATH, or --train-images DIR and --train-annotations FILE")
        if self.data is None and (self.val_images is None) == (self.val_fraction is None):
            raise SettingError(
                "pass either --val-images DIR and --val-annotations FILE, or --val-fraction, such as 0.2"
            )

    def _check(self, option: Field[Any], hint: object) -> None:
        value = getattr(self, option.name)
        flag = flag_of(option.name)
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if value is None and type(None) in kinds:
            return
        if Path in kinds:
            value = Path(value)
            setattr(self, option.name, value)
        for kind in kinds:
            if get_origin(kind) is Literal and value not in get_args(kind):
                suggestion = did_you_mean(str(value), get_args(kind))
                raise SettingError(
                    f"{flag} must be one of {', '.join(get_args(kind))}, not {value!r}{suggestion}"
                )
        minimum, maximum = option.metadata["min"], option.metadata["max"]
        if minimum is not None and not value >= minimum:  # NaN is refused too
            raise SettingError(f"{flag} must be at least {minimum}, not {value}")
        if maximum is not None and not value <= maximum:
            raise SettingError(f"{flag} must be at most {maximum}, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}

    def save(self, path: Path, fingerprints: Mapping[str, str] | None = None) -> None:
        """Writes the recipe as JSON, with what its data sets and the model to start from contain."""
        content = {**self.to_dict(), "fingerprints": dict(fingerprints or {})}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def check_same(self, path: Path, fingerprints: Mapping[str, str] | None = None) -> None:
        """Refuses to resume the run whose recipe is in a file, if that was started with different options.

        More epochs are not refused. Data may be stored elsewhere, if it is the same.

        Args:
            path: The file.
            fingerprints: What the data sets and the model contain; not compared if None.

        Raises:
            SettingError: An option that changes the result differs, or the file cannot be read.
        """
        before = read_json(path, SettingError, "it has the options of the run to resume")
        if not isinstance(before, dict) or not isinstance(before.get("fingerprints", {}), dict):
            raise SettingError(f"{path} has no options of a run to resume; start another run in a new folder")
        now = self.to_dict()
        for split, value in (fingerprints or {}).items():
            if before.get("fingerprints", {}).get(split, value) != value:
                other = {"model": "weights", "backbone": "backbone weights"}
                what = other.get(split, f"{split} data (other images, boxes or classes)")
                raise SettingError(
                    f"the run in {path.parent} was started with different {what}; resume it with the same, "
                    "or start another run in a new folder"
                )
        for option in fields(self):
            name = option.name
            if name == "epochs" and now[name] >= before.get(name, 0):
                continue
            then = before.get(name, _default_of(option))  # an earlier version may not have had the option
            if option.metadata["changes_result"] and name != "output" and then != now[name]:
                raise SettingError(
                    f"the run in {path.parent} was started with {flag_of(name)} {then}, not "
                    f"{now[name]}; resume it with the same options, or start another run in a new folder"
                )


def _default_of(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def flag_of(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")
