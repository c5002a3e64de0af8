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
from detrkit.checkpoints.registry import REGISTRY
from tests.cli.conftest import Run
from tests.conftest import make_picture
from tests.golden import golden_case, golden_weights, needs_golden


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
def test_help_of_a_command_lists_its_options(detrkit: Run, command: str, options: list[str]) -> None:
    done = detrkit(command, "--help", environment={"COLUMNS": "120"})
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
    detrkit: Run, arguments: list[str], hint: str
) -> None:
    done = detrkit(*arguments)
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
        assert f"{entry.ap:.1f}" in line
        assert entry.pq is None or f"{entry.pq:.1f}" in line


def test_models_json_is_the_registry(detrkit: Run) -> None:
    done = detrkit("models", "--json")
    listed = json.loads(done.stdout)
    assert [entry["name"] for entry in listed] == list(REGISTRY)
    assert (
        listed[0] | {"name": "detr-resnet-50", "hub_id": "facebook/detr-resnet-50", "ap": 42.0} == listed[0]
    )


def test_converting_a_file_that_is_not_there_gives_one_line_and_leaves_nothing(
    detrkit: Run, tmp_path: Path
) -> None:
    done = detrkit("convert", tmp_path / "no-such.pth", tmp_path / "out", "--model", "detr-resnet-50")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no-such.pth" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@needs_golden
def test_a_converted_checkpoint_is_a_model_that_detect_runs(detrkit: Run, tmp_path: Path) -> None:
    import torch

    case = golden_case("original/detr-resnet-50")
    torch.save({"model": golden_weights(case)}, tmp_path / "original.pth")
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


@pytest.mark.parametrize("code", ["import detrkit", "import detrkit.cli", "import detrkit; dir(detrkit)"])
def test_importing_does_not_import_torch_or_transformers(code: str) -> None:
    code += "; import sys; print({'torch', 'transformers', 'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["detect", "--help"]])
def test_quick_commands_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv[0] = 'detrkit'\n"
        "from detrkit.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_takes_less_than_0_3_seconds() -> None:
    code = "import time; t = time.perf_counter(); import detrkit; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    assert min(float(run.stdout) for run in runs) < 0.3


def test_help_comes_within_a_second(detrkit: Run) -> None:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        detrkit("--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


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
    assert f"cannot write {tmp_path / option[1]} " in done.stderr
    assert "choose another place" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_that_the_hub_does_not_answer_is_told_once() -> None:
    code = (
        "import logging\n"
        "from detrkit.cli.console import quiet_libraries\n"
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
        for _ in range(300):  # the interrupt comes a little later
            time.sleep(0.01)

    monkeypatch.setattr("detrkit.cli.models.print_table", interrupted_within_a_callback)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = detrkit_here("models")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
