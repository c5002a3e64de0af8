"""Checkpoints and model folders made to harm: each is refused, its payload does not run, nothing is spent."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from detrkit import Detector, DetrConfig, DetrForObjectDetection
from detrkit.cli import run as run_program
from detrkit.common import screening
from detrkit.conversion.reading import read_checkpoint
from detrkit.errors import CheckpointError
from tests.conftest import make_picture, read_json

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4)}


class MakesAFolder:
    """Makes a folder when it is unpickled as Python would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What a payload would make."""
    return tmp_path / "ran"


@pytest.fixture
def model(tiny_detr: Path, tmp_path: Path) -> Path:
    """A folder with a tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_detr, tmp_path / "model"))


def change(path: Path, **entries: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**read_json(path), **entries}))


def read(source: Path) -> Any:
    """Reads a file of weights, or a model's folder."""
    return Detector.from_pretrained(source, device="cpu") if source.is_dir() else read_checkpoint(source)


def refused(source: Path, says: str) -> None:
    """Reads what must be refused with one line."""
    with pytest.raises(CheckpointError, match=says) as raised:
        read(source)
    assert "\n" not in str(raised.value)
    assert source.name in str(raised.value)


# Files of weights


def as_zip(path: Path, content: Any) -> None:
    torch.save(content, path)


def as_legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_pickle])
@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_a_payload_does_not_run(
    tmp_path: Path, ran: Path, write: Callable[[Path, Any], None], suffix: str
) -> None:
    path = tmp_path / f"evil.{suffix}"
    write(path, {"model": TENSORS, "extra": MakesAFolder(ran)})
    refused(
        path, r"refused to read .*: it asks for posix\.mkdir" if write is not as_pickle else "cannot read"
    )
    assert not ran.exists()
    # It is a live one: Python's own reader runs it.
    pickle.loads(pickle.dumps(MakesAFolder(ran)))
    assert ran.exists()


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_pickle])
def test_a_payload_in_a_models_folder_does_not_run(
    model: Path, ran: Path, write: Callable[[Path, Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write(model / "pytorch_model.bin", {**weights, "extra": MakesAFolder(ran)})
    refused(model, "refused to read the weights .* pickled code is never run|cannot read the weights")
    make_picture(60, 40).save(model / "photo.png")
    assert run_program(["detect", str(model / "photo.png"), "--model", str(model)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not ran.exists()


def test_the_program_refuses_to_convert_it_and_writes_nothing(
    tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": TENSORS, "extra": MakesAFolder(ran)}, tmp_path / "evil.pth")
    arguments = ["convert", tmp_path / "evil.pth", tmp_path / "out", "--model", "detr-resnet-50"]
    assert run_program([str(argument) for argument in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_a_pickle_of_tensors_alone_is_a_model(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert len(Detector.from_pretrained(model, device="cpu")(make_picture(60, 40), threshold=0)) == 12


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**24)}, tmp_path / "honest.pth")
    with (
        zipfile.ZipFile(tmp_path / "honest.pth") as honest,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in honest.infolist():
            bomb.writestr(entry.filename, honest.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    refused(tmp_path / "bomb.pth", r"is compressed from \d+ to \d+ bytes")


def test_a_zip_whose_entries_overlap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(2**20))
        first = archive.infolist()[0]
        for number in range(1, 100):  # listed a hundred times, there once
            again = zipfile.ZipInfo(f"archive/data/{number}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            archive.filelist.append(again)
    refused(path, "its entries claim more bytes than the file has")


def test_a_tensor_larger_than_memory_is_refused_though_its_file_is_small(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pth")
    refused(tmp_path / "wide.pth", "its tensors, written out, are larger than")


def test_a_storage_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    # 7001 values, the number twice in the pickle: of the storage, and of the tensor.
    small, huge = b"M" + struct.pack("<H", 7001), b"J" + struct.pack("<i", 2**31 - 1)
    as_zip(tmp_path / "honest.pth", {"a": torch.zeros(7001)})
    with (
        zipfile.ZipFile(tmp_path / "honest.pth") as honest,
        zipfile.ZipFile(tmp_path / "liar.pth", "w") as liar,
    ):
        for part in honest.infolist():
            data = honest.read(part)
            assert not part.filename.endswith("data.pkl") or data.count(small) == 2
            liar.writestr(part.filename, data.replace(small, huge))
    as_legacy(tmp_path / "honest.pth", {"a": torch.zeros(7001)})
    content = (tmp_path / "honest.pth").read_bytes()
    assert content.count(small) == 2
    (tmp_path / "old liar.pth").write_bytes(content.replace(small, huge))
    program = (
        "import resource, sys; from detrkit.conversion.reading import read_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_checkpoint(path)\n"
        "    except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    paths = [str(tmp_path / "liar.pth"), str(tmp_path / "old liar.pth")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    *said, kilobytes = done.stdout.splitlines()
    assert [path in line for path, line in zip(paths, said, strict=True)] == [True, True]
    assert int(kilobytes) < 200_000  # each claims 8 gigabytes


def test_an_archive_of_the_oldest_format_leaves_no_files(tmp_path: Path, ran: Path) -> None:
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle", f"../{ran.name}"):
            content = pickle.dumps(MakesAFolder(ran))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(tmp_path / "old.pth", "cannot read")
    assert not ran.exists()


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(()))
        archive.writestr("script/data.pkl", pickle.dumps({}))
        archive.writestr("script/code/__torch__.py", "import os")
        archive.writestr("script/version", "3")
    refused(tmp_path / "script.pth", "cannot read")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_larger_than_memory_is_refused_unread(tmp_path: Path, model: Path, kind: str) -> None:
    path = tmp_path / "large.safetensors" if kind == "file" else model / "model.safetensors"
    path.touch()
    os.truncate(path, 2**42)
    refused(path if kind == "file" else model, "4398046511104 bytes (of weights )?exceed the limit")


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "header longer than the file": safetensors({}, length=10**6),
    "header of 2**63 bytes": safetensors({}, length=2**63),
    "header that is no JSON": safetensors(b"{broken"),
    "header that is a list": safetensors(b"[1, 2]"),
    "deep header": safetensors(b"[" * 100_000),
    "offsets that overlap": safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "offsets with a hole": safetensors({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)),
    "offsets beyond the end": safetensors({"a": entry(0, 2**40, (2**38,))}, bytes(8)),
    "negative offsets": safetensors({"a": entry(-8, 0)}, bytes(8)),
    "offsets the wrong way round": safetensors({"a": entry(8, 0)}, bytes(8)),
    "a shape that does not fit its bytes": safetensors({"a": entry(0, 8, (1000, 1000))}, bytes(8)),
    "a shape beyond 64 bits": safetensors({"a": entry(0, 8, (2**62, 2**62))}, bytes(8)),
    "an unknown dtype": safetensors({"a": entry(0, 8, dtype="EVIL")}, bytes(8)),
    "bytes after the tensors": safetensors({"a": entry(0, 8)}, bytes(100)),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS.keys())
def test_a_safetensors_file_that_lies_is_refused(tmp_path: Path, model: Path, content: bytes) -> None:
    (tmp_path / "liar.safetensors").write_bytes(content)
    refused(tmp_path / "liar.safetensors", "cannot read")
    (model / "model.safetensors").write_bytes(content)
    refused(model, "cannot read")


# Folders


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", "C:\\a.safetensors", "a\\b", ""]
)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_beside_it_only(model: Path, name: str, weights: str) -> None:
    save_file(load_file(model / "model.safetensors"), model.parent / "outside.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": name}}
    (model / f"{weights}.index.json").write_text(json.dumps(index))
    refused(model, "refused to read .*index.json: it names the file .* files must be in the same folder")


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{broken"]
)
def test_an_index_that_is_none_is_refused(model: Path, content: str) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    refused(model, "cannot read .*index.json|index.json is not a JSON file")


def test_shards_beside_their_index_are_read(model: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "shard.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    Detector.from_pretrained(model, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe", "loop", "terabyte"])
def test_a_file_of_a_folder_that_never_ends_is_refused(model: Path, name: str, kind: str) -> None:
    (model / name).unlink()
    if kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "terabyte":
        (model / name).touch()
        os.truncate(model / name, 2**42)
    else:
        (model / name).symlink_to("/dev/zero" if kind == "device" else name)
    refused(model, "not a regular file" if kind in ("device", "pipe") else "cannot read|exceed the limit")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"file": "../model.onnx"}, "is not the name of a file in the folder"),
        ({"file": "/tmp/model.onnx"}, "is not the name of a file in the folder"),
        ({"file": 5}, "cannot read"),
        ({"engine": "evil"}, "unknown engine 'evil'"),
    ],
)
def test_an_exported_model_lies_in_its_folder(model: Path, entries: dict[str, Any], says: str) -> None:
    manifest = {"engine": "onnx", "file": "model.onnx", "outputs": ["logits"], "precision": "float32"}
    (model / "engine.json").write_text(json.dumps({**manifest, **entries}))
    refused(model, says)
    os.truncate(model / "engine.json", 2**42)
    refused(model, "4398046511104 bytes exceed the limit")


def test_links_to_regular_files_are_followed(model: Path) -> None:
    # The Hub's cache is made of them.
    (model / "model.safetensors").rename(model.parent / "blob")
    (model / "model.safetensors").symlink_to("../blob")
    Detector.from_pretrained(model, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "entries",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}},
        {"trust_remote_code": True},
        {"backbone_config": {"model_type": "resnet", "auto_map": {"AutoBackbone": "evil.Backbone"}}},
        {"backbone_kwargs": {"trust_remote_code": True}},
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": {"": "evil/kernel"}},
    ],
    ids=lambda entries: "-".join(entries),
)
def test_a_configuration_that_names_code_is_refused(
    model: Path, ran: Path, name: str, entries: dict[str, Any]
) -> None:
    (model / "evil.py").write_text(f"import os; os.mkdir({str(ran)!r})\n")
    change(model / name, **entries)
    refused(model, f"refused to read .*{name}: .* which detrkit never runs")
    assert not ran.exists()


OTHER = {"use_timm_backbone": False, "backbone": "evil/backbone", "backbone_config": None}
NESTED = {"model_type": "dpt", "use_timm_backbone": False, "backbone": "evil/backbone"}


@pytest.mark.parametrize(
    "entries",
    [
        OTHER,
        {**OTHER, "backbone": "resnet50"},  # a repository without an owner
        {**OTHER, "backbone": "./elsewhere"},
        {**OTHER, "use_timm_backbone": True},
        {**OTHER, "use_timm_backbone": None, "backbone": "hf_hub:evil/backbone"},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/backbone"}},
        {"backbone_config": NESTED},
        {"backbone_config": {"model_type": "detr", "backbone_config": NESTED}},
        {"backbone_kwargs": {"backbone": "evil/backbone"}},
    ],
)
def test_a_backbone_elsewhere_is_refused_before_any_request(
    model: Path, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(*_: object) -> None:
        pytest.fail("a request was made, or another folder read")

    monkeypatch.setattr("socket.getaddrinfo", request)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", request)
    change(model / "config.json", **entries)
    refused(model, "is stored elsewhere")
    with pytest.raises(CheckpointError, match="is stored elsewhere"):
        DetrForObjectDetection.from_pretrained(model)
    with pytest.raises(CheckpointError, match="is stored elsewhere"):
        DetrConfig(**entries)


def test_a_backbones_name_beside_its_configuration_has_no_meaning(model: Path) -> None:
    change(model / "config.json", backbone="microsoft/resnet-50")
    assert DetrConfig.from_pretrained(model).backbone is None


def test_a_configuration_is_not_replaced_by_a_file_that_it_names(model: Path) -> None:
    change(model / "config.json", configuration_files=["config.4.0.0.json"])
    (model / "config.4.0.0.json").write_text('{"model_type": "detr", "auto_map": {"AutoConfig": "evil.C"}}')
    refused(model, "configuration_files")
    with pytest.raises(CheckpointError, match="configuration_files"):
        DetrForObjectDetection.from_pretrained(model)
    with pytest.raises(CheckpointError, match="auto_map"):  # Transformers followed it, as for a Hub id
        DetrConfig.from_pretrained(model)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"backbone_kwargs": {"checkpoint_path": "evil.pth"}}, "checkpoint_path is not allowed"),
        ({"backbone_kwargs": {"pretrained_cfg": {"file": "evil.pth"}}}, "pretrained_cfg is not allowed"),
        ({"backbone": "hf-hub:evil/backbone"}, "is stored elsewhere"),
        ({"backbone": "local-dir:/tmp/evil"}, "is stored elsewhere"),
    ],
)
def test_a_timm_backbone_cannot_bring_files(model: Path, entries: dict[str, Any], says: str) -> None:
    change(
        model / "config.json",
        use_timm_backbone=True,
        backbone_config=None,
        **{"backbone": "resnet18", **entries},
    )
    refused(model, says)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"num_queries": 10**9}, "num_queries must be between 1 and 10000, not 1000000000"),
        ({"num_queries": 0}, "num_queries must be between 1"),
        ({"num_queries": -5}, "num_queries must be between 1"),
        ({"num_queries": "many"}, "num_queries"),
        ({"d_model": 10**6}, "d_model must be between 1 and 8192"),
        ({"encoder_layers": 10**9}, "encoder_layers asks for more than 512 layers"),
        ({"decoder_layers": 10**9}, "decoder_layers asks for more than 512 layers"),
        ({"encoder_ffn_dim": 10**9}, "encoder_ffn_dim must be between 1 and 65536"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads must be between 1"),
        ({"num_channels": 10**9}, "num_channels must be between 1 and 1024"),
        ({"num_labels": 10**12, "id2label": None}, "num_labels must be between 1 and 100000"),
        (
            {"d_model": 8192, "encoder_ffn_dim": 65_536, "encoder_layers": 100},
            r"the configuration of .*model asks for \d+ bytes of weights",
        ),
        ({"dtype": "os.system"}, "cannot read"),
        ({"model_type": "evil"}, "evil"),
    ],
)
def test_an_absurd_configuration_is_refused_before_a_model_is_made(
    model: Path, entries: dict[str, Any], says: str
) -> None:
    change(model / "config.json", **entries)
    refused(model, says)


@pytest.mark.parametrize(
    "sizes", [{"hidden_sizes": [10**6] * 4}, {"depths": [1, 1, 1, 10**9]}, {"embedding_size": 10**9}]
)
def test_an_absurd_backbone_is_refused(model: Path, sizes: dict[str, Any]) -> None:
    backbone = read_json(model / "config.json")["backbone_config"]
    change(model / "config.json", backbone_config={**backbone, **sizes})
    name = next(iter(sizes))
    refused(model, f"{name} of the backbone must not exceed|{name} asks for more than 512 layers")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[1, 2]",
        '"text"',
        "9" * 10_000,
        '{"model_type": ["detr"]}',
        '{"model_type": {"a": 1}}',
        "\0",
    ],
    ids=["deep", "list", "text", "long number", "type a list", "type a mapping", "zero byte"],
)
def test_a_configuration_that_is_none_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    refused(model, "model")


def test_every_value_that_is_no_size_is_refused_in_one_line(model: Path) -> None:
    honest = (model / "config.json").read_bytes()
    for name in ("d_model", "encoder_layers", "num_queries", "decoder_ffn_dim"):
        for value in (None, [], {}, "8", 1e308, -1):
            (model / "config.json").write_bytes(honest)
            change(model / "config.json", **{name: value})
            refused(model, "cannot read|must lie|asks for more than")


def test_the_limit_follows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}[name])
    assert screening.weights_limit() == 4_096_000
    monkeypatch.setattr(
        os, "sysconf", collections.Counter({"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**9}).get
    )
    assert screening.weights_limit() == screening.MAX_WEIGHTS_BYTES
