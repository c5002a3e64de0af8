"""A Hub that cannot be reached is noticed at once: the cache is used, and nothing is tried again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hub.server import HubServer, folder_files

# Prints the scores, how often the Hub's client has waited, and whether it is asked afterwards as before.
CODE = """
import logging, sys, time
from huggingface_hub import constants
from PIL import Image
from detrkit import Detector
from detrkit.errors import CheckpointError

waits = []
time.sleep = waits.append
try:
    print(Detector.from_pretrained("some/model")(Image.open(sys.argv[1]), threshold=0).scores.tolist())
except CheckpointError as error:
    print(error)
print(len(waits), constants.HF_HUB_OFFLINE)
"""


def run(hub: HubServer, home: Path, image: Path) -> tuple[list[str], str]:
    """The lines that the code prints, and what is said on stderr."""
    command = [sys.executable, "-c", CODE, str(image)]
    done = subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr


def test_models_in_the_cache_are_used_without_the_hub(
    tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    with HubServer({"some/model": {"main": folder_files(tiny_detr)}}) as hub:
        online, said = run(hub, tmp_path / "home", pictures[0])
        assert "No answer" not in said
    offline, said = run(hub, tmp_path / "home", pictures[0])
    assert offline == online
    assert offline[-1] == "0 False"
    assert said.count("No answer from 127.0.0.1") == 1
    assert "only what is in the cache is used" in said


def test_a_model_that_is_not_in_the_cache_is_named_at_once(tmp_path: Path, pictures: list[Path]) -> None:
    with HubServer({}) as hub:
        pass
    (error, ending), _ = run(hub, tmp_path / "home", pictures[0])
    assert "some/model" in error
    assert "your network" in error
    assert ending == "0 False"
