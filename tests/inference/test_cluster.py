from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detrkit import Detector
from detrkit.cli.options import name_ray_address
from detrkit.errors import ImageError, MissingExtraError, SettingError
from detrkit.inference.cluster import RayDetector
from detrkit.inference.ray_connection import is_ray_address, shares
from tests.cli.conftest import Run, detrkit, working_directory  # noqa: F401 - fixtures
from tests.closeness import assert_same_documents
from tests.conftest import make_picture, wait_until

# As many threads here as each worker has, so that sums are made in the same order.
CPUS = 1
ENVIRONMENT = {"OMP_NUM_THREADS": str(CPUS), "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on several machines, which here are processes: a head and two others."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        memory = {"object_store_memory": 100 * 2**20}
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False, **memory}
        )
        for _ in range(2):
            made.add_node(num_cpus=CPUS, **memory)
        yield made
        import ray

        ray.shutdown()
        made.shutdown()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{number}.png" for number in range(40)]
    for number, path in enumerate(paths):
        make_picture(120, 80 + 10 * (number % 3), seed=number).save(path)
    return paths


def test_results_come_in_order_and_are_those_of_one_machine(
    cluster: Any, tiny_detr: Path, images: list[Path]
) -> None:
    detector = RayDetector(tiny_detr, address=cluster.address)
    assert (detector.workers, detector.cpus, detector.gpus) == (3, CPUS, 0)
    wanted = list(Detector.from_pretrained(tiny_detr, device="cpu").stream(images, 0.1))
    found = list(detector.stream(images, 0.1))
    assert [one.source for one in found] == [str(path) for path in images]
    for one, other in zip(found, wanted):
        assert one.names == other.names
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.slow
def test_segments_and_masks_come_too(cluster: Any, tiny_panoptic: Path, images: list[Path]) -> None:
    detector = RayDetector(tiny_panoptic, address=cluster.address)
    single = Detector.from_pretrained(tiny_panoptic, device="cpu")
    assert detector.categories() == single.categories()
    for one, other in zip(
        detector.stream_segments(images[:4], 0.1), single.stream_segments(images[:4], 0.1), strict=True
    ):
        assert one.names == other.names
        assert (one.ids != other.ids).mean() < 0.01
    masks = next(detector.stream(images[:1], 0.1)).masks
    assert (masks != next(single.stream(images[:1], 0.1)).masks).mean() < 0.01


@pytest.mark.slow
def test_an_image_that_cannot_be_read_stops_no_other(
    cluster: Any, tiny_detr: Path, images: list[Path]
) -> None:
    images[3].write_bytes(b"no image")
    detector = RayDetector(tiny_detr, address=cluster.address)
    found = dict(detector.results(images))
    assert sorted(found) == list(range(40))
    assert [position for position, result in found.items() if isinstance(result, ImageError)] == [3]
    assert str(images[3]) in str(found[3])
    with pytest.raises(ImageError, match=r"3\.png"):
        list(detector.stream(images))


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, without the lines of progress that a busy machine gets."""
    return "".join(line for line in done.stderr.splitlines(True) if not line.startswith("Detecting: "))


def test_the_command_writes_the_document_of_a_local_run(
    cluster: Any,
    detrkit: Run,  # noqa: F811
    tiny_detr: Path,
    images: list[Path],
    tmp_path: Path,
) -> None:
    images[5].write_bytes(images[5].read_bytes()[:70])
    command = ["detect", tmp_path / "images", "--model", tiny_detr, "-t", 0.1, "--json"]
    local = detrkit(*command, tmp_path / "local.json", environment=ENVIRONMENT)
    spread = detrkit(*command, tmp_path / "ray.json", "--ray", cluster.address, environment=ENVIRONMENT)
    assert (spread.returncode, said(spread).replace("ray.json", "local.json")) == (1, said(local))
    assert_same_documents(tmp_path / "ray.json", tmp_path / "local.json")


def test_settings_that_cannot_be_had_give_one_line(
    cluster: Any,
    detrkit: Run,  # noqa: F811
    tiny_detr: Path,
    images: list[Path],
    tmp_path: Path,
) -> None:
    command = ["detect", images[0], "--model", tiny_detr, "--ray", cluster.address]
    for options, said in (
        (["--ray-cpus", 99], "99 cores"),
        (["--save-dir", tmp_path / "drawn"], "--save-dir"),
        (["--engine", "onyx"], "onyx"),
    ):
        done = detrkit(*command, *options, environment=ENVIRONMENT)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert said in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["worker", "node"])
def test_a_lost_worker_or_machine_changes_nothing(
    cluster: Any, tiny_detr: Path, tmp_path: Path, loss: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(600):
        make_picture(320, 240, seed=number % 11).save(folder / f"{number}.png")
    command = [sys.executable, "-m", "detrkit", "detect", folder, "--model", tiny_detr, "-t", "0.1"]
    command = [*map(str, command), "--json"]
    environment = os.environ | ENVIRONMENT
    local, out = tmp_path / "local.json", tmp_path / "ray.json"
    subprocess.run([*command, str(local)], env=environment, check=True, capture_output=True)
    extra = cluster.add_node(num_cpus=CPUS, object_store_memory=100 * 2**20)
    process = subprocess.Popen(
        [*command, str(out), "--ray", cluster.address], env=environment, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "ray.json.unfinished.jsonl"
    wait_until(lambda: process.poll() is not None or line_count(journal) > 100)
    assert process.poll() is None, process.communicate()
    if loss == "node":
        cluster.remove_node(extra, allow_graceful=False)
    else:
        os.kill(worker_process(), signal.SIGKILL)
    done_before = line_count(journal) - 1
    _, messages = process.communicate(timeout=300)
    if loss == "worker":
        cluster.remove_node(extra)
    assert done_before < 600, "the loss came too late to matter"
    assert process.returncode == 0, messages
    assert_same_documents(out, local)


def line_count(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def worker_process() -> int:
    """The process of one of the job's workers; Ray names them after what they do."""
    for folder in Path("/proc").iterdir():
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::MapWorker" in name:
            return int(folder.name)
    raise AssertionError("no worker is running")


# Without a cluster


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *((text, True) for text in ("auto", "local", "head:6379", "10.0.0.1:6379", "ray://head:10001")),
        *((text, False) for text in ("", "photos", "a.jpg", "photos/a:1", "http://x/a.jpg", "head:", ":1")),
    ],
)
def test_addresses_are_told_from_images(text: str, is_one: bool) -> None:
    assert is_ray_address(text) == is_one
    named = name_ray_address(["detect", "--ray", text, "-t", "0"])
    assert named == (["detect", "--ray", *([] if is_one else ["auto"]), text, "-t", "0"])


def test_ray_at_the_end_needs_no_address() -> None:
    assert name_ray_address(["detect", "x", "--ray"]) == ["detect", "x", "--ray", "auto"]
    assert name_ray_address(["detect", "x", "--ray=local"]) == ["detect", "x", "--ray=local"]


def machines(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": each} for each in resources]


@pytest.mark.parametrize(
    ("nodes", "asked", "given"),
    [
        ([{"CPU": 4}, {"CPU": 4}], {}, (2, 4, 0)),
        ([{"CPU": 4}, {"CPU": 64}], {}, (17, 4, 0)),
        ([{"CPU": 64}, {"CPU": 64}], {}, (16, 8, 0)),
        ([{"CPU": 64}, {"CPU": 64}], {"cpus": 16, "workers": 3}, (3, 16, 0)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 8}], {}, (4, 4, 1)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 8}], {"device": "cpu"}, (3, 8, 0)),
        ([{"CPU": 1, "GPU": 2}], {}, (1, 1, 1)),
    ],
)
def test_workers_share_the_cores(
    nodes: list[dict[str, float]], asked: dict[str, Any], given: tuple[int, int, int]
) -> None:
    settings = {"workers": None, "cpus": None, "device": None, **asked}
    assert shares(machines(*nodes), **settings) == given


@pytest.mark.parametrize("asked", [{"cpus": 9}, {"cpus": 0}, {"workers": 0}])
def test_shares_that_no_machine_has_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        shares(machines({"CPU": 8}), **{"workers": None, "cpus": None, "device": None, **asked})
    with pytest.raises(SettingError, match="no machine"):
        shares([{"Alive": False, "Resources": {"CPU": 8}}], None, None, None)


def test_a_missing_package_names_its_extra(tiny_detr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"'\.\[ray\]'"):
        RayDetector(tiny_detr)
