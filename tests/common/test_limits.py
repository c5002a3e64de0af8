from __future__ import annotations

import pytest

from detrkit import ImageLimits
from detrkit.common.limits import PIXELS_VARIABLE
from detrkit.errors import SettingError


@pytest.mark.parametrize(
    "limits",
    [
        {"timeout": None},
        {"timeout": "5"},
        {"max_bytes": float("nan")},
        {"max_pixels": True},
        {"max_redirects": None},
    ],
)
def test_limits_must_be_numbers(limits: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(limits))):
        ImageLimits(**limits)


def test_a_limit_of_thousands_of_digits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIXELS_VARIABLE, "9" * 5000)
    with pytest.raises(SettingError, match=PIXELS_VARIABLE):
        ImageLimits()
