"""The server on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from detrkit import Detector
from detrkit.errors import DetrkitError, SettingError
from detrkit.serving.app import build_app
from detrkit.serving.replicas import RayBackend
from detrkit.serving.service import Service
from detrkit.serving.settings import ModelSettings
from tests.conftest import make_picture, wait_until
from tests.inference.test_cluster import ENVIRONMENT
from tests.serving.conftest import Running
from tests.serving.test_contract import error_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on two machines, which here are processes."""
    pytest.importorskip("ray.serve")
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        memory = {"object_store_memory": 100 * 2**20}
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory}
        )
        made.add_node(num_cpus=1, **memory)
        yield made
        ray.shutdown()
        made.shutdown()


@contextlib.contextmanager
def serving(cluster: Any, model: Path, **settings: Any) -> Iterator[Running]:
    from starlette.testclient import TestClient

    models = {"tiny": str(model)}
    backend = RayBackend(
        ModelSettings(models=models, device="cpu", **settings), address=cluster.address, port=1, cpus=1
    )
    service = Service(backend, models)
    with TestClient(build_app(service)) as client:
        wait_until(lambda: service.ready or service.failure)
        yield Running(client, service, None)  # type: ignore[arg-type]


def replicas() -> list[str]:
    """Names of the processes that hold a model."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if "SERVE_REPLICA" in actor["name"])


def test_a_replica_that_dies_under_load_loses_no_request(
    cluster: Any, tiny_detr: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    path = tmp_path / "picture.png"
    make_picture(120, 80).save(path)
    content = path.read_bytes()
    wanted = Detector.from_pretrained(tiny_detr, device="cpu")(path, threshold=0.3)
    with serving(cluster, tiny_detr) as running:
        refused = running.detect(b"no image")
        assert refused.status_code == 400
        assert "Pillow" in error_of(refused)
        assert running.client.get("/v1/model").json()["family"] == "detr"
        [victim] = replicas()
        with ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(running.detect, content, "?threshold=0.3") for _ in range(300)]
            wait_until(lambda: sum(one.done() for one in answers) >= 10)
            ray.kill(ray.get_actor(victim, namespace="serve"))
            assert sum(one.done() for one in answers) < len(answers)
            found = [one.result() for one in answers]
        assert [one.status_code for one in found] == [200] * len(answers)
        for one in found:
            objects = one.json()["objects"]
            assert [entry["name"] for entry in objects] == wanted.names
            assert [entry["score"] for entry in objects] == pytest.approx(wanted.scores.tolist(), abs=1e-5)
        assert victim not in replicas()
        assert "a replica was lost" in caplog.text
    wait_until(lambda: not replicas())


def test_a_model_that_cannot_be_loaded_is_one_line(cluster: Any, tmp_path: Path) -> None:
    with serving(cluster, tmp_path) as running:
        assert isinstance(running.service.failure, DetrkitError)
        assert "config.json" in str(running.service.failure)
        assert "\n" not in str(running.service.failure)


def test_a_server_outside_of_the_cluster_is_refused() -> None:
    with pytest.raises(SettingError, match="start it on a machine of the cluster"):
        RayBackend(ModelSettings(models={"a": "b"}), address="ray://head:10001", port=1)
