import argparse
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from detrkit.conversion.reading import read_checkpoint
from detrkit.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.counter": torch.tensor(7)}


class MakesAFolder:
    """Makes a folder when it is unpickled as Python would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"model": TENSORS},
        {"model": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
        {
            "model": TENSORS,
            "optimizer": {
                "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
                "param_groups": [{"lr": 1e-4}],
            },
            "epoch": 299,
            "args": argparse.Namespace(
                lr=1e-4, backbone="resnet50", output_dir="out", masks=False, lr_drop=200
            ),
        },
    ],
    ids=["state dict", "under model", "data parallel", "training checkpoint"],
)
def test_tensors_are_found_in_every_form_a_checkpoint_is_saved_in(tmp_path, content, zipped):
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "c.pth"), TENSORS)


def under(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


MODEL = {"transformer.decoder.layers.0.linear1.weight": torch.ones(2), "class_embed.weight": torch.ones(3)}
MASKS = {**under("detr.", MODEL), "mask_head.lay1.weight": torch.ones(4)}
AVERAGED = {name: tensor / 2 for name, tensor in MODEL.items()}


@pytest.mark.parametrize(
    ("content", "expected", "message"),
    [
        ({"state_dict": MODEL, "epoch": torch.tensor(3)}, MODEL, None),
        ({"model_state_dict": MODEL, "loss": 0.3}, MODEL, None),
        ({"checkpoint": {"weights_of_mine": MODEL}}, MODEL, None),
        ({"state_dict": under("model.", MODEL)}, MODEL, None),
        ({"state_dict": under("model._orig_mod.", MODEL)}, MODEL, None),
        ({"state_dict": under("net.detr.", MODEL)}, MODEL, None),
        ({"state_dict": under("model.", MASKS)}, MASKS, None),
        (
            {"state_dict": {**under("model.", MODEL), "criterion.empty_weight": torch.ones(1)}},
            MODEL,
            "1 more, such as criterion.empty_weight, do not belong to the model",
        ),
        ({"model": MODEL, "model_ema": AVERAGED}, MODEL, "under 'model', not those under model_ema"),
        ({**under("model.", MODEL), **under("ema_model.a.", AVERAGED)}, MODEL, "not those under ema_model.a"),
        ({**MODEL, **under("ema.", AVERAGED)}, MODEL, "the weights under '', not those under ema."),
        ({"ema_state_dict": under("module.", AVERAGED), "updates": 7}, AVERAGED, None),
    ],
)  # fmt: skip
def test_weights_are_found_under_any_key_and_prefix(tmp_path, caplog, content, expected, message):
    torch.save(content, tmp_path / "c.pth")
    assert_same(read_checkpoint(tmp_path / "c.pth"), expected)
    assert (message or "") in caplog.text
    assert bool(caplog.text) == bool(message)


@pytest.mark.parametrize(
    "content",
    [{"student": MODEL, "teacher": AVERAGED}, {**under("student.", MODEL), **under("teacher.", AVERAGED)}],
)
def test_weights_of_several_models_are_named_and_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"several models, under 'student\.?', 'teacher\.?'"):
        read_checkpoint(tmp_path / "c.pth")


def test_safetensors_files_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "c.safetensors")
    assert_same(read_checkpoint(tmp_path / "c.safetensors"), TENSORS)


def test_a_prefix_that_not_all_names_have_is_kept(tmp_path):
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(tensors, tmp_path / "c.pth")
    assert_same(read_checkpoint(tmp_path / "c.pth"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    content = {"model": TENSORS, "args": MakesAFolder(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused to read .*evil\.pth: it asks for posix\.mkdir"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_not_run_either(tmp_path):
    payload = pickle.dumps({"model": MakesAFolder(tmp_path / "ran")})
    (tmp_path / "evil.pth").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"cannot read .*evil\.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists()  # so the payload above was a live one


def test_a_whole_pickled_module_is_refused_by_its_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(
        CheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear, and only tensors"
    ):
        read_checkpoint(tmp_path / "module.pth")


def test_a_namespace_is_let_in_for_the_read_only(tmp_path):
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pth")
    read_checkpoint(tmp_path / "c.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a training checkpoint in both formats of torch.save, and of a safetensors file."""
    folder = tmp_path_factory.mktemp("saved")
    content = {"model": TENSORS, "args": argparse.Namespace(lr=1)}
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(TENSORS, folder / "st.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_short_anywhere_is_reported(tmp_path, saved, data):
    name = data.draw(st.sampled_from(sorted(saved)))
    length = data.draw(st.integers(0, len(saved[name]) - 1))
    (tmp_path / name).write_bytes(saved[name][:length])
    # A cut in the middle of a class name leaves a name that is refused.
    with pytest.raises(CheckpointError, match=f"(cannot read|refused to read) .*{name}"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404 Not Found</html>", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint_is_reported_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*odd") as raised:
        read_checkpoint(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*gone\.pth"):
        read_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="is a folder, not a checkpoint file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 3}, [torch.ones(1)], torch.ones(1), {0: torch.ones(1)}]
)
def test_a_file_without_named_tensors_is_reported(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="contains no named tensors") as raised:
        read_checkpoint(tmp_path / "c.pth")
    keys = list(map(str, content)) if isinstance(content, dict) else []
    assert all(key in str(raised.value) for key in keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_with_values_that_are_not_finite_is_named(tmp_path, value):
    bad = torch.ones(2, 3)
    bad[1, 2] = value
    torch.save({"good": torch.ones(2), "layer.bad": bad}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"tensor layer\.bad has infinite or undefined"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"]
)
def test_a_tensor_without_plain_values_is_named(tmp_path, tensor):
    torch.save({"odd": tensor}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="tensor odd is sparse, quantised or without values"):
        read_checkpoint(tmp_path / "c.pth")
