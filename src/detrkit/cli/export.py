"""``detrkit export``: a model as a folder that onnxruntime, OpenVINO or transformers.js runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrkit.cli import options
from detrkit.cli.reading import ImageReader
from detrkit.common.errors import ImageError, SettingError
from detrkit.common.outputs import Output, check_outputs
from detrkit.common.progress import with_progress
from detrkit.common.terminal import count, print_table, quiet_libraries, say
from detrkit.common.text import percent
from detrkit.engines.names import TRANSFORMERS_JS
from detrkit.inference.inputs import ImageInput, find_images

if TYPE_CHECKING:
    from rich.table import Table

    from detrkit.data.coco import DetectionDataset

# More images hardly change the measured ranges.
_CALIBRATION_IMAGES = 128

_FILES = (
    "config.json",
    "preprocessor_config.json",
    "detection_config.json",
    "engine.json",
    "model.onnx",
    "model.xml",
    "model.bin",
)
_MANIFEST, _MARK = "engine.json", b'{\n  "engine": "'
# Of transformers.js: each file and the one that bears the mark, or itself.
_JS_FILES = {
    "config.json": None,
    "preprocessor_config.json": "config.json",
    "detection_config.json": "config.json",
    "onnx/model.onnx": None,
    "onnx/model_quantized.onnx": None,
}
_JS_MARK = b"detrkit"

Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="Quantise large layers to int8: for OpenVINO, with --calibration; for transformers.js, stored "
        "as int8 in a second file.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help=f"Folder of images to measure value ranges on; uses up to {_CALIBRATION_IMAGES} of them."
    ),
]
Annotations = Annotated[
    Path | None, typer.Option(help="COCO instances JSON to measure the AP that int8 costs.")
]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Folder of the annotated images.  [default: that of --calibration]")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before writing the folder.")
]


def export(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    model: options.Model,
    to: Annotated[str, typer.Option("--to", help="onnx, openvino or transformers.js.")],
    int8: Int8 = False,
    calibration: Calibration = None,
    data: options.Data = None,
    annotations: Annotations = None,
    images: ImageFolder = None,
    revision: options.Revision = None,
    queries: options.Queries = None,
    verify: Verify = True,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Export a model for onnxruntime, OpenVINO or transformers.js.

    The folder contains the model with variable batch size, height and width, its configuration and its image
    processor. The other commands take it as `--model`, unless it is for transformers.js, which runs it in
    Node and in browsers. Requires the extra `export`.
    """
    from detrkit.checkpoints.identity import model_files
    from detrkit.checkpoints.registry import resolve_model

    name = resolve_model(model)  # a misspelt name should not wait for torch
    for_js = to == TRANSFORMERS_JS
    _check_settings(int8, calibration, data, annotations, images, for_js=for_js)
    read = [*model_files(model), calibration, annotations, images]
    check_outputs(_outputs(output, for_js), read, overwrite=overwrite)
    if not debug:
        quiet_libraries()
    if for_js:
        _export_for_transformers_js(name, revision, queries, output, int8, verify)
    else:
        sources = calibration, data, annotations, images
        _export_for_engine(name, revision, queries, output, to, int8, verify, sources, debug)


def _outputs(output: Path, for_js: bool) -> list[Output]:
    """The files that an export can write."""
    if for_js:
        return [Output("OUTPUT", output / file, _JS_MARK, witness) for file, witness in _JS_FILES.items()]
    return [Output("OUTPUT", output / file, _MARK, _MANIFEST) for file in _FILES]


def _export_for_engine(
    name: str,
    revision: str | None,
    queries: int | None,
    output: Path,
    to: str,
    int8: bool,
    verify: bool,
    sources: tuple[Path | None, str | None, Path | None, Path | None],
    debug: bool,
) -> None:
    """Writes a folder for an engine; ``sources`` are the options of int8 in the order of the command's."""
    from detrkit.checkpoints.loading import load_pretrained, read_detection_config
    from detrkit.engines.export import check_format, export_model
    from detrkit.evaluation import evaluate_dataset
    from detrkit.inference.detector import Detector

    calibration, data, annotations, images = sources
    check_format(to, int8=int8)
    sample = dataset = None
    if data is not None:
        sample, dataset = _calibration_data(data, debug)
    elif calibration is not None:
        sample = _calibration_images(calibration, debug)
    loaded, processor = load_pretrained(name, revision, queries)
    settings = read_detection_config(name, revision)
    folder = images or calibration
    measure = None
    if annotations is not None and folder is not None:
        dataset = options.open_data(None, None, folder, annotations)
    if dataset is not None:
        measure = partial(evaluate_dataset, dataset=dataset, masks=False)
        # Before the export, as it shows mistakes in annotations.
        before = measure(Detector(loaded, processor, device="cpu").with_config(settings)).stats
    exported = export_model(
        loaded,
        output,
        to,
        processor=processor,
        verify=verify,
        calibration=sample,
        detection_config=settings,
    )
    if verify:
        largest = max(exported.differences.values())
        stage = "Before quantisation, on" if int8 else "On"
        say(f"{stage} images of three sizes, the results differ from PyTorch's by at most {largest:.1g}.")
    if sample is not None:
        say(f"Calibrated int8 on {count(len(sample), 'image')} of {data or calibration}.")
    if measure is not None:
        print_table(_cost_table(before, measure(Detector.from_pretrained(output)).stats))
    say(f"Wrote {output}. Try: detrkit detect IMAGE --model {output}")


def _export_for_transformers_js(
    name: str, revision: str | None, queries: int | None, output: Path, int8: bool, verify: bool
) -> None:
    """Writes a folder for transformers.js, and says what of the detection settings its callers must pass."""
    from detrkit.checkpoints.loading import load_pretrained, read_detection_config
    from detrkit.engines.transformers_js import caller_notes, export_for_transformers_js

    loaded, processor = load_pretrained(name, revision, queries)
    settings = read_detection_config(name, revision)
    exported = export_for_transformers_js(
        loaded, output, processor=processor, int8=int8, verify=verify, detection_config=settings
    )
    if verify:
        largest = max(exported.differences.values())
        say(f"On images of three sizes, the results differ from PyTorch's by at most {largest:.1g}.")
    for file in sorted((output / "onnx").glob("model*.onnx")):
        say(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    notes = caller_notes(settings)
    say(f"Wrote {output} for transformers.js, which does not read detection settings: {notes}.")


def _check_settings(
    int8: bool,
    calibration: Path | None,
    data: str | None,
    annotations: Path | None,
    images: Path | None,
    *,
    for_js: bool,
) -> None:
    """Raises a SettingError for options that do not fit together."""
    if for_js:
        if any(option is not None for option in (calibration, data, annotations, images)):
            raise SettingError(
                "--calibration, --data, --annotations and --images are for OpenVINO only; int8 for "
                "transformers.js needs no calibration, so leave them out"
            )
        return
    if int8 and calibration is None and data is None:
        raise SettingError(
            "--int8 requires --calibration DIR, a folder of images to measure value ranges on, or --data PATH"
        )
    if not int8 and any(option is not None for option in (calibration, data, annotations, images)):
        raise SettingError("--calibration, --data, --annotations and --images require --int8")
    if data is not None and any(option is not None for option in (calibration, annotations, images)):
        raise SettingError("--data replaces --calibration, --annotations and --images; leave them out")
    if images is not None and annotations is None:
        raise SettingError("--images requires --annotations FILE")


def _calibration_images(folder: Path, debug: bool) -> list[str]:
    """Readable images of a folder, evenly spaced; unreadable ones are reported on stderr.

    Raises:
        ImageError: The folder contains no readable image.
    """
    if not folder.is_dir():
        raise ImageError(f"--calibration folder not found: {folder}")
    found, mistakes = find_images([str(folder)])
    if mistakes:
        raise ImageError(f"cannot calibrate: {mistakes[0]}")
    return _sample(found, str(folder), debug)


def _calibration_data(data: str, debug: bool) -> tuple[list[str], DetectionDataset]:
    """Readable training images of a data set, and what to measure the AP on."""
    from detrkit.data.checks import check_dataset
    from detrkit.data.layouts import WHOLE, open_any

    training = check_dataset(open_any(data, "train", WHOLE, "val", "test")).dataset
    measured = check_dataset(open_any(data, "val", "test", WHOLE, "train")).dataset
    paths = [ImageInput(str(training.path(index))) for index in range(len(training))]
    return _sample(paths, training.source, debug), measured


def _sample(found: Sequence[ImageInput], name: str, debug: bool) -> list[str]:
    """Readable ones of some images, evenly spaced."""
    step = max(1.0, len(found) / _CALIBRATION_IMAGES)
    chosen = [found[int(i * step)] for i in range(min(len(found), _CALIBRATION_IMAGES))]
    readable = with_progress(ImageReader(chosen, debug=debug), len(chosen), "Reading")
    sample = [chosen[position].source for position, _ in readable]
    if not sample:
        raise ImageError(f"cannot calibrate: no image in {name} can be read")
    return sample


def _cost_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """AP in percent of the float32 and the int8 model, and the difference."""
    from rich import box
    from rich.table import Table

    names = ("AP", "AP50", "AP75")
    table = Table("", *names, box=box.SIMPLE)
    table.add_row("float32", *(percent(before[name]) for name in names))
    table.add_row("int8", *(percent(after[name]) for name in names))
    table.add_row("difference", *(f"{100 * (after[name] - before[name]):+.1f}" for name in names))
    return table
