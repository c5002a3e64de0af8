"""Ways to run a model: the same call, different machinery.

- ``torch``: eager, prepared for inference (:mod:`detrkit.engines.torch_engine`); the default.
- ``compile``: the same through ``torch.compile`` (:mod:`detrkit.engines.compile_engine`).
- ``onnx``, ``openvino``: an exported model in onnxruntime or OpenVINO, on the CPU and in float32
  (:mod:`detrkit.engines.exported`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrkit.common.errors import SettingError
from detrkit.common.without_torch import require_torch
from detrkit.engines.names import ENGINES, EXPORTED_ENGINES

if TYPE_CHECKING:
    from detrkit.engines.interface import RunnableModel
    from detrkit.engines.placement import Device, Dtype


def check_engine(engine: str) -> None:
    """Raises a SettingError for an unknown engine, a MissingExtraError for one that is not installed."""
    if engine not in ENGINES:
        raise SettingError(f"unknown engine {engine!r}; use one of: {', '.join(ENGINES)}")
    if engine in EXPORTED_ENGINES:
        from detrkit.engines.exported import runtime

        runtime(engine)
    else:
        require_torch(f"the engine {engine!r}")


def start(model: RunnableModel, engine: str, device: Device, dtype: Dtype) -> RunnableModel:
    """A model as an engine runs it, with weights of a type; one with masks is a ``RunnableSegmenter``.

    The engines of torch change the model they are given. The exported ones take a model that was loaded for
    them, or export a model of detrkit for this process alone.
    """
    from detrkit.engines.forks import end_helpers, survive_forks

    if engine in EXPORTED_ENGINES:
        from detrkit.engines.exported import ExportedModel

        if isinstance(model, ExportedModel):
            return model
    survive_forks()
    try:
        return _start(model, engine, device, dtype)
    finally:
        end_helpers()  # those that prepared the model: a program may fork before it runs it


def _start(model: RunnableModel, engine: str, device: Any, dtype: Any) -> RunnableModel:
    """See :func:`start`."""
    if engine in EXPORTED_ENGINES:
        from detrkit.engines.export import export_for_this_process

        return export_for_this_process(model, engine)
    if engine == "compile":
        from detrkit.engines.compile_engine import compile_model

        return compile_model(model, device, dtype)
    from detrkit.engines.torch_engine import parts_of_fixed_shapes, prepare

    model = prepare(model, device, dtype)
    if device.type == "cuda":
        from detrkit.engines.cuda_graphs import replay_recurring

        for part in parts_of_fixed_shapes(model):
            replay_recurring(part)
    return model


def wake(model: RunnableModel, engine: str) -> None:
    """Makes a model that was copied or pickled, after it was started, run as in its own process."""
    if engine in EXPORTED_ENGINES:
        return
    from detrkit.engines.forks import end_helpers, survive_forks

    survive_forks()
    if engine == "compile":
        from detrkit.engines.compile_engine import compile_parts

        compile_parts(model)
    end_helpers()
