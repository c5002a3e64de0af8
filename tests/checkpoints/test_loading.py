from __future__ import annotations

import builtins
import importlib
import io
import shutil
from collections import Counter
from pathlib import Path

import pytest

from detrkit import Detector, DetrConfig
from detrkit.common.errors import CheckpointError
from detrkit.engines.exported import MANIFEST


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each step of loading and each JSON file is taken."""
    found: Counter[str] = Counter()
    steps = (
        "detrkit.checkpoints.registry.resolve_model",
        "detrkit.inference.detector.check_engine",
        "detrkit.inference.detector.place",
        "detrkit.checkpoints.loading.check_folder",
        "detrkit.checkpoints.exported.check_folder",
        "detrkit.models.base.check_folder",
        "detrkit.engines.exported.read_manifest",
    )
    for path in steps:
        module, _, name = path.rpartition(".")
        real = getattr(importlib.import_module(module), name)

        def counted(*args: object, name: str = name, real: object = real, **options: object) -> object:
            found[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(path, counted)

    read = DetrConfig.from_dict.__func__

    def from_dict(cls: type, *args: object, **options: object) -> object:
        found["configuration"] += 1
        return read(cls, *args, **options)

    monkeypatch.setattr(DetrConfig, "from_dict", classmethod(from_dict))
    real_open = io.open

    def opened(file: object, *args: object, **options: object) -> object:
        if str(file).endswith(".json"):
            found[Path(str(file)).name] += 1
        return real_open(file, *args, **options)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    return found


def test_loading_a_folder_takes_each_step_and_reads_each_file_once(
    tiny_detr: Path, counts: Counter[str]
) -> None:
    Detector.from_pretrained(tiny_detr, device="cpu")
    assert counts == dict.fromkeys(
        (
            "resolve_model",
            "check_engine",
            "place",
            "check_folder",
            "read_manifest",
            "configuration",
            "config.json",
            "preprocessor_config.json",
        ),
        1,
    )


def test_loading_an_exported_folder_takes_each_step_and_reads_each_file_once(
    tiny_detr: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    from detrkit.checkpoints.loading import load_pretrained
    from detrkit.engines.export import export_model

    model, processor = load_pretrained(str(tiny_detr), None)
    export_model(model, tmp_path / "exported", "onnx", processor=processor, verify=False)
    counts.clear()
    Detector.from_pretrained(tmp_path / "exported")
    assert counts == dict.fromkeys(
        (
            "resolve_model",
            "check_engine",
            "place",
            "check_folder",
            "read_manifest",
            "config.json",
            "preprocessor_config.json",
            "detection_config.json",
            MANIFEST,
        ),
        1,
    )


def test_a_folder_without_an_image_processor_is_refused_with_the_remedy(
    tiny_detr: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_detr, tmp_path / "model"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no preprocessor_config\.json.*processor\.save_pretrained"
    ):
        Detector.from_pretrained(folder)
