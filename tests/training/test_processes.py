"""Training on two processes: the gradients, and a whole run."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.models.tiny import FAMILIES, some_labels

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


@pytest.mark.slow
def test_two_processes_train_and_resume(recipe):
    chosen = recipe(epochs=2, batch_size=1)
    arguments = [
        *("--model", chosen.model, "--output", chosen.output, "--epochs", 2, "--batch-size", 1),
        *("--train-images", chosen.train_images, "--train-annotations", chosen.train_annotations),
        *("--val-images", chosen.val_images, "--val-annotations", chosen.val_annotations),
        *("--log-every", 1, "--workers", 0, "--device", "cpu"),
    ]
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
    for more in ([], ["--resume"]):
        done = subprocess.run(
            [*command, *map(str, arguments), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("Best model") == 1
    with (chosen.output / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 3  # six images, one a process and step
    assert len([row for row in rows if row["AP"]]) == 2
