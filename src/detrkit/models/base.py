"""The base of all models: initialisation, and loading and saving every checkpoint layout.

Parameters are named as in the files on the Hub (the names of Transformers 4), so most files load as they
are. What is named otherwise, state dicts of Transformers 5 and panoptic checkpoints read by a detector,
is renamed while loading.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from detrkit.common.errors import CheckpointError, SettingError
from detrkit.common.log import logger
from detrkit.common.screening import check_folder, weights_limit
from detrkit.models.adapters import add_adapter, base_of_adapter
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.layers.attention import ProjectedAttention
from detrkit.models.layers.backbone import (
    ConvEncoder,
    FrozenBatchNorm2d,
    freeze_early_stages,
    loading_checkpoint,
)
from detrkit.models.layers.mask_head import MASK_HEAD_RENAMES, AttentionMap, MaskHead
from detrkit.models.layers.position_encoding import LearnedPositionEncoding
from detrkit.models.layers.transformer import TransformerLayer
from detrkit.models.weights import check_numbers, check_types

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys
    from typing_extensions import Self


# While Transformers loads a model, it replaces functions of PyTorch and of its own that initialise weights,
# and PyTorch's default dtype, for all threads. Two at once give models of wrong weights without a word.
_one_at_a_time = threading.RLock()


def _renew_lock() -> None:
    """In a forked process, where the thread that held it does not exist."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)

# Transformers 5 keeps learned positions outside the backbone.
_POSITIONS_V4 = "backbone.position_embedding."
_POSITIONS_V5 = "position_embedding."

# Where a detector's tensors begin, whichever model owns it.
_DETECTOR = r"^(?:\w*detr\.)?(?=model\.|class_labels_classifier\.|bbox_predictor\.)"

# An optional owner of the detector, the base model, and one of its Transformer layers.
_LAYER = r"^((?:\w*detr\.)?(?:model\.)?(?:en|de)coder\.layers\.\d+"

_SELF_INITIALISING = (
    *(nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm),
    *(ProjectedAttention, TransformerLayer, LearnedPositionEncoding, AttentionMap, MaskHead),
)


class DetrFamilyPreTrainedModel(PreTrainedModel):
    """Base of the models of all families."""

    config: DetrFamilyConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["ConvEncoder", "EncoderLayer", "DecoderLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"num_batches_tracked$",
        r"^(mask_head|bbox_attention)\.",  # of a segmentation model, read by a detector
    ]

    # Whether an engine has prepared the model for inference: its modules and tensors are others then.
    is_prepared = False

    # What a detector's tensors are called inside of this model: a segmentation model has one as an attribute.
    # Either kind loads the other's files.
    detector_prefix: ClassVar[str] = ""

    # Regular expression in a file's tensor names -> replacement, tried in order.
    checkpoint_renames: ClassVar[dict[str, str]] = {
        r"backbone\.model\.": "backbone.conv_encoder.model.",
        r"conv_encoder\.model\._backbone\.": "conv_encoder.model.",
        _LAYER + r"\.(?:self|encoder)_attn)\.o_proj": r"\1.out_proj",
        _LAYER + r")\.mlp\.fc1": r"\1.fc1",
        _LAYER + r")\.mlp\.fc2": r"\1.fc2",
        r"^((?:\w*detr\.)?(?:model\.)?(?:en|de)coder)\.norm\.": r"\1.layernorm.",
        r"(?<!backbone\.)position_embedding\.(?=row|column)": "backbone.position_embedding.",
        **MASK_HEAD_RENAMES,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises one module; its children have been initialised before.

        The original leaves heads, projections and embeddings to PyTorch's defaults and gives the
        Transformer's matrices Xavier uniform values.
        """
        if hasattr(module, "init_non_persistent_buffers"):
            # timm's tables (of relative positions, say) that no checkpoint holds.
            module.init_non_persistent_buffers()
        elif isinstance(module, FrozenBatchNorm2d):
            for buffer, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
                nn.init.constant_(getattr(module, buffer), value)
        elif isinstance(module, _SELF_INITIALISING):
            module.reset_parameters()

    def _initialize_weights(self, module: nn.Module, *_: bool) -> None:
        """Initialises every module that is not set yet, those without parameters of their own included.

        For classes outside Transformers the library leaves out the latter, but here they know best: an
        attention knows how its projections begin.
        """
        super()._initialize_weights(module)

    def post_init(self) -> None:
        """Ends every model's construction; refuses a model that there is no memory for.

        While a checkpoint is loaded, models are first made without memory, so none is spent on it.
        """
        super().post_init()
        wanted = sum(tensor.numel() * tensor.element_size() for tensor in self.parameters())
        limit = weights_limit()
        if wanted > limit:
            name = self.config.name_or_path or type(self).__name__
            raise CheckpointError(
                f"the configuration of {name} asks for {wanted} bytes of weights, more than the {limit} "
                "bytes that this machine has memory for or that a checkpoint may have"
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a model from a Hub id or a folder, in any layout that these checkpoints come in.

        Backbone weights are never fetched: the checkpoint holds them. A folder with an adapter of PEFT is
        loaded with the model that it names. All arguments are those of
        :meth:`transformers.PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: The checkpoint is another family's, its tensors do not fit the configuration, or
                its files must not be read (see :mod:`detrkit.common.screening`).
            OSError: There is no such repository, folder or file.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        base = base_of_adapter(folder) if pretrained_model_name_or_path else None
        if base is not None:
            kwargs.pop("subfolder", None)
            loaded = cls.from_pretrained(base, *args, **kwargs)
            add_adapter(loaded[0] if isinstance(loaded, tuple) else loaded, folder)
            return loaded
        renames = {_DETECTOR: cls.detector_prefix, **cls.checkpoint_renames}
        renames |= kwargs.pop("key_mapping", None) or {}
        wants_info = kwargs.pop("output_loading_info", False)
        accept_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        is_checked = kwargs.pop("folder_is_checked", False)  # by the loader, which has read its files
        if not is_checked and pretrained_model_name_or_path and Path(pretrained_model_name_or_path).is_dir():
            check_folder(folder)
        with _one_at_a_time, loading_checkpoint(renames):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                key_mapping=renames,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the names in the message
                **kwargs,
            )
        if info["mismatched_keys"] and not accept_mismatch:
            raise CheckpointError(_explain_mismatch(pretrained_model_name_or_path, info["mismatched_keys"]))
        if pretrained_model_name_or_path is not None:
            missing = () if accept_mismatch else info["missing_keys"]
            _check_tensors(model, pretrained_model_name_or_path, info["unexpected_keys"], missing)
        check_numbers(model, pretrained_model_name_or_path or "the state_dict")
        # Transformers would undo the renames when saving; files are always saved with the Hub's names.
        model._weight_conversions = None
        # Loading replaces parameters by new ones, which are all trainable.
        for encoder in (m for m in model.modules() if isinstance(m, ConvEncoder)):
            freeze_early_stages(encoder.model)
        _report_new_weights(model, info)
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Transformers, which would convert integers and complex numbers; those are refused."""
        if getattr(model.config, "quantization_config", None) is None:
            check_types(checkpoint_files or (), state_dict)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes configuration and weights in the Hub's layout, which Transformers 4.57 and 5 load.

        Tensors that these look for in different places, such as learned positions, are written under the
        names of both. All arguments are those of :meth:`transformers.PreTrainedModel.save_pretrained`.
        """
        if self.is_prepared:
            raise CheckpointError(
                "a model that was prepared for inference cannot be saved: save the one it was made from"
            )
        if Path(save_directory).is_file():
            raise CheckpointError(f"cannot save a model into {save_directory}: it is a file, not a folder")
        weights = Path(save_directory, "model.safetensors")
        mode = stat.S_IMODE(weights.stat().st_mode) if weights.is_file() else None
        state_dict = dict(kwargs.pop("state_dict", None) or self.state_dict())
        for second, first in self.second_names(state_dict).items():
            state_dict[second] = state_dict[first].clone()
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        # safetensors makes files that only their owner can read; a new configuration has the umask's mode.
        config = Path(save_directory, "config.json")
        for file in Path(save_directory).glob("*.safetensors") if config.exists() else ():
            file.chmod(mode or stat.S_IMODE(config.stat().st_mode))

    def train(self, mode: bool = True) -> Self:
        """As :meth:`torch.nn.Module.train`; refuses a prepared model, which has nothing left to train."""
        if mode and self.is_prepared:
            raise SettingError(
                "a model that was prepared for inference cannot be trained: train the one it was made from"
            )
        return super().train(mode)

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As :meth:`torch.nn.Module.load_state_dict`, without the second names of saved tensors."""
        doubled = self.second_names(state_dict).keys()
        return super().load_state_dict(
            {k: v for k, v in state_dict.items() if k not in doubled}, strict, assign
        )

    def second_names(self, names: Iterable[str]) -> dict[str, str]:
        """Names under which a tensor is saved once more for other readers -> its own name."""
        return {n.replace(_POSITIONS_V4, _POSITIONS_V5): n for n in names if _POSITIONS_V4 in n}


def _explain_mismatch(
    source: str | os.PathLike[str] | None, mismatched: Iterable[tuple[str, torch.Size, torch.Size]]
) -> str:
    listed = [f"{name} is {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in sorted(mismatched)]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return (
        f"tensors of {source} do not fit the configuration: {'; '.join(listed[:4])}{more}. Load it with its "
        "own configuration, or pass ignore_mismatched_sizes=True to reinitialise these tensors (for another "
        "number of labels or queries)."
    )


def _check_tensors(
    model: DetrFamilyPreTrainedModel,
    source: str | os.PathLike[str],
    unexpected: Iterable[str],
    missing: Iterable[str],
) -> None:
    """Refuses the weights of another network: with parts that ours lacks, or without a part that all have.

    Of tensors beside the network, and of heads that are new, Transformers' own report is enough.
    """
    parts = tuple(f"{name}." for name, _ in model.named_children())
    has_heads = "backbone." not in parts
    core = f"{model.detector_prefix}model." if has_heads else ""
    own = ("model.", *parts) if has_heads else (*parts, *(f"model.{part}" for part in parts))
    surplus = sorted(name for name in unexpected if name.startswith(own))
    lacking = sorted(name for name in missing if name.startswith(core))
    remedy = "load them with the class and the configuration that they were saved with"
    if any(re.search(r"\bencoder\.(?:layer)?norm\.", name) for name in surplus):
        remedy = (
            "a norm at the end of the encoder means pre-norm layers: for DETR, set normalize_before to true "
            "in config.json"
        )
    for names, problem in ((surplus, "have tensors without a place in"), (lacking, "lack tensors of")):
        if names:
            raise CheckpointError(
                f"the weights of {source} {problem} {type(model).__name__}: {len(names)}, such as "
                f"{names[0]}; {remedy}"
            )


def _report_new_weights(
    model: DetrFamilyPreTrainedModel, info: Mapping[str, Iterable[tuple[str, torch.Size, torch.Size]]]
) -> None:
    """Says in one line each what a changed number of labels or queries means."""
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    if any("class" in name for name in mismatched):
        logger.warning(
            "The class head was reinitialised for %d labels: train it before use.",
            model.config.num_labels,
        )
    if any("query_position_embeddings" in name for name in mismatched):
        logger.warning(
            "The object queries were reinitialised because their number changed to %d: train the model "
            "before use, for detections come from its queries.",
            model.config.num_queries,
        )
