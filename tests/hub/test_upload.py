"""Uploads to a Hub on the loopback address, and what comes back from it."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from detrkit import DetrForObjectDetection, DetrImageProcessor, push_to_hub
from detrkit.errors import CheckpointError, DetrkitError, SettingError
from tests.conftest import make_picture
from tests.hub.server import READER, WRITER, HubServer
from tests.test_integration import run_python


@pytest.fixture
def hub():
    with HubServer({}) as server:
        yield server


@pytest.fixture
def here(hub, monkeypatch):
    """Lets this process know that Hub only, with a token that may write."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tiny_detr, tmp_path):
    """A model folder as training leaves it: with a card, a record, checkpoints and a hidden file."""
    folder = tmp_path / "my-detr"
    shutil.copytree(tiny_detr, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    (folder / "loss.png").write_bytes(b"a picture")
    (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-5" / "optimizer.pt").write_bytes(b"large")
    (folder / ".cache").write_bytes(b"hidden")
    return folder


def on_main(hub, repo):
    return hub.repositories[repo]["main"]


def test_a_folder_goes_up_in_one_commit_without_checkpoints_and_hidden_files(hub, here, folder):
    assert push_to_hub(folder) == f"{hub.url}/you/my-detr"
    files = on_main(hub, "you/my-detr")
    assert set(files) == {
        "config.json", "preprocessor_config.json", "model.safetensors", "README.md", "loss.png",
    }  # fmt: skip
    assert all(files[name] == (folder / name).read_bytes() for name in files)
    assert files["model.safetensors"] in hub.stored.values()
    assert hub.commits == ["you/my-detr"]
    assert not hub.private


def test_a_second_upload_adds_to_the_repository(hub, here, folder):
    push_to_hub(folder, "you/detector", private=True)
    (folder / "README.md").write_text("# Better\n", encoding="utf-8")
    (folder / "loss.png").unlink()
    push_to_hub(str(folder), "detector", handler=True)
    files = on_main(hub, "you/detector")
    assert files["README.md"] == b"# Better\n"
    assert files["loss.png"] == b"a picture"
    assert b"EndpointHandler" in files["handler.py"]
    assert files["requirements.txt"] == b"detrkit\n"
    assert hub.private == {"you/detector"}
    assert hub.commits == ["you/detector"] * 2


def test_a_model_goes_up_with_its_processor_and_a_card(hub, here, tiny_detr):
    model = DetrForObjectDetection.from_pretrained(tiny_detr)
    push_to_hub(model, "you/detector", processor=DetrImageProcessor.from_pretrained(tiny_detr))
    files = on_main(hub, "you/detector")
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "object-detection"
    assert "DETR for 4 classes: N/A, cat, remote, couch" in card.text
    assert json.loads(files["preprocessor_config.json"])["size"]["shortest_edge"] == 64


ROUND_TRIP = """
import json, sys
from detrkit import DetrForObjectDetection, DetrImageProcessor, Detector, push_to_hub

folder, picture = sys.argv[1:]
model, processor = DetrForObjectDetection.from_pretrained(folder), DetrImageProcessor.from_pretrained(folder)
push_to_hub(folder, "you/folder")
push_to_hub(model, "you/model", processor=processor)
model.push_to_hub("you/parts")
processor.push_to_hub("you/parts")
found = {}
for name in (folder, "you/folder", "you/model", "you/parts"):
    detections = Detector.from_pretrained(name, device="cpu")(picture, threshold=0.2)
    found[name] = [detections.names, detections.scores.tolist(), detections.boxes.tolist()]
print(json.dumps(found))
"""


def test_what_was_uploaded_loads_again_and_detects_the_same(hub, tiny_detr, tmp_path):
    make_picture(120, 80).save(tmp_path / "picture.png")
    found = run_python(ROUND_TRIP, hub, tmp_path / "home", str(tiny_detr), str(tmp_path / "picture.png"))
    wanted = found.pop(str(tiny_detr))
    assert len(wanted[0]) > 0
    assert found == dict.fromkeys(("you/folder", "you/model", "you/parts"), wanted)
    (tmp_path / "back.safetensors").write_bytes(on_main(hub, "you/parts")["model.safetensors"])
    ours, theirs = load_file(tiny_detr / "model.safetensors"), load_file(tmp_path / "back.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def refusal(*arguments, **options):
    with pytest.raises(DetrkitError) as caught:
        push_to_hub(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_token_is_told_before_anything_is_asked(hub, here, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    assert "hf auth login" in refusal(folder)
    assert not hub.requests


def test_a_token_that_is_wrong_or_may_not_write_is_told(hub, here, folder):
    assert "rejected your token (401)" in refusal(folder, token="hf_unknown")
    assert "may not write to my-detr (403)" in refusal(folder, token=READER)
    assert "may not write to others/detr (403)" in refusal(folder, "others/detr")
    assert not hub.repositories


def test_a_hub_that_cannot_be_reached_is_told(here, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach the Hub at http://127.0.0.1:9" in refusal(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(folder)


def test_an_upload_that_fails_half_way_is_told_and_commits_nothing(hub, here, folder, monkeypatch):
    def refuse(handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))  # or it would pass for the next request
        handler._send_json({"error": "no"}, 403)

    monkeypatch.setattr("tests.hub.server._Handler.do_PUT", refuse)
    assert "403" in refusal(folder)
    assert not hub.commits


@pytest.mark.parametrize("name", ["a/b/c", "-detr", "de tr"])
def test_a_name_that_the_hub_does_not_take_is_told(hub, here, folder, name):
    with pytest.raises(SettingError, match="is not a valid repository name"):
        push_to_hub(folder, name)


def test_what_is_no_model_is_refused(hub, here, tmp_path, tiny_detr):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        push_to_hub(tmp_path, "you/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="bert"):
        push_to_hub(tmp_path, "you/nothing")
    with pytest.raises(SettingError, match="not a dict"):
        push_to_hub({}, "you/nothing")
    model = DetrForObjectDetection.from_pretrained(tiny_detr)
    with pytest.raises(SettingError, match=r"needs processor=\.\.\."):
        push_to_hub(model, "you/nothing")
    with pytest.raises(SettingError, match=r"needs repo_id=\.\.\."):
        push_to_hub(model, processor=object())
    assert not hub.requests
