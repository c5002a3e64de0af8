"""What the page "Try it in the browser" needs in the site: the model as ONNX, its settings, its runtime.

Nothing of it is in the repository: the model is exported while mkdocs builds, and kept in ``build/browser``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from detrkit import DetectionConfig
from detrkit.checkpoints.registry import resolve_model

ROOT = Path(__file__).resolve().parent.parent
MODEL = "blood-cells"
SAMPLES = (ROOT / "examples" / "BloodImage_00000.jpg",)

# "none", or a folder that `detrkit export --to onnx` wrote.
_MODEL_VARIABLE = "DETRKIT_SITE_MODEL"
# The folder of the npm package; without it browsers fetch it from the address below.
_RUNTIME_VARIABLE = "DETRKIT_ONNXRUNTIME_WEB"
_RUNTIME_ADDRESS = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"
_RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")

# Where they are in the site, and where the page looks for them.
_FOLDER = "assets/browser"

_log = logging.getLogger("mkdocs.hooks.browser_model")


def on_files(files: Files, config: Any) -> Files:
    """Adds the model, the samples and the runtime."""
    folder = model_folder(os.environ.get(_MODEL_VARIABLE))
    if folder is None:
        return files
    runtime = os.environ.get(_RUNTIME_VARIABLE)
    placed = {f"model/{path.name}": path for path in (folder / "model.onnx", *SAMPLES)}
    if runtime:
        placed |= {f"runtime/{name}": Path(runtime) / "dist" / name for name in _RUNTIME_FILES}
    for name, path in placed.items():
        if not path.is_file():
            raise PluginError(f"{path} is missing; correct {_MODEL_VARIABLE} or {_RUNTIME_VARIABLE}")
        files.append(File.generated(config, f"{_FOLDER}/{name}", abs_src_path=str(path)))
    settings = page_settings(folder, "runtime/" if runtime else _RUNTIME_ADDRESS)
    files.append(File.generated(config, f"{_FOLDER}/model/settings.json", content=json.dumps(settings)))
    return files


def model_folder(choice: str | None) -> Path | None:
    """The folder of the exported model; None to leave it out.

    Args:
        choice: "none", a folder, or nothing: then the model is exported, unless that has been done before.
    """
    if choice:
        return None if choice == "none" else Path(choice)
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        _log.info("The page browser.md gets no model: the extra export is not installed.")
        return None
    source = Path(resolve_model(MODEL))
    folder = ROOT / "build" / "browser" / _fingerprint(source)
    if not (folder / "model.onnx").is_file():
        from detrkit.checkpoints.loading import load_pretrained
        from detrkit.engines.export import export_model

        _log.info("Exporting %s for the page browser.md: about a minute.", MODEL)
        model, processor = load_pretrained(str(source), None)
        settings = DetectionConfig.from_pretrained(str(source))
        export_model(model, folder, "onnx", processor=processor, detection_config=settings)
    return folder


def page_settings(folder: Path, runtime: str) -> dict[str, object]:
    """What the page has to know of a model in a folder, whose runtime is at an address."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config["id2label"]
    detection = DetectionConfig.from_pretrained(str(folder))
    if detection.tile_size is not None:
        raise PluginError(f"{folder} cuts images into tiles, which the page does not; use another model")
    return {
        "names": [names[str(label)] for label in range(len(names))],
        "processor": json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")),
        "detection": detection.decisions(),
        "runtime": runtime,
        "samples": [path.name for path in SAMPLES],
    }


def _fingerprint(source: Path) -> str:
    """What is the same for a model and the code that exports it."""
    parts = [*source.glob("*.json"), *source.glob("*.safetensors")]
    for package in ("engines", "models"):
        parts += (ROOT / "src" / "detrkit" / package).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(parts):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
