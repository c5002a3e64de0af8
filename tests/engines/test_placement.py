from __future__ import annotations

import pytest
import torch

from detrkit.engines.placement import place
from detrkit.errors import SettingError


def test_cards_are_counted_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert place("torch", "cuda:0", None) == (torch.device("cuda:0"), torch.float32)
    with pytest.raises(SettingError, match="torch sees 1 CUDA device"):
        place("torch", "cuda:1", "fp16")
