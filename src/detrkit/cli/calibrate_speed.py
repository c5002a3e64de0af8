"""``detrkit calibrate --max-ms``: the most accurate setting of a model within a time per image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrkit.common.errors import SettingError
from detrkit.common.terminal import quiet_libraries, say

if TYPE_CHECKING:
    from detrkit.benchmark.speed_points import Speeds
    from detrkit.data.coco import DetectionDataset
    from detrkit.evaluation.choosing import Wishes


def check_speed(name: str, max_ms: float, wishes: Wishes, output: Path) -> None:
    """Refuses, before any work, what ``--max-ms`` does not go with.

    Args:
        name: Hub id or folder of the model.
        max_ms: Value of the option.
        wishes: What is asked of the detection settings.
        output: The folder to write.

    Raises:
        SettingError: It does not.
    """
    from detrkit.checkpoints.loading import is_exported

    if not 0 < max_ms < float("inf"):
        raise SettingError(f"--max-ms must be a number of milliseconds above 0, not {max_ms:g}")
    if wishes.confidence is not None:
        raise SettingError(
            "--max-ms chooses among settings on the images, which then cannot guarantee a recall too; run it "
            "without --confidence, and calibrate its result with --confidence on other images"
        )
    if is_exported(name):
        raise SettingError(
            f"--max-ms changes layers, queries and engine, which are fixed in {name}, an exported model; "
            "pass the model that it was exported from"
        )
    if output.is_dir() and any(output.iterdir()):
        raise SettingError(
            f"--max-ms writes a new model, and {output} is not empty; choose a folder that does not exist yet"
        )


def find_speed(
    name: str,
    dataset: DetectionDataset,
    wishes: Wishes,
    max_ms: float,
    setup: dict[str, Any],
    reading: dict[str, Any],
    *,
    debug: bool,
) -> Speeds:
    """Looks for the best setting; see :class:`detrkit.benchmark.speed_search.SpeedSearch`.

    Args:
        name: Hub id or folder of the model.
        dataset: The images.
        wishes: What is asked of the detection settings.
        max_ms: The most milliseconds an image.
        setup: Engine, device, dtype and revision.
        reading: Batch size, limit and ``strict``.
        debug: Value of ``--debug``.

    Raises:
        SettingError: No setting fits, or the model's detection settings cut images into tiles.
    """
    from detrkit.benchmark.speed_points import Reading
    from detrkit.benchmark.speed_search import SpeedSearch
    from detrkit.benchmark.speed_settings import VariableModel
    from detrkit.data.checks import check_dataset

    if not debug:
        quiet_libraries()
    options = dict(setup)
    engine = options.pop("engine")
    model = VariableModel(name, **options)
    model.engines(engine)  # a mistake in the settings should not wait for the data
    if model.detection_config.tile_shape is not None:
        raise SettingError(
            "--max-ms takes the time of whole images, and the model's settings cut them into tiles; remove "
            "tile_size from its detection_config.json"
        )
    return SpeedSearch(
        model=model,
        dataset=check_dataset(dataset, strict=reading["strict"]).dataset,
        wishes=wishes,
        max_ms=max_ms,
        engine=engine,
        reading=Reading(**reading),
    ).run()


def summarise_speed(speeds: Speeds) -> None:
    """Says what the chosen setting is, and what of it a folder cannot hold."""
    chosen, dtype = speeds.chosen, speeds.model.own.precision
    say(
        f"Chosen for at most {speeds.max_ms:g} ms: {speeds.model.in_words(chosen.setting)}. An image takes "
        f"{chosen.ms:.1f} ms here, from its file to its objects."
    )
    extra = ["--engine compile"] if chosen.setting.engine == "compile" else []
    extra += [f"--dtype {dtype}"] if dtype != "float32" else []
    if extra:
        say(f"The folder does not hold every choice: add {' '.join(extra)} to each command.")
