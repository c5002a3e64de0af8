"""Everything that can be chosen about a training run, in one place.

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
from detrkit.common.text import did_you_mean
from detrkit.families import FAMILIES

DATA, MODEL, OPTIMISATION, RUN = "Data", "Model", "Optimisation", "Run"


def _option(
    help: str,
    group: str,
    *,
    least: float | None = None,
    most: float | None = None,
    changes_result: bool = True,
) -> dict[str, Any]:
    """What the command line needs to know of a field.

    Args:
        help: One sentence or two.
        group: The heading it stands under.
        least: Least value.
        most: Greatest value.
        changes_result: Whether a resumed run must have the same value.
    """
    return {"help": help, "group": group, "least": least, "most": most, "changes_result": changes_result}


@dataclass(kw_only=True)
class TrainingRecipe:
    """What to train on, from what, and how. Each field is an option of ``detrkit train`` of the same name.

    The defaults follow the originals: all decoder layers have a loss, AdamW with a lower rate for the
    backbone (and in Deformable DETR for sampling offsets and reference points), gradients clipped at 0.1;
    beyond them a warm-up and an average of the weights, which is what is evaluated and saved.

    The fields' own help texts say what each means; paths may be given as strings.

    Raises:
        SettingError: A value is out of range, or two of them contradict each other.
    """

    model: str = field(
        metadata=_option(
            "Checkpoint to fine-tune: Hub id, folder, or a name from: detrkit models. With --from-scratch a "
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
        metadata=_option("Train a model with masks; the annotations need segmentations, or PNG files.", DATA),
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
        metadata=_option("Refuse a data set with any problem, instead of leaving out what is bad.", DATA),
    )
    image_size: int | None = field(
        default=None,
        metadata=_option(
            "Shorter edge of the images in pixels.  [default: the checkpoint's, or 800]", DATA, least=32
        ),
    )
    max_image_size: int | None = field(
        default=None,
        metadata=_option(
            "Longest edge allowed.  [default: 5/3 of the shorter one where that is given]", DATA, least=32
        ),
    )
    augmentation: str = field(
        default="light", metadata=_option("Preset: original, light, strong or none.", DATA)
    )
    mosaic: float = field(
        default=0.0,
        metadata=_option("Probability that four images are put together in one.", DATA, least=0, most=1),
    )
    multi_scale: float = field(
        default=0.0,
        metadata=_option(
            "Resize each batch by a random factor from 1 - this to 1 + this.", DATA, least=0, most=0.5
        ),
    )

    from_scratch: bool = field(
        default=False, metadata=_option("Train a new model rather than a checkpoint.", MODEL)
    )
    backbone: str = field(default="resnet50", metadata=_option("timm backbone of a new model.", MODEL))
    pretrained_backbone: bool = field(
        default=False, metadata=_option("Fetch ImageNet weights for the backbone of a new model.", MODEL)
    )
    d_model: int = field(default=256, metadata=_option("Width of a new model's Transformer.", MODEL, least=8))
    encoder_layers: int = field(default=6, metadata=_option("Encoder layers of a new model.", MODEL, least=0))
    decoder_layers: int = field(default=6, metadata=_option("Decoder layers of a new model.", MODEL, least=1))
    queries: int | None = field(
        default=None,
        metadata=_option(
            "Object queries: the most objects of an image.  [default: the checkpoint's or the family's]",
            MODEL,
            least=1,
        ),
    )
    model_option: list[str] = field(
        default_factory=list,
        metadata=_option(
            "Any other entry of the model's configuration, as NAME=VALUE; may be repeated.", MODEL
        ),
    )
    freeze: Literal["default", "nothing", "backbone", "detector"] = field(
        default="default",
        metadata=_option(
            "What not to train: by default a pretrained ResNet's stem and first stage, as in the original; "
            "nothing; the whole backbone; or the detector, to train masks alone.",
            MODEL,
        ),
    )
    live_batch_norm: bool | None = field(
        default=None,
        metadata=_option(
            "Train batch norm, frozen otherwise.  [default: for a backbone without pretrained weights]",
            MODEL,
        ),
    )

    epochs: int = field(
        default=50, metadata=_option("Passes over the training images.", OPTIMISATION, least=1)
    )
    batch_size: int = field(
        default=4, metadata=_option("Images in a batch of one device.", OPTIMISATION, least=1)
    )
    gradient_accumulation: int = field(
        default=1, metadata=_option("Batches whose gradients make one step.", OPTIMISATION, least=1)
    )
    learning_rate: float | None = field(
        default=None,
        metadata=_option("Learning rate.  [default: 1e-4, Deformable DETR 2e-4]", OPTIMISATION, least=0),
    )
    backbone_learning_rate: float | None = field(
        default=None,
        metadata=_option(
            "Learning rate of the backbone.  [default: a tenth of the learning rate; the same for a backbone "
            "without pretrained weights]",
            OPTIMISATION,
            least=0,
        ),
    )
    weight_decay: float = field(
        default=1e-4, metadata=_option("Weight decay of AdamW.", OPTIMISATION, least=0)
    )
    clip_norm: float = field(
        default=0.1, metadata=_option("Greatest norm of the gradient; 0 for any.", OPTIMISATION, least=0)
    )
    warmup: float = field(
        default=0.02,
        metadata=_option(
            "Part of the run in which the learning rate rises to its value.", OPTIMISATION, least=0, most=1
        ),
    )
    schedule: Literal["cosine", "step", "constant"] = field(
        default="cosine",
        metadata=_option(
            "How the learning rate falls: along a cosine to 0, to a tenth after 4/5 of the run, or not.",
            OPTIMISATION,
        ),
    )
    ema_decay: float = field(
        default=0.999,
        metadata=_option(
            "Decay of the moving average of the weights, which is evaluated and saved; 0 for none.",
            OPTIMISATION,
            least=0,
            most=0.999999,
        ),
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata=_option("Arithmetic: auto is bf16 on a GPU that has it, else fp32.", OPTIMISATION),
    )
    patience: int | None = field(
        default=None,
        metadata=_option("Stop after so many evaluations without a better AP.", OPTIMISATION, least=1),
    )

    eval_every: int = field(default=1, metadata=_option("Epochs between evaluations.", RUN, least=1))
    eval_batch_size: int | None = field(
        default=None,
        metadata=_option(
            "Most images at once in an evaluation.  [default: --batch-size; 1 for DC5]",
            RUN,
            least=1,
            changes_result=False,
        ),
    )
    save_every: int | None = field(
        default=None,
        metadata=_option(
            "Steps between checkpoints, beside those after each epoch.", RUN, least=1, changes_result=False
        ),
    )
    log_every: int = field(default=10, metadata=_option("Steps between rows of metrics.csv.", RUN, least=1))
    seed: int = field(default=0, metadata=_option("Seed of all that is random.", RUN, least=0))
    workers: int | None = field(
        default=None,
        metadata=_option(
            "Processes that read images.  [default: by the number of cores]",
            RUN,
            least=0,
            changes_result=False,
        ),
    )
    device: str | None = field(
        default=None,
        metadata=_option("cpu or cuda.  [default: a GPU where there is one]", RUN, changes_result=False),
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata=_option(
            "Where else to log: tensorboard, wandb, ...; may be repeated.", RUN, changes_result=False
        ),
    )
    resume: bool = field(
        default=False,
        metadata=_option(
            "Continue the run of the output folder from its last checkpoint, with the same options.",
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
            "Repository on the Hub.  [default: the output folder's name, under your account]",
            RUN,
            changes_result=False,
        ),
    )

    def __post_init__(self) -> None:
        """Turns strings into paths and checks every value."""
        hints = get_type_hints(type(self))
        for option in fields(self):
            self._check(option, hints[option.name])
        if self.train_panoptic_dir is not None or self.val_panoptic_dir is not None:
            self.masks = True
            if self.train_panoptic_dir is None or self.val_panoptic_dir is None:
                raise SettingError("give --train-panoptic-dir and --val-panoptic-dir, or neither")
        if self.from_scratch and self.freeze in ("backbone", "detector") and not self.pretrained_backbone:
            raise SettingError(
                f"--freeze {self.freeze} would leave random weights as they are; fine-tune a checkpoint, or "
                "fetch a --pretrained-backbone"
            )
        if self.live_batch_norm and self.freeze in ("backbone", "detector"):
            raise SettingError(f"--live-batch-norm trains what --freeze {self.freeze} leaves as it is")
        if self.freeze == "detector" and not self.masks:
            raise SettingError("--freeze detector leaves nothing to train without --masks")
        if self.hub_id is not None and not self.push_to_hub:
            raise SettingError("--hub-id says where --push-to-hub uploads to; add that, or leave both out")
        for text in self.model_option:
            if "=" not in text:
                raise SettingError(f"--model-option takes NAME=VALUE, not {text!r}")

    def _check(self, option: Field[Any], hint: Any) -> None:
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
        least, most = option.metadata["least"], option.metadata["most"]
        if least is not None and not value >= least:  # NaN is refused too
            raise SettingError(f"{flag} must be at least {least}, not {value}")
        if most is not None and not value <= most:
            raise SettingError(f"{flag} must be at most {most}, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    def save(self, path: Path) -> None:
        """Writes the recipe as JSON."""
        from detrkit.common.files import atomic_file

        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def check_same(self, path: Path) -> None:
        """Refuses to go on with a run that was started with other options.

        Args:
            path: Where that run's recipe was saved.

        Raises:
            SettingError: An option differs that changes what comes out, or the file cannot be read.
        """
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingError(f"cannot read {path}, the options of the run to resume: {error}") from error
        now = self.to_dict()
        for option in fields(self):
            name = option.name
            if option.metadata["changes_result"] and name != "output" and before.get(name) != now[name]:
                raise SettingError(
                    f"the run in {path.parent} was started with {flag_of(name)} {before.get(name)}, not "
                    f"{now[name]}; resume it with the same options, or start another in a new folder"
                )


def flag_of(name: str) -> str:
    """The option of the command line that a field is."""
    return "--" + name.replace("_", "-")
