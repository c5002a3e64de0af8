"""Numbers of a GPU that can be compared with a CPU's."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Convolutions in float32 as float32, which a GPU does not do by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
