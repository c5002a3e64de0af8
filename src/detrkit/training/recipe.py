"""All settings of a training run.

The fields of :class:`TrainingRecipe` are the options of ``detrkit train``: the command line is made from
them, with their defaults, limits and help. This module does not import torch.
"""

from __future__ import annotations

import json
import types
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from detrkit.common.errors import SettingError
from detrkit.common.files import atomic_file, read_json
from detrkit.common.text import did_you_mean
from detrkit.families import FAMILIES

DATA, MODEL, OPTIMISATION, RUN = "Data", "Model", "Optimisation", "Run"


def _option(
    help: str,
    group: str,
    *,
    min: float | None = None,
    max: float | None = None,
    changes_result: bool = True,
) -> dict[str, Any]:
    """The metadata of a field, from which the command line makes an option.

    Args:
        help: One or two sentences.
        group: The heading of the option in the help.
        min: Minimum value.
        max: Maximum value.
        changes_result: Whether a resumed run must have the same value.
    """
    return {"help": help, "group": group, "min": min, "max": max, "changes_result": changes_result}


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

    model: str = field(
        metadata=_option(
            "Checkpoint to fine-tune: Hub id, folder, or a name from: detrkit models. With --from-scratch, a "
            f"family: {', '.join(family.option_name for family in FAMILIES.values())}.",
            MODEL,
        )
    )
    train_images: Path = field(metadata=_option("Folder of the training images.", DATA))
    train_annotations: Path = field(metadata=_option("COCO JSON of the training images.", DATA))
    val_images: Path = field(metadata=_option("Folder of the validation images.", DATA))
    val_annotations: Path = field(metadata=_option("COCO JSON of the validation images.", DATA))
    output: Path = field(metadata=_option("Folder for the model, its card, metrics and checkpoints.", RUN))

    masks: bool = field(
        default=False,
        metadata=_option("Train a model with masks; requires segmentations or PNG files.", DATA),
    )
    train_panoptic_dir: Path | None = field(
        default=None,
        metadata=_option("Folder of the PNG files of panoptic training annotations; implies --masks.", DATA),
    )
    val_panoptic_dir: Path | None = field(
        default=None, metadata=_option("Folder of the PNG files of panoptic validation annotations.", DATA)
    )
    strict: bool = field(
        default=False,
        metadata=_option("Stop if the data set has problems, instead of leaving out entries.", DATA),
    )
    image_size: int | None = field(
        default=None,
        metadata=_option(
            "Shorter edge of the images in pixels.  [default: the checkpoint's, or 800]", DATA, min=32
        ),
    )
    max_image_size: int | None = field(
        default=None,
        metadata=_option(
            "Maximum length of the longer edge.  [default: 5/3 of --image-size if that is given]",
            DATA,
            min=32,
        ),
    )
    augmentation: str = field(
        default="light", metadata=_option("Preset: original, light, strong or none.", DATA)
    )
    mosaic: float = field(
        default=0.0,
        metadata=_option("Probability of combining four images in one.", DATA, min=0, max=1),
    )
    multi_scale: float = field(
        default=0.0,
        metadata=_option(
            "Resize each batch by a random factor between 1 - VALUE and 1 + VALUE.",
            DATA,
            min=0,
            max=0.5,
        ),
    )

    from_scratch: bool = field(
        default=False, metadata=_option("Train a new model instead of fine-tuning a checkpoint.", MODEL)
    )
    backbone: str = field(default="resnet50", metadata=_option("timm backbone of a new model.", MODEL))
    pretrained_backbone: bool = field(
        default=False, metadata=_option("Use ImageNet weights for the backbone of a new model.", MODEL)
    )
    d_model: int = field(default=256, metadata=_option("Width of a new model's Transformer.", MODEL, min=8))
    encoder_layers: int = field(default=6, metadata=_option("Encoder layers of a new model.", MODEL, min=0))
    decoder_layers: int = field(default=6, metadata=_option("Decoder layers of a new model.", MODEL, min=1))
    queries: int | None = field(
        default=None,
        metadata=_option(
            "Number of object queries, the maximum number of objects per image.  [default: that of the "
            "checkpoint or family]",
            MODEL,
            min=1,
        ),
    )
    model_option: list[str] = field(
        default_factory=list,
        metadata=_option(
            "Any other entry of the model's configuration, as NAME=VALUE; can be repeated.", MODEL
        ),
    )
    freeze: Literal["default", "nothing", "backbone", "detector"] = field(
        default="default",
        metadata=_option(
            "Weights that stay fixed: default (stem and first stage of a pretrained ResNet, as in the "
            "original), nothing, backbone, or detector (trains only the masks).",
            MODEL,
        ),
    )
    live_batch_norm: bool | None = field(
        default=None,
        metadata=_option(
            "Train batch norm instead of freezing it.  [default: if the backbone has no pretrained weights]",
            MODEL,
        ),
    )

    epochs: int = field(
        default=50, metadata=_option("Number of passes over the training images.", OPTIMISATION, min=1)
    )
    batch_size: int = field(
        default=4, metadata=_option("Number of images in a batch, per device.", OPTIMISATION, min=1)
    )
    gradient_accumulation: int = field(
        default=1,
        metadata=_option("Number of batches for one step.", OPTIMISATION, min=1),
    )
    learning_rate: float | None = field(
        default=None,
        metadata=_option("Learning rate.  [default: 1e-4, Deformable DETR 2e-4]", OPTIMISATION, min=0),
    )
    backbone_learning_rate: float | None = field(
        default=None,
        metadata=_option(
            "Learning rate of the backbone.  [default: a tenth of --learning-rate; the same if the backbone "
            "has no pretrained weights]",
            OPTIMISATION,
            min=0,
        ),
    )
    weight_decay: float = field(default=1e-4, metadata=_option("Weight decay of AdamW.", OPTIMISATION, min=0))
    clip_norm: float = field(
        default=0.1, metadata=_option("Maximum gradient norm; 0 disables clipping.", OPTIMISATION, min=0)
    )
    warmup: float = field(
        default=0.02,
        metadata=_option(
            "Fraction of the run during which the learning rate rises.",
            OPTIMISATION,
            min=0,
            max=1,
        ),
    )
    schedule: Literal["cosine", "step", "constant"] = field(
        default="cosine",
        metadata=_option(
            "Decay of the learning rate: cosine (to 0), step (to a tenth after 4/5 of the run) or constant.",
            OPTIMISATION,
        ),
    )
    ema_decay: float = field(
        default=0.999,
        metadata=_option(
            "Decay of the moving average of the weights, which is evaluated and saved; 0 disables averaging.",
            OPTIMISATION,
            min=0,
            max=0.999999,
        ),
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata=_option(
            "auto (bf16 on a GPU that supports it, otherwise fp32), fp32 or bf16.", OPTIMISATION
        ),
    )
    patience: int | None = field(
        default=None,
        metadata=_option("Stop after this many evaluations without a better AP.", OPTIMISATION, min=1),
    )

    eval_every: int = field(default=1, metadata=_option("Number of epochs between evaluations.", RUN, min=1))
    eval_batch_size: int | None = field(
        default=None,
        metadata=_option(
            "Maximum number of images at once in an evaluation.  [default: --batch-size; 1 for DC5]",
            RUN,
            min=1,
            changes_result=False,
        ),
    )
    save_every: int | None = field(
        default=None,
        metadata=_option(
            "Number of steps between additional checkpoints.",
            RUN,
            min=1,
            changes_result=False,
        ),
    )
    log_every: int = field(
        default=10, metadata=_option("Number of steps between rows of metrics.csv.", RUN, min=1)
    )
    seed: int = field(default=0, metadata=_option("Random seed.", RUN, min=0))
    workers: int | None = field(
        default=None,
        metadata=_option(
            "Number of processes that read images.  [default: depends on the number of cores]",
            RUN,
            min=0,
            changes_result=False,
        ),
    )
    device: str | None = field(
        default=None,
        metadata=_option("cpu or cuda.  [default: a GPU if available]", RUN, changes_result=False),
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata=_option(
            "Additional logging: tensorboard, wandb, ...; can be repeated.", RUN, changes_result=False
        ),
    )
    resume: bool = field(
        default=False,
        metadata=_option(
            "Continue the run in --output from its last checkpoint, with the same options.",
            RUN,
            changes_result=False,
        ),
    )
    push_to_hub: bool = field(
        default=False, metadata=_option("Upload the model at the end.", RUN, changes_result=False)
    )
    hub_id: str | None = field(
        default=None,
        metadata=_option(
            "Repository on the Hub.  [default: the name of --output, under your account]",
            RUN,
            changes_result=False,
        ),
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
        if self.from_scratch and self.freeze in ("backbone", "detector") and not self.pretrained_backbone:
            raise SettingError(
                f"--freeze {self.freeze} would keep random weights fixed; fine-tune a checkpoint, or add "
                "--pretrained-backbone"
            )
        if self.live_batch_norm and self.freeze in ("backbone", "detector"):
            raise SettingError(f"--live-batch-norm contradicts --freeze {self.freeze}; leave one of them out")
        if self.freeze == "detector" and not self.masks:
            raise SettingError("--freeze detector leaves nothing to train; add --masks")
        if self.hub_id is not None and not self.push_to_hub:
            raise SettingError("--hub-id requires --push-to-hub")
        for text in self.model_option:
            if "=" not in text:
                raise SettingError(f"--model-option must be NAME=VALUE, not {text!r}")

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
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    def save(self, path: Path) -> None:
        """Writes the recipe as JSON."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def check_same(self, path: Path) -> None:
        """Refuses to resume a run that was started with different options.

        Args:
            path: File of that run's recipe.

        Raises:
            SettingError: An option that changes the result differs, or the file cannot be read.
        """
        before = read_json(path, SettingError, "it has the options of the run to resume")
        now = self.to_dict()
        for option in fields(self):
            name = option.name
            if option.metadata["changes_result"] and name != "output" and before.get(name) != now[name]:
                raise SettingError(
                    f"the run in {path.parent} was started with {flag_of(name)} {before.get(name)}, not "
                    f"{now[name]}; resume it with the same options, or start another run in a new folder"
                )


def flag_of(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")
