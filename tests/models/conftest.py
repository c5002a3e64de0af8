"""Tests that take the fixture ``family`` hold for every family."""

import pytest

from tests.models.tiny import FAMILIES, TinyFamily


@pytest.fixture(params=FAMILIES)
def family(request) -> TinyFamily:
    return FAMILIES[request.param]
