"""What holds for the whole program: help, version, exit statuses, start-up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

import detrkit as package
from detrkit.checkpoints.registry import BUNDLED, HUB_ONLY, REGISTRY
from detrkit.common.terminal import Terminated
from tests.cli.conftest import Run
from tests.conftest import make_picture
from tests.golden import COMPACT


def test_version_is_the_packages(detrkit: Run) -> None:
    done = detrkit("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"detrkit {package.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands(detrkit: Run, arguments: list[str]) -> None:
    done = detrkit(*arguments)
    assert done.returncode == 0
    for command in ("detect", "models", "convert"):
        assert command in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "detect",
            ["--model", "--threshold", "--engine", "--device", "--save-dir", "--json", "--batch-size"],
        ),
        ("models", ["--json"]),
        ("convert", ["--model", "CHECKPOINT", "OUTPUT"]),
    ],
)
def test_help_of_a_command_lists_its_options(
    detrkit_here: Run, command: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = detrkit_here(command, "--help")
    assert done.returncode == 0
    for option in options:
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["detect", "a.jpg", "--treshold", "0.3"], "--threshold"),
        (["detetc", "a.jpg"], "detect"),
        (["detect"], "IMAGES"),
        (["detect", "a.jpg", "--threshold", "1.5"], "--threshold"),
        (["detect", "a.jpg", "--threshold", "much"], "--threshold"),
        (["detect", "a.jpg", "--batch-size", "0"], "--batch-size"),
        (["detect", "a.jpg", "--model", "detr-resnet-5O"], "detr-resnet-50"),
        (["convert", "a.pth", "out", "--model", "detr-resnet-5O"], "detr-resnet-50"),
        (["convert", "a.pth", "out"], "--model"),
    ],
)
def test_a_mistake_gives_one_line_with_a_hint_and_status_2(
    detrkit_here: Run, arguments: list[str], hint: str
) -> None:
    done = detrkit_here(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert hint in done.stderr


def test_models_lists_every_released_checkpoint(detrkit: Run) -> None:
    done = detrkit("models")
    assert (done.returncode, done.stderr) == (0, "")
    for entry in REGISTRY.values():
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [entry.name])
        assert entry.hub_id is None or entry.hub_id in line
        assert entry.ap is None or f"{entry.ap:.1f}" in line
        assert entry.pq is None or f"{entry.pq:.1f}" in line


def test_models_json_lists_the_released_checkpoints_and_the_bundled_models(detrkit_here: Run) -> None:
    done = detrkit_here("models", "--json")
    listed = json.loads(done.stdout)
    assert [entry["name"] for entry in listed] == [*REGISTRY, *HUB_ONLY, *BUNDLED]
    assert (
        listed[0] | {"name": "detr-resnet-50", "hub_id": "facebook/detr-resnet-50", "ap": 42.0} == listed[0]
    )
    assert all(entry.keys() == listed[0].keys() for entry in listed)
    bundled = listed[-1]
    assert (bundled["name"], bundled["family"], bundled["task"]) == (
        "blood-cells",
        "deformable_detr",
        "detection",
    )
    assert (bundled["num_labels"], bundled["num_queries"], bundled["two_stage"]) == (3, 200, True)
    assert (bundled["ap"], bundled["hub_id"], bundled["url"]) == (None, None, None)


def test_converting_a_file_that_is_not_there_gives_one_line_and_leaves_nothing(
    detrkit_here: Run, tmp_path: Path
) -> None:
    done = detrkit_here("convert", tmp_path / "no-such.pth", tmp_path / "out", "--model", "detr-resnet-50")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no-such.pth" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_converted_checkpoint_is_a_model_that_detect_runs(detrkit: Run, tmp_path: Path) -> None:
    import torch

    (case,) = (case for case in COMPACT if case.name == "detr-resnet-50")
    torch.save({"model": case.weights()}, tmp_path / "original.pth")
    make_picture(60, 40).save(tmp_path / "a.jpg")
    model = tmp_path / "converted"
    done = detrkit("convert", tmp_path / "original.pth", model, "--model", "detr-resnet-50")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert str(model) in done.stderr
    done = detrkit("detect", tmp_path / "a.jpg", "--model", model, "--threshold", 0, "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["annotations"]) == 100
    assert {"id": 17, "name": "cat"} in document["categories"]


HEAVY = {"torch", "transformers", "timm", "torchvision", "numpy", "scipy", "PIL", "huggingface_hub"}


def imported_by(code: str) -> set[str]:
    """The packages beyond the standard library that code imports into a fresh process."""
    code = f"import sys; before = set(sys.modules); {code}; print(*sys.modules.keys() - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("code", ["import detrkit", "import detrkit; dir(detrkit)"])
def test_importing_the_package_imports_no_other(code: str) -> None:
    assert imported_by(code) == {"detrkit"}


def test_importing_the_command_line_imports_what_reads_options_only() -> None:
    imported = imported_by("import detrkit.cli")
    assert imported >= {"detrkit", "typer"}
    assert not imported & {*HEAVY, "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["detect", "--help"]])
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv[0] = 'detrkit'\n"
        "from detrkit.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", [("--save-dir", "file/new"), ("--json", "file/new.json")])
def test_a_place_that_takes_no_files_is_refused_before_any_work(
    detrkit_here: Run, tmp_path: Path, option: tuple[str, str]
) -> None:
    picture, model = tmp_path / "photo.jpg", tmp_path / "no-model"
    make_picture(40, 30).save(picture)
    model.mkdir()  # loading it would fail first
    (tmp_path / "file").touch()
    done = detrkit_here("detect", picture, "--model", model, option[0], tmp_path / option[1])
    assert done.returncode == 2
    assert f"cannot write {tmp_path / option[1]}" in done.stderr
    assert "choose another place" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_that_the_hub_does_not_answer_is_told_once() -> None:
    code = (
        "import logging\n"
        "from detrkit.common.terminal import quiet_libraries\n"
        "quiet_libraries()\n"
        "logger = logging.getLogger('huggingface_hub.utils._http')\n"
        "for attempt in (1, 2):\n"
        "    logger.warning('No route thrown while requesting HEAD')\n"
        "    logger.warning(f'Retrying in 1s [Retry {attempt}/5].')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "No answer from the Hub; trying again for half a minute.\n"


def test_an_interrupt_where_nothing_can_be_raised_is_not_lost(detrkit_here: Run, monkeypatch) -> None:
    class Thing:
        pass

    def interrupted_within_a_callback(*_: object, **__: object) -> None:
        def callback(_: object) -> None:
            raise KeyboardInterrupt

        thing = Thing()
        reference = weakref.ref(thing, callback)
        del thing
        assert reference() is None
        for _ in range(12_000):  # the interrupt comes a little later
            time.sleep(0.01)

    monkeypatch.setattr("detrkit.cli.models.print_table", interrupted_within_a_callback)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = detrkit_here("models")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
@pytest.mark.parametrize("place", ["detrkit.cli.models.print_table", "typer.core.TyperGroup.parse_args"])
def test_an_interrupted_command_says_so_and_ends_with_the_status_of_the_signal(
    detrkit_here: Run, monkeypatch, error: type[KeyboardInterrupt], status: int, place: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(place, interrupt)
    done = detrkit_here("models")
    assert (done.returncode, done.stderr) == (status, "Interrupted. Run the same command again.\n")
