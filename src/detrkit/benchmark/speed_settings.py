"""The settings of a model that trade accuracy for speed, and models that have them.

A model with a setting is an ordinary one: fewer decoder layers are a shorter list of layers, another input
size is one of the image processor. So every command and engine runs it, and a copy of it is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from detrkit.checkpoints.loading import check_positions, load_pretrained, read_detection_config
from detrkit.common.errors import MissingExtraError, SettingError
from detrkit.common.terminal import count
from detrkit.engines import check_engine
from detrkit.engines.export import check_format, export_model
from detrkit.engines.names import EXPORTED_ENGINES
from detrkit.engines.placement import is_cuda, place
from detrkit.inference.detector import Detector

if TYPE_CHECKING:
    from detrkit.models.detection import ModelWithHeads
    from detrkit.processing.image_processor import DetrImageProcessorBase

SIZES = (1.0, 0.85, 0.7, 0.6, 0.5)
"""Input sizes that are tried, in parts of the model's own."""

_QUERIES = (0.5, 1, 2)  # times those of a two-stage model
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_FLOAT32, INT8 = "float32", "int8"


Engine: TypeAlias = tuple[str, str]
"""An engine and its precision."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run.

    Attributes:
        size: Part of the model's own input size.
        layers: Decoder layers.
        queries: Object queries.
        engine: What runs the model.
        precision: "float32" or the other type of the weights, or "int8".
    """

    size: float
    layers: int
    queries: int
    engine: str = "torch"
    precision: str = "float32"

    @property
    def engine_and_precision(self) -> Engine:
        """Both."""
        return self.engine, self.precision

    def on(self, engine: Engine) -> Setting:
        """The same on another engine."""
        return replace(self, engine=engine[0], precision=engine[1])


class RunOptions(TypedDict, total=False):
    """What ``Detector.from_pretrained`` takes beside a folder."""

    engine: str
    device: str | None
    dtype: str


class VariableModel:
    """A model that can be had with other settings.

    Attributes:
        own: Its own setting.
        detection_config: Its own detection settings.
        has_masks: Whether it gives masks.
    """

    def __init__(
        self, name: str, *, revision: str | None = None, device: str | None = None, dtype: str = "float32"
    ) -> None:
        """Opens a model.

        Args:
            name: Hub id or folder; not of an exported model.
            revision: Branch, tag or commit on the Hub.
            device: Where PyTorch runs it.
            dtype: The type of its weights there.
        """
        self._name, self._revision, self._device, self._dtype = name, revision, device, dtype
        model, processor = load_pretrained(name, revision)
        config = model.config
        self.own = Setting(
            size=1.0, layers=config.decoder_layers, queries=config.object_queries, precision=dtype
        )
        self.detection_config = read_detection_config(name, revision)
        self.has_masks = hasattr(model, "detector")
        sides = dict(processor.size) if processor.do_resize and processor.size else {}
        self._size = {name: sides[name] for name in _SIDES if sides.get(name)}
        self._two_stage = bool(getattr(config, "two_stage", False))

    @property
    def sizes(self) -> Sequence[float]:
        """Input sizes to try, in parts of the own one, the largest first."""
        return SIZES if self._size else (1.0,)

    @property
    def layers(self) -> Sequence[int]:
        """Numbers of decoder layers to try; a mask head knows the last layer's states only."""
        own = self.own.layers
        return [own] if self.has_masks else list(range(1, own + 1)) or [own]

    @property
    def queries(self) -> Sequence[int]:
        """Numbers of object queries to try; only those of a two-stage model can be changed."""
        own = self.own.queries
        return sorted({max(1, round(own * factor)) for factor in _QUERIES}) if self._two_stage else [own]

    def engines(self, wanted: str | None) -> list[Engine]:
        """Engines and precisions to try: what runs on the device here, or only the engine that is wanted.

        Raises:
            SettingError: The engine does not exist, or not on this device or in this type.
            MissingExtraError: The engine, or what exports for it, is not installed.
        """
        check_engine(wanted or "torch")
        precision = self.own.precision
        on_gpu = is_cuda(place(wanted or "torch", self._device, self._dtype)[0])
        found: list[Engine] = []
        if wanted in EXPORTED_ENGINES:
            check_format(wanted)
            others = [wanted]
        else:
            found.append((wanted or "torch", precision))
            others = [] if wanted or on_gpu or precision != _FLOAT32 else list(EXPORTED_ENGINES)
        for engine in others:
            for kind in (_FLOAT32, INT8):
                with suppress(SettingError, MissingExtraError):  # no int8, or not installed
                    check_format(engine, int8=kind == INT8)
                    found.append((engine, kind))
        return found

    def input_size(self, setting: Setting) -> dict[str, int]:
        """The image processor's size of a setting, in pixels; empty if it does not resize."""
        return {name: max(1, round(side * setting.size)) for name, side in self._size.items()}

    def input_name(self, setting: Setting) -> str:
        """The input size in words: "288x384", for shortest and longest edge or height and width."""
        return "x".join(map(str, self.input_size(setting).values())) or "as it is"

    def in_words(self, setting: Setting) -> str:
        """A setting as a part of a sentence."""
        return (
            f"input {self.input_name(setting)}, {count(setting.layers, 'decoder layer')}, "
            f"{setting.queries} queries, {setting.engine} in {setting.precision}"
        )

    def load(self, setting: Setting) -> tuple[ModelWithHeads, DetrImageProcessorBase]:
        """The model with a setting's size, layers and queries, and its image processor.

        Raises:
            SettingError: Images of that size have no room for so many queries.
        """
        queries = None if setting.queries == self.own.queries else setting.queries
        model, processor = load_pretrained(self._name, self._revision, queries)
        if setting.layers != self.own.layers:
            model.keep_decoder_layers(setting.layers)
        if setting.size != 1.0:
            processor.size = self.input_size(setting)
        if setting.queries > self.own.queries:
            check_positions(model, processor, setting.queries)
        return model, processor

    def detector(self, setting: Setting) -> Detector:
        """A detector in this process that runs a setting on PyTorch."""
        model, processor = self.load(setting)
        detector = Detector(model, processor, device=self._device, dtype=self._dtype)
        detector.detection_config = self.detection_config
        return detector

    def write(self, setting: Setting, folder: Path, images: Callable[[], Sequence[Path]]) -> None:
        """Writes the model with a setting into a folder.

        Args:
            setting: The setting.
            folder: A new folder.
            images: Gives what ranges of int8 are measured on.
        """
        model, processor = self.load(setting)
        if setting.engine in EXPORTED_ENGINES:
            export_model(
                model,
                folder,
                setting.engine,
                processor=processor,
                calibration=images() if setting.precision == INT8 else None,
                detection_config=self.detection_config,
            )
            return
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        self.detection_config.save_pretrained(folder)

    def run_options(self, setting: Setting) -> RunOptions:
        """What ``Detector.from_pretrained`` is to be told beside the folder that :meth:`write` wrote."""
        if setting.engine in EXPORTED_ENGINES:
            return {"engine": setting.engine}
        return {"engine": setting.engine, "device": self._device, "dtype": self._dtype}
