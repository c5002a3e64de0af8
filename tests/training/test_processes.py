"""Training on two processes: the gradients, and a whole run."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import wait_until
from tests.tiny import FAMILIES, some_labels

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def joint_batch(family):
    """Four images with 3, 3, 3 and 0 objects, so that the processes have 6 and 3.

    For DETR the processes have as many: as in the original, each divides the classification loss by the
    weights of its own queries, which depend on the number of its objects.
    """
    pixels = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    labels = some_labels(4)
    return pixels, [labels[0], labels[3], labels[1], labels[3]] if family == "detr" else labels


def gradients_of(model, pixels, labels):
    model.train()
    model(pixel_values=pixels, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_of_two(rank, family, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(FAMILIES[family].detector(**NO_DROPOUT))
    pixels, labels = joint_batch(family)
    own = slice(2 * rank, 2 * rank + 2)
    torch.save(gradients_of(model, pixels[own], labels[own]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_have_the_gradients_of_the_joint_batch(family, tmp_path):
    multiprocessing.spawn(one_of_two, (family, str(tmp_path)), nprocs=2)
    expected = gradients_of(FAMILIES[family].detector(**NO_DROPOUT), *joint_batch(family))
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {name.removeprefix("module.") for name in found} == expected.keys()
        for name, gradient in expected.items():
            # Some biases cancel out (those of keys, and before a norm): their gradients are rounding errors.
            difference = (found[f"module.{name}"] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm() + 1e-6 * whole, name


def start_two(chosen, *more):
    """Starts a run of a recipe's data and model on two processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "detrkit",
        "train",
    ]
    arguments = [
        *("--model", chosen.model, "--output", chosen.output, "--epochs", chosen.epochs, "--batch-size", 1),
        *("--train-images", chosen.train_images, "--train-annotations", chosen.train_annotations),
        *("--val-images", chosen.val_images, "--val-annotations", chosen.val_annotations),
        *("--log-every", 1, "--workers", 0, "--device", "cpu", *more),
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_and_resume(recipe):
    chosen = recipe(epochs=2)
    for more in ([], ["--resume"]):
        process = start_two(chosen, *more)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        assert errors.count("Best model") == 1
    with (chosen.output / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 3  # six images, one a process and step
    assert len([row for row in rows if row["AP"]]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_run_which_can_be_resumed(recipe, tmp_path, rank):
    runs = {name: recipe(epochs=3, output=tmp_path / name) for name in ("whole", "killed")}
    whole = start_two(runs["whole"], "--save-every", 1)
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors[-3000:]

    process = start_two(runs["killed"], "--save-every", 1)
    checkpoint = runs["killed"].output / "checkpoints" / "checkpoint-4"
    wait_until(checkpoint.exists)
    os.kill(process_of_rank(process.pid, rank), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0

    resumed = start_two(runs["killed"], "--save-every", 1, "--resume")
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors[-3000:]
    for name in ("metrics.csv", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def process_of_rank(launcher, rank):
    """The process that a launcher started with this rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")
