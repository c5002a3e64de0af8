"""Whether a model is being recorded for other programs."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether ``torch.export`` is recording the model; False under ``torch.compile``.

    While compiling, PyTorch 2.10 takes its own ``is_exporting`` for True. So the compiler must call this
    function instead of tracing it.
    """
    return torch.compiler.is_exporting()
