"""Whether a model is being recorded for other programs."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export records the model: not whether torch.compile does.

    While it compiles, PyTorch 2.10 answers its own ``is_exporting`` with True. So this is called, not traced.
    """
    return torch.compiler.is_exporting()
