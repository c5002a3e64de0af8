"""The models that a visitor can choose from, loaded when they are first used."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.checkpoints.registry import BUNDLED, REGISTRY, resolve_model
from detrkit.common.errors import DetrkitError, SettingError

if TYPE_CHECKING:
    from detrkit.inference.detector import Detector

# Beside the models a demo is started with, it offers those that need no conversion first.
_OFFERED = (*BUNDLED, *(name for name, entry in REGISTRY.items() if entry.hub_id is not None))


class ModelChoices:
    """Models by the names that visitors see; the last few that were used stay loaded.

    A visitor never sees the path of a model's folder, only its name.

    Attributes:
        labels: The names, the first one is the page's choice.
    """

    def __init__(
        self,
        models: Sequence[str] = (),
        *,
        capacity: int = 2,
        queries: int | None = None,
        load: Callable[[str], Detector] | None = None,
    ) -> None:
        """Lists the models without loading one.

        Args:
            models: Hub ids, folders or short names to offer before all others.
            capacity: How many models stay loaded, at least 1.
            queries: Object queries of ``models``, which must be two-stage; None as trained.
            load: What loads a model; ``Detector.from_pretrained`` when None.

        Raises:
            CheckpointError: A name means no model.
            SettingError: ``capacity`` is less than 1, or there are queries for no model.
        """
        if queries is not None and not models:
            raise SettingError(
                "--queries requires --model; it changes the number of queries of the named models"
            )
        if capacity < 1:
            raise SettingError(f"a demo needs room for at least 1 loaded model, not {capacity}")
        self._models: dict[str, str] = {}
        for model in models:
            resolve_model(model)  # a misspelt name is told before the page is there
            self._add(model)
        self._queries = dict.fromkeys(self._models.values(), queries)
        for name in _OFFERED:
            self._models.setdefault(name, name)
        self.labels = list(self._models)
        self._capacity = capacity
        self._load = load or self._from_pretrained
        self._loaded: OrderedDict[str, Detector] = OrderedDict()
        self._lock = threading.Lock()

    def _add(self, model: str) -> None:
        label = model
        if os.path.isdir(model):  # noqa: PTH112
            model = os.path.abspath(model)  # noqa: PTH100
            label = Path(model).name
        name, number = label, 2
        while self._models.get(name, model) != model:
            name, number = f"{label} ({number})", number + 1
        self._models[name] = model

    def is_loaded(self, label: str) -> bool:
        """Whether ``get`` gives this model at once."""
        return label in self._loaded

    def get(self, label: str) -> Detector:
        """The model with this name, loaded if need be; the one unused for longest then makes room.

        Raises:
            DetrkitError: There is no such model, or it cannot be loaded.
        """
        if label not in self._models:
            raise SettingError(f"unknown model {label!r}; choose one from the list")
        with self._lock:
            if label in self._loaded:
                self._loaded.move_to_end(label)
                return self._loaded[label]
            while len(self._loaded) >= self._capacity:
                self._loaded.popitem(last=False)
            model = self._models[label]
            try:
                detector = self._load(model)
            except DetrkitError as error:
                # The message names the place, which is not the visitor's business.
                text = str(error).replace(resolve_model(model), label).replace(model, label)
                raise DetrkitError(text) from error
            self._loaded[label] = detector
            return detector

    def _from_pretrained(self, model: str) -> Detector:
        from detrkit.common.terminal import quiet_libraries
        from detrkit.inference.detector import Detector

        quiet_libraries()
        return Detector.from_pretrained(model, queries=self._queries.get(model))
