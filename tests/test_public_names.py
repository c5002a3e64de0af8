"""The import paths that users and uploaded files rely on, whatever the files behind them are called."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import detrkit

PUBLIC = {
    "detrkit": ["Detector", "DetrForObjectDetection", "ImageLimits", "pipeline", "register", "push_to_hub"],
    "detrkit.data": ["DetectionDataset", "check_dataset", "read_voc", "read_yolo"],
    "detrkit.endpoint": ["EndpointHandler"],
    "detrkit.errors": ["CheckpointError", "DetrkitError", "ImageError", "SettingError"],
    "detrkit.evaluation": [
        "PanopticQuality",
        "evaluate_detector",
        "evaluate_predictions",
        "match_categories",
    ],
    "detrkit.hub": ["plain_card", "push_to_hub"],
    "detrkit.processing": ["load_frames", "load_image"],
    "detrkit.results": ["draw_boxes"],
    "detrkit.training": ["TrainingRecipe", "train"],
}


@pytest.mark.parametrize(("place", "name"), [(place, name) for place in PUBLIC for name in PUBLIC[place]])
def test_a_public_name_is_where_users_import_it_from(place: str, name: str) -> None:
    module = importlib.import_module(place)
    assert getattr(module, name).__name__ == name
    assert name in dir(module)


def test_every_name_of_the_package_can_be_had() -> None:
    assert {name for name in detrkit.__all__ if not hasattr(detrkit, name)} == set()


def test_a_name_that_does_not_exist_is_told() -> None:
    with pytest.raises(AttributeError, match=r"module 'detrkit.data' has no attribute 'read_yoloo'"):
        importlib.import_module("detrkit.data").read_yoloo  # noqa: B018


def test_importing_the_packages_imports_no_torch() -> None:
    code = f"import sys, {', '.join(PUBLIC)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
