"""What the configurations of all families share: the backbone and the set criterion.

Every form of ``config.json`` that is on the Hub is read into one form: a timm backbone is named by
``backbone`` (with ``backbone_config`` None), any other backbone is a ``backbone_config``. Making a
configuration never asks the network, nor reads another folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from detrkit.common.errors import CheckpointError, SettingError
from detrkit.common.screening import MOST_LAYERS, check_config, is_too_deep
from detrkit.models.ranges import check_ranges

if TYPE_CHECKING:
    from transformers import TimmBackboneConfig

_MAX_BACKBONE_NUMBER = 65_536

# What timm and Transformers would fetch, open or run on a backbone's behalf.
_REFUSED_BACKBONE_OPTIONS = (
    *("cache_dir", "checkpoint_path", "code_revision", "trust_remote_code"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
)

# A model of timm's own. Those of a repository or folder are "hf-hub:...", "local-dir:..." and "org/name".
_TIMM_NAME = re.compile(r"\w[\w.-]*")


class DetrFamilyConfig(PreTrainedConfig):
    """Backbone, Transformer size, dropout and loss weights, as all families know them.

    Args:
        backbone: timm name of the backbone; ``resnet50`` when neither this nor ``backbone_config`` is given.
        use_timm_backbone: Whether ``backbone`` names a timm model. Transformers would fetch any other from
            the Hub; here it is a ``backbone_config``, such as ``AutoConfig.from_pretrained(name)``.
        use_pretrained_backbone: Fetch ImageNet weights for a *new* model. Ignored by ``from_pretrained``,
            which never fetches backbone weights.
        backbone_kwargs: ``out_indices``, ``in_chans`` and other options of a timm backbone. By default the
            feature maps are those of the stages 1 to 4, counted from 0, or the last ones of a backbone with
            fewer stages.
        backbone_config: Configuration (or its dict) of a Transformers backbone: ResNet, Swin, ConvNeXt, ...
        dilation: DC5: stride 1 and dilation 2 in the last stage of the backbone.
        num_channels: Channels of the input image.
        num_queries: Object queries, the largest number of detections in one image.
        d_model: Width of the Transformer.
        encoder_layers: Encoder layers.
        decoder_layers: Decoder layers.
        encoder_ffn_dim: Width of the encoder's feed-forward layers.
        decoder_ffn_dim: Width of the decoder's feed-forward layers.
        encoder_attention_heads: Heads of the encoder's attention.
        decoder_attention_heads: Heads of the decoder's attention.
        activation_function: Activation of the feed-forward layers.
        normalize_before: Pre-norm layers (the original's ``--pre_norm``): each sub-layer normalises its input
            instead of its residual sum, and the encoder ends with a norm. DETR has both, Table Transformer
            only these, the other families only post-norm layers.
        dropout: Dropout on the output of each sub-layer.
        attention_dropout: Dropout on the attention weights.
        activation_dropout: Dropout inside the feed-forward layers.
        position_embedding_type: ``sine`` or ``learned``.
        auxiliary_loss: Return the predictions of every decoder layer in ``auxiliary_outputs``. Losses in
            training mode use them regardless, as the original does.
        bbox_cost: Weight of the L1 distance in the matching.
        giou_cost: Weight of the generalised IoU in the matching.
        mask_loss_coefficient: Weight of the focal mask loss.
        dice_loss_coefficient: Weight of the dice mask loss.
        bbox_loss_coefficient: Weight of the L1 box loss.
        giou_loss_coefficient: Weight of the generalised IoU loss.
    """

    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True)
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["auxiliary_outputs"]
    norm_placements: ClassVar[tuple[bool, ...]] = (False,)  # values that ``normalize_before`` may have
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    backbone: str | None = None
    use_timm_backbone: bool | None = None
    use_pretrained_backbone: bool | None = False
    backbone_kwargs: dict | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    dilation: bool | None = False
    num_channels: int = 3
    num_queries: int = 100
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_layerdrop: float | int = 0.0
    decoder_layerdrop: float | int = 0.0
    activation_function: str = "relu"
    normalize_before: bool = False
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    init_std: float = 0.02
    init_xavier_std: float = 1.0
    position_embedding_type: str = "sine"
    auxiliary_loss: bool = False
    is_encoder_decoder: bool = True
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    mask_loss_coefficient: float | int = 1
    dice_loss_coefficient: float | int = 1
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        """Brings the backbone's description into one form and checks what would fail later without a clue."""
        check_ranges({**vars(self), **kwargs})
        targets = kwargs.get("class_targets", "one")
        known = ("one", "iou") if hasattr(self, "focal_alpha") else ("one",)  # see detrkit.losses
        if targets not in known:
            raise ValueError(f"class_targets must be {' or '.join(map(repr, known))}, not {targets!r}")
        _check_backbone(self.backbone_config)
        _check_backbone(self.backbone_kwargs)
        _check_names(vars(self), is_timm=self.use_timm_backbone is not False)
        self.dilation = bool(self.dilation)
        # Transformers 5 accepts integers only for these; older files hold 5.0 for 5.
        for name in (n for n in vars(self) if n.endswith(("_cost", "_loss_coefficient"))):
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():
                setattr(self, name, int(value))
        self._settle_backbone()
        super().__post_init__(**kwargs)
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"d_model={self.d_model} is not divisible by {name}={getattr(self, name)}")
        if self.id2label is not None and self.id2label.keys() != set(range(len(self.id2label))):
            last = len(self.id2label) - 1
            missing = min(set(range(last + 1)) - self.id2label.keys())
            raise ValueError(
                f"id2label must name the labels 0 to {last} of the class head, one by one, but {missing} is "
                "missing; number the classes from 0 without gaps"
            )
        if self.normalize_before not in self.norm_placements:
            usual = "pre-norm" if self.norm_placements[0] else "post-norm"
            raise ValueError(
                f"normalize_before={self.normalize_before!r} does not go with {self.model_type}: it has only "
                f"{usual} layers"
            )
        if self.position_embedding_type not in ("sine", "learned"):
            raise ValueError(
                f"position_embedding_type must be 'sine' or 'learned', not {self.position_embedding_type!r}"
            )

    def _settle_backbone(self) -> None:
        if isinstance(self.backbone_config, dict):
            model_type = self.backbone_config.get("model_type")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f"backbone_config has an unknown model_type: {model_type!r}")
            self.backbone_config = CONFIG_MAPPING[model_type].from_dict(self.backbone_config)
        if getattr(self.backbone_config, "model_type", None) == "timm_backbone":
            self._take_over_timm_config(self.backbone_config)
        if self.backbone_config is None and self.backbone is None and self.use_timm_backbone is False:
            self.backbone_config = CONFIG_MAPPING["resnet"](out_features=["stage4"])
        self._settle_channels()
        self.use_timm_backbone = self.backbone_config is None
        self.backbone = (self.backbone or "resnet50") if self.use_timm_backbone else None
        if not self.use_timm_backbone or self._has_default_backbone_kwargs():
            self.backbone_kwargs = None

    def _settle_channels(self) -> None:
        channels = getattr(self.backbone_config, "num_channels", None) or self.num_channels
        if self.num_channels not in (3, channels):  # 3 may be no more than the default
            raise ValueError(
                f"num_channels is {self.num_channels}, but backbone_config takes images of {channels} "
                "channels; make them equal"
            )
        self.num_channels = channels

    def _take_over_timm_config(self, timm_config: TimmBackboneConfig) -> None:
        """Transformers 5 describes a timm backbone by a nested config; the Hub's form names it."""
        self.backbone = timm_config.backbone
        self.backbone_kwargs = {"out_indices": timm_config.out_indices, "in_chans": timm_config.num_channels}
        self.dilation = self.dilation or getattr(timm_config, "output_stride", None) == 16
        self.backbone_config = None
        self.use_timm_backbone = True

    def _has_default_backbone_kwargs(self) -> bool:
        given = dict(self.backbone_kwargs or {})
        # A stride of 16 is what ``dilation`` says already.
        given.pop("output_stride", None)
        self.num_channels = given.pop("in_chans", self.num_channels)
        indices = given.pop("out_indices", None)
        if indices is not None and (isinstance(indices, int) or not str(self.backbone).startswith("resnet")):
            return False  # other backbones may count other stages; a number means the last ones
        return not given and tuple(indices or self.default_out_indices) == self.default_out_indices

    @property
    def object_queries(self) -> int:
        """How many object queries the model has: each finds an object in an image, or none."""
        return self.num_queries

    def set_object_queries(self, count: int) -> None:
        """Changes the number of object queries of a trained model, which only a two-stage model can have.

        Raises:
            SettingError: The model learned each of its queries, or the number is out of range.
        """
        raise SettingError(
            f"queries={count} cannot be set for this model: it learned each of its {self.object_queries} "
            "queries, and only those of a two-stage Deformable DETR can be more or fewer; leave out queries, "
            "or train a model with --queries"
        )

    @property
    def default_out_indices(self) -> tuple[int, ...]:
        """Stages of a timm backbone whose feature maps are used unless ``backbone_kwargs`` says otherwise."""
        return (1, 2, 3, 4)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers; refuses what no configuration may ask for, whatever file it comes from.

        Raises:
            CheckpointError: See :func:`detrkit.common.screening.check_config`; or it is another family's.
            ValueError: A value is out of range or fits no other.
        """
        name = config_dict.get("_name_or_path") if isinstance(config_dict, Mapping) else None
        check_config(config_dict, f"the configuration of {name or 'a model'}")
        model_type = config_dict.get("model_type") or cls.model_type
        if model_type != cls.model_type:
            raise CheckpointError(
                f"{name or 'the checkpoint'} is a {model_type!r} model, not {cls.model_type!r}; load it with "
                "the class of its family, or with detrkit.Detector"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The form that Transformers 4.57 and 5 both read; a null ``backbone_kwargs`` stops the latter."""
        output = super().to_dict()
        if self.normalize_before == type(self).normalize_before:
            output.pop("normalize_before", None)  # which Transformers does not know
        if output.get("backbone_kwargs") is None:
            output.pop("backbone_kwargs", None)
        return output


def _check_names(values: Mapping[str, object], is_timm: bool) -> None:
    """Refuses a backbone that is stored elsewhere, however deep in the configuration it is named."""
    waiting = [(values, is_timm and values.get("backbone_config") is None)]
    while waiting:
        options, is_timm = waiting.pop()
        name = options.get("backbone")
        # Beside a backbone_config a name has no meaning.
        unused = options is values and values.get("backbone_config") is not None
        is_own = is_timm and isinstance(name, str) and _TIMM_NAME.fullmatch(name)
        if name is not None and not unused and not is_own:
            raise CheckpointError(
                f"backbone {str(name)[:200]!r} is stored elsewhere, and a configuration may not have "
                "anything fetched or opened: name one of timm's own models with use_timm_backbone=True, or "
                "give the backbone's configuration as backbone_config"
            )
        for value in options.values():
            inner = value if isinstance(value, (list, tuple)) else (value,)
            waiting += [(v, v.get("model_type") == "timm_backbone") for v in inner if isinstance(v, Mapping)]


def _check_backbone(options: object) -> None:
    """Refuses options of a backbone that are absurd, or that would fetch or run something."""
    if not isinstance(options, Mapping):
        return
    for name, value in options.items():
        if name in _REFUSED_BACKBONE_OPTIONS and value:
            raise ValueError(
                f"{name} is not allowed as an option of the backbone, since it would fetch or run something"
            )
        if is_too_deep(name, value):
            raise ValueError(f"{name} of the backbone must not exceed {MOST_LAYERS} layers, but is {value}")
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and abs(number) > _MAX_BACKBONE_NUMBER:
                raise ValueError(
                    f"{name} of the backbone must not exceed {_MAX_BACKBONE_NUMBER}, but is {number}"
                )
