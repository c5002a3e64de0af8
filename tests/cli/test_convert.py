"""``detrkit convert`` with an upload; what conversion itself does is tested in tests/checkpoints."""

import shutil
from pathlib import Path

import pytest

from tests.hub.server import READER, WRITER, HubServer


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with HubServer({}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


@pytest.fixture
def convert(detrkit_here, tiny_detr, monkeypatch):
    """Runs the command; in place of a conversion a tiny model is copied."""

    def copy(checkpoint, output, name):
        shutil.copytree(tiny_detr, output)
        return output

    monkeypatch.setattr("detrkit.conversion.convert.convert_checkpoint", copy)
    return lambda *options: detrkit_here("convert", "any.pth", "mine", "--model", "detr-resnet-50", *options)


def test_a_converted_model_is_uploaded_under_its_folders_name(convert, hub):
    done = convert("--push-to-hub")
    assert done.returncode == 0, done.stderr
    assert f"Uploaded to {hub.url}/you/mine." in done.stderr
    files = hub.repositories["you/mine"]["main"]
    assert files["model.safetensors"] == Path("mine/model.safetensors").read_bytes()
    assert "handler.py" not in files
    assert not hub.private


def test_name_privacy_and_handler_can_be_chosen(convert, hub):
    assert convert("--push-to-hub", "--hub-id", "you/detr", "--private", "--handler").returncode == 0
    assert hub.private == {"you/detr"}
    assert "handler.py" in hub.repositories["you/detr"]["main"]


@pytest.mark.parametrize("options", [["--hub-id", "you/detr"], ["--private"], ["--handler"]])
def test_options_of_an_upload_that_is_not_asked_for_are_refused(convert, options):
    done = convert(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "require --push-to-hub" in done.stderr
    assert not Path("mine").exists()


def test_a_missing_login_is_told_before_the_conversion(convert, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    done = convert("--push-to-hub")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert not Path("mine").exists()


def test_a_refused_upload_leaves_the_folder_and_one_line(convert, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    done = convert("--push-to-hub")
    assert done.returncode == 2
    assert "may not write to mine (403)" in done.stderr.splitlines()[-1]
    assert Path("mine/model.safetensors").exists()
