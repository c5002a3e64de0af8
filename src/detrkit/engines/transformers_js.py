"""Models as folders that the npm package ``@huggingface/transformers`` (transformers.js) loads.

Its preparation and its post-processing cannot be told what detrkit does, so an ONNX export gets more parts.

In front: transformers.js enlarges images until the longer edge reaches its limit, shrinks them without
antialiasing, and passes a mask of 64x64 pixels whatever the size. Here it passes the image's bytes, as
float32; the graph resizes them by the original's rule, normalises, and makes the mask. The threshold of masks
is a constant.

Behind: transformers.js reads every detector as DETR, one object for each row of the logits, the best class of
a softmax that ends with "no object". detrkit's own reading of the outputs makes one row of each candidate,
with logits whose softmax is the candidate's score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import detrkit
from detrkit.common.errors import DetrkitError, SettingError
from detrkit.common.files import atomic_folder
from detrkit.common.schema import JsonObject
from detrkit.engines.export import TOLERANCE, Export, check_format, export_model
from detrkit.engines.exported import PrivateFolder
from detrkit.engines.int8_weights import with_int8_weights
from detrkit.engines.transformers_js_graph import MASK_THRESHOLD, Reading, joined, reading_for
from detrkit.models.segmentation import SegmentationModel
from detrkit.processing.image_processor import DetrImageProcessorBase
from detrkit.processing.options import Settings
from detrkit.processing.resize import BILINEAR, pillow_filter, size_for
from detrkit.results.detection_config import DetectionConfig

# Families that transformers.js knows; the others become DETR, whose outputs they have by then.
_KNOWN = ("detr", "table-transformer")

# (height, width) of the images that the changed graph is checked with.
_CHECKED = ((320, 416), (397, 301))


def export_for_transformers_js(
    model: PreTrainedModel,
    output: str | os.PathLike[str],
    *,
    processor: DetrImageProcessorBase,
    int8: bool = False,
    verify: bool = True,
    detection_config: DetectionConfig | None = None,
) -> Export:
    """Exports a model into a folder that transformers.js loads in Node and in browsers.

    Its pipelines find what a ``Detector`` without an overlap filter finds at any threshold above 0.01; a
    model with masks at any above ``MASK_THRESHOLD``. transformers.js does not read detection settings: pass
    it the threshold.

    Args:
        model: A detection model of detrkit, as for :func:`~detrkit.engines.export.export_model`.
        output: Folder to write: config.json, preprocessor_config.json, detection_config.json and
            onnx/model.onnx.
        processor: The model's image processor.
        int8: Also write onnx/model_quantized.onnx, with large weights stored as int8: a quarter of the size,
            computed in float32 all the same. Browsers then load that one by default.
        verify: Compare with PyTorch before the folder gets its name.
        detection_config: The model's detection settings, stored for whoever reads the folder.

    Raises:
        SettingError: transformers.js cannot prepare images as the processor does, or the folder has files of
            an earlier export that would stay.
        MissingExtraError: Packages that this needs are not installed.
        DetrkitError: The exported model gives other results, or the folder cannot be written. Nothing of it
            is left then.
    """
    check_format("onnx")
    import onnx

    output = Path(output)
    settings = Settings.of(processor, {})
    processor_settings = _processor_settings(settings, model)
    names = ("model.onnx", *(("model_quantized.onnx",) if int8 else ()))
    _check_left_over(output / "onnx", names)
    plain = PrivateFolder()
    exported = export_model(model, plain.path, "onnx", processor=processor, verify=verify)
    graph = onnx.load(plain.path / "model.onnx")
    with atomic_folder(output) as folder:
        _write_json(_config(model, int8), folder / "config.json")
        _write_json(processor_settings, folder / "preprocessor_config.json")
        (detection_config or DetectionConfig()).save_pretrained(folder)
        (folder / "onnx").mkdir()
        file = folder / "onnx" / "model.onnx"
        reading = reading_for(processor, graph)
        onnx.save(joined(graph, reading, settings), file)
        if verify:
            _compare(plain.path / "model.onnx", reading, file, settings)
        if int8:
            onnx.save(with_int8_weights(onnx.load(file)), folder / "onnx" / "model_quantized.onnx")
    return Export(folder=output, differences=exported.differences)


def caller_notes(config: DetectionConfig) -> str:
    """What callers of transformers.js have to know of detection settings, which it does not read."""
    notes = f"pass {{threshold: {config.least_threshold:g}}}"
    if isinstance(config.threshold, Mapping):
        notes += f" and keep what is above the {config.describe()}"
    unread = {
        "overlap filter": config.overlap,
        "most objects of an image": config.max_objects,
        "calibration": ", ".join(config.calibration) if config.calibration else None,
        "tiles": config.tile_size,
    }
    missing = [f"{name} ({value})" for name, value in unread.items() if value is not None]
    return f"{notes}; not applied: {', '.join(missing)}" if missing else notes


# The two JSON files


def _config(model: PreTrainedModel, int8: bool) -> JsonObject:
    own = model.config.model_type
    known = own if own in _KNOWN else "detr"
    prefix = "TableTransformer" if known == "table-transformer" else "Detr"
    task = "Segmentation" if isinstance(model, SegmentationModel) else "ObjectDetection"
    return {
        "exported_by": f"detrkit {detrkit.__version__}",
        "exported_from": own,
        "model_type": known,
        "architectures": [f"{prefix}For{task}"],
        "id2label": {str(label): name for label, name in model.config.id2label.items()},
        "label2id": dict(model.config.label2id),
        # In browsers it would look for a quantised file.
        **({} if int8 else {"transformers.js_config": {"dtype": "fp32"}}),
    }


def _processor_settings(settings: Settings, model: PreTrainedModel) -> JsonObject:
    """The content of preprocessor_config.json.

    Raises:
        SettingError: Neither transformers.js nor the graph can prepare images so.
    """
    channels = model.config.num_channels
    if channels != 3:
        raise SettingError(f"transformers.js makes images of 3 channels, and the model takes {channels}")
    if settings.pad_size is not None:
        raise SettingError(
            "images for transformers.js cannot be padded to a fixed size; take pad_size out of the image "
            "processor"
        )
    if settings.size is not None and pillow_filter(settings.resample) != BILINEAR:
        raise SettingError(
            "images for transformers.js are resized with the bilinear filter; set resample to 2"
        )
    return {
        "image_processor_type": "DetrImageProcessor",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_pad"), False),
    }


def _write_json(content: JsonObject, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_left_over(folder: Path, written: tuple[str, ...]) -> None:
    """Raises a SettingError for models in the folder that would stay beside those that are written."""
    others = sorted(path.name for path in folder.glob("model*.onnx") if path.name not in written)
    if others:
        raise SettingError(
            f"{folder} has {others[0]} of an earlier export, which transformers.js would mix up with this "
            "one; remove it, or choose another folder"
        )


# The check


def _compare(plain: Path, reading: Reading, file: Path, settings: Settings) -> None:
    """Raises a DetrkitError where a file's outputs are not those of the plain export, as read by detrkit."""
    for sides in _CHECKED:
        # A size that is not resized again, so that both have the same pixels.
        size = sides if settings.size is None else size_for(*sides, settings.size)
        image = np.random.default_rng(0).integers(0, 256, (3, *size)).astype(np.float32)
        pixels = np.empty_like(image)
        if settings.scaling is None:
            pixels[:] = image
        else:
            settings.scaling.apply(image, pixels)
        outputs = _run(plain, pixels)
        logits, boxes = reading(*(outputs[name] for name in reading.inputs))
        found = _run(file, image)
        pairs = {
            "scores": (found["logits"].softmax(-1), logits.softmax(-1)),
            "boxes": (found["pred_boxes"], boxes),
        }
        if "pred_masks" in found:
            pairs["masks"] = (found["pred_masks"], outputs["pred_masks"])
        for name, (value, expected) in pairs.items():
            same = value.shape == expected.shape
            if not (same and torch.allclose(value, expected, rtol=TOLERANCE, atol=TOLERANCE)):
                raise DetrkitError(
                    f"the {name} of the model for transformers.js differ from PyTorch's on images of "
                    f"{size[0]}x{size[1]} pixels; nothing was written"
                )


def _run(file: Path, image: np.ndarray) -> dict[str, torch.Tensor]:
    """The outputs of an ONNX file for an image (3, height, width)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {
        "pixel_values": image[None],
        "pixel_mask": np.ones((1, *image.shape[1:]), np.int64),
        "threshold": np.array(MASK_THRESHOLD, np.float32),
    }
    names = [value.name for value in session.get_outputs()]
    taken = {value.name: inputs[value.name] for value in session.get_inputs()}
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(names, taken))}
