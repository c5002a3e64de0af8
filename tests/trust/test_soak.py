from pathlib import Path

import pytest
from tools.soak import BROKEN_EVERY, make_images, soak

from tests.conftest import read_json

IMAGES = 3000


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_images(tiny_detr: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", IMAGES)
    seen = soak(str(tiny_detr), tmp_path / "images", tmp_path / "out.json", threads=1)
    broken = IMAGES // BROKEN_EVERY - 1
    assert seen.status == 1
    assert len(read_json(tmp_path / "out.json")["images"]) == IMAGES - broken
    *_, listed = seen.messages.split(f"{broken} of {IMAGES} inputs could not be read:\n")
    assert len(listed.splitlines()) == broken
    # The first third has met all sizes; after it nothing may grow with the number of images.
    early, late = seen.most(IMAGES // 10, IMAGES // 3), seen.most(IMAGES // 3, IMAGES)
    assert late <= 1.05 * early, (early, late)
