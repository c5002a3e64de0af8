"""Tests that take the fixture ``family`` hold for every family, the others' names say for which."""

import pytest

from tests.tiny import FAMILIES, TinyFamily


@pytest.fixture(params=FAMILIES)
def family(request) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.points is None])
def dense_family(request) -> TinyFamily:
    """Families that attend to every pixel of one feature map, whose queries have no content at first.

    Deformable DETR has neither a weight for every pixel nor a map that could replace the image.
    """
    return FAMILIES[request.param]


@pytest.fixture(params=[name for name, family in FAMILIES.items() if not family.proposes])
def one_stage_family(request) -> TinyFamily:
    """Families with learned queries; a model that proposes its own has none, and needs heads to run."""
    return FAMILIES[request.param]
