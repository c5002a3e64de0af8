import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image

from detrkit import DetectionConfig, Detector
from detrkit.common.locks import hold
from detrkit.errors import DetrkitError, SettingError, TrainingError
from detrkit.evaluation import evaluate_detector
from detrkit.models.layers.backbone import FrozenBatchNorm2d
from detrkit.training import run as run_module
from detrkit.training import train
from detrkit.training.optimization import AveragedWeights
from detrkit.training.trainer import DetectionTrainer, is_whole, last_checkpoint
from tests.conftest import read_json, wait_until
from tests.hub.server import WRITER, HubServer

REPORTS = {
    "README.md",
    "ap.png",
    "checkpoints",
    "detection_config.json",
    "config.json",
    "loss.png",
    "metrics.csv",
    "model.safetensors",
    "predictions.png",
    "preprocessor_config.json",
    "recipe.json",
}


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


class Killed(BaseException):
    """Stands for what ends a process: nothing in a run catches it."""


def kill_at_step(monkeypatch, step):
    original = DetectionTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DetectionTrainer, "compute_loss", compute_loss)


def test_a_run_leaves_a_model_and_its_reports(recipe, real_charts, capsys):
    chosen = recipe()
    result = train(chosen)
    folder = chosen.output
    assert {path.name for path in folder.iterdir()} == REPORTS
    for name in ("ap.png", "loss.png", "predictions.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert [bool(row["AP"]) for row in rows] == [False, False, True] * 2
    assert all(float(row["loss_giou"]) > 0 for row in rows)
    assert capsys.readouterr().err.count("Epoch ") == 2

    detector = Detector.from_pretrained(folder)
    assert detector.names == {0: "disc", 1: "square"}
    assert detector.detection_config.chosen["training_scale"]["large_object_side"] > 0
    data = chosen.val_images, chosen.val_annotations
    assert "image_size" in detector.detection_config.chosen["training_scale"]
    measured = evaluate_detector(detector, *data, batch_size=2, raw=True)
    assert measured.stats["AP"] == pytest.approx(result.best["AP"], abs=1e-9)
    front_matter = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    (entry,) = front_matter["model-index"][0]["results"]
    numbers = {metric["name"]: metric["value"] for metric in entry["metrics"]}
    assert numbers["AP"] == pytest.approx(result.best["AP"], abs=1e-4)
    assert entry["dataset"]["name"] == "instances.json"


def test_a_model_keeps_its_overlap_filter_and_is_evaluated_with_it(
    recipe, tiny_deformable_detr, tmp_path, monkeypatch
):
    start = tmp_path / "start"
    shutil.copytree(tiny_deformable_detr, start)
    own = DetectionConfig(overlap=0.7, class_agnostic=True)
    replace(own, threshold={"N/A": 0.9}).save_pretrained(start)  # thresholds belong to its classes
    used = []

    def watch(detector, *given, **options):
        used.append(detector.detection_config)
        return evaluate_dataset(detector, *given, **options)

    evaluate_dataset = run_module.evaluate_dataset
    monkeypatch.setattr(run_module, "evaluate_dataset", watch)
    chosen = recipe(model=str(start), epochs=1)
    train(chosen)
    assert used == [own]
    settings = Detector.from_pretrained(chosen.output).detection_config
    assert (settings.overlap, settings.class_agnostic) == (0.7, True)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe, tmp_path, monkeypatch):
    options = {"epochs": 2, "save_every": 2, "augmentation": "strong", "multi_scale": 0.2, "log_every": 2}
    train(recipe(output=tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5)
        with pytest.raises(Killed):
            train(recipe(output=tmp_path / "killed", **options))
    assert last_checkpoint(tmp_path / "killed" / "checkpoints").name == "checkpoint-4"
    train(recipe(output=tmp_path / "killed", resume=True, **options))
    for name in ("metrics.csv", "model.safetensors", "checkpoints/checkpoint-6/averaged_weights.pt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_images_of_rare_classes_are_repeated_also_by_a_resumed_run(recipe, tmp_path, monkeypatch, capsys):
    options = {"epochs": 2, "repeat_rare": 1.0, "mosaic": 0.5}
    train(recipe(output=tmp_path / "whole", **options))
    found = re.search(
        r"an epoch shows (\d+) images, (\d+) of them again", " ".join(capsys.readouterr().err.split())
    )
    shown, again = map(int, found.groups())
    assert (shown - again, again > 0) == (6, True)
    steps = shown // 2
    with monkeypatch.context() as patch:
        kill_at_step(patch, steps + 2)
        with pytest.raises(Killed):
            train(recipe(output=tmp_path / "killed", **options))
    train(recipe(output=tmp_path / "killed", resume=True, **options))
    assert len(read_metrics(tmp_path / "killed")) == 2 * steps
    for name in ("metrics.csv", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(SettingError, match=r"started with --repeat-rare 1\.0, not 0\.0"):
        train(recipe(output=tmp_path / "killed", resume=True, epochs=2, mosaic=0.5))


def test_the_order_of_the_images_does_not_depend_on_the_number_of_readers(recipe, tmp_path):
    train(recipe(output=tmp_path / "none", epochs=1))
    train(recipe(output=tmp_path / "two", epochs=1, workers=2))
    assert (tmp_path / "two" / "metrics.csv").read_bytes() == (tmp_path / "none" / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_a_process_killed_at_any_moment_can_be_resumed(recipe, tmp_path):
    def start(name, *more):
        chosen = recipe(output=tmp_path / name)
        arguments = [
            *("--model", chosen.model, "--output", chosen.output, "--epochs", 3, "--batch-size", 2),
            *("--train-images", chosen.train_images, "--train-annotations", chosen.train_annotations),
            *("--val-images", chosen.val_images, "--val-annotations", chosen.val_annotations),
            *("--log-every", 1, "--save-every", 1, "--workers", 0, "--device", "cpu", *more),
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "detrkit", "train", *map(str, arguments)],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    assert start("whole").wait(300) == 0
    process = start("killed")
    checkpoints = tmp_path / "killed" / "checkpoints"
    # While the fifth checkpoint is being written, or just after.
    wait_until((checkpoints / "checkpoint-5").exists)
    process.send_signal(signal.SIGKILL)
    assert process.wait(120) == -signal.SIGKILL
    assert start("killed", "--resume").wait(300) == 0
    for name in ("metrics.csv", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for step in (3, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"log_hist')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert not (tmp_path / "checkpoint-12").exists()


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_evaluation_that_fails_loses_nothing(recipe, tmp_path, monkeypatch, epoch):
    train(recipe(output=tmp_path / "whole"))
    measure = run_module._measure
    calls = []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == epoch:
            raise Killed
        return measure(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_measure", fail)
        with pytest.raises(Killed):
            train(recipe(output=tmp_path / "killed"))
    assert last_checkpoint(tmp_path / "killed" / "checkpoints").name == f"checkpoint-{3 * epoch}"
    train(recipe(output=tmp_path / "killed", resume=True))
    for name in ("metrics.csv", "model.safetensors", "checkpoints/checkpoint-6/averaged_weights.pt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_images_that_break_late_are_left_out_and_named(recipe, annotations, tmp_path, caplog):
    shutil.copytree(annotations.parent, tmp_path / "moved")
    images, path = tmp_path / "moved" / "images", tmp_path / "moved" / "instances.json"
    for name in ("2.png", "6.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-200])
    broken = {
        "train_images": images,
        "train_annotations": path,
        "val_images": images,
        "val_annotations": path,
    }
    result = train(recipe(epochs=1, **broken))
    assert len(result.rows) == 3
    for name in ("2.png", "6.png"):
        assert re.search(rf"left out of training.*{name}", caplog.text)
        assert re.search(rf"left out of the evaluation.*{name}", caplog.text)
    with pytest.raises(DetrkitError, match=r"[26]\.png"):
        train(recipe(epochs=1, strict=True, output=tmp_path / "strict", **broken))
    caplog.clear()
    train(recipe(epochs=1, check_images=True, output=tmp_path / "checked", **broken))
    assert "image file unreadable: 2 dropped" in caplog.text
    assert "left out of" not in caplog.text


def test_a_run_says_what_it_does_and_how_long_it_takes(recipe, monkeypatch, capsys):
    monkeypatch.setattr("detrkit.training.callbacks._LINE_SECONDS", 0.0)
    chosen = recipe(epochs=1, log_every=3)
    train(chosen)
    said = capsys.readouterr().err
    assert "repeat" not in said
    assert re.search(r"Training: 6 images with \d objects \(\w+ \d, \w+ \d\)\.", said)
    assert "1 epoch of 3 steps with 2 images each, on cpu in fp32; learning rate 0.0002" in said
    assert f"go to {chosen.output}." in said
    assert re.search(r"Step 2 of 3: \d+ s left", said)  # no loss is known before the first log
    assert re.search(r"Epoch 1 of 1: loss [1-9]\d*\.\d+, ", said)


def test_no_number_stands_for_a_size_that_no_object_has(recipe):
    chosen = recipe(epochs=1)
    train(chosen)
    assert "-1" not in (chosen.output / "metrics.csv").read_text().replace("e-1", "")


@pytest.mark.parametrize("failing", ["torch.save", "model"])
def test_a_full_disk_leaves_the_checkpoint_before(recipe, monkeypatch, failing):
    chosen = recipe()
    with monkeypatch.context() as patch:
        original = torch.save if failing == "torch.save" else DetectionTrainer.save_model

        def save(*args, **kwargs):
            if (chosen.output / "checkpoints" / "checkpoint-3" / "trainer_state.json").exists():
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        if failing == "torch.save":
            patch.setattr(torch, "save", save)
        else:
            patch.setattr(DetectionTrainer, "save_model", save)
        with pytest.raises(DetrkitError, match=r"checkpoint-6.*No space left.*resume"):
            train(chosen)
    assert not (chosen.output / "checkpoints" / "checkpoint-6").exists()
    assert is_whole(chosen.output / "checkpoints" / "checkpoint-3")
    Detector.from_pretrained(chosen.output)
    assert len(train(replace(chosen, resume=True)).rows) == 6


def test_only_the_last_checkpoint_is_kept(recipe):
    chosen = recipe(save_every=1)
    train(chosen)
    assert [path.name for path in (chosen.output / "checkpoints").iterdir()] == ["checkpoint-6"]


def test_a_run_is_not_overwritten_by_mistake(recipe):
    chosen = recipe(epochs=1)
    train(chosen)
    with pytest.raises(SettingError, match="--resume"):
        train(chosen)
    # Nothing is left to train; the numbers are those of before.
    assert len(train(replace(chosen, resume=True)).rows) == 3


def test_a_run_beside_another_process_and_one_over_a_finished_run_are_refused(recipe):
    chosen = recipe(epochs=1)
    train(chosen)
    lock = chosen.output / ".lock"
    assert not lock.exists()
    with hold(lock, chosen.output), pytest.raises(DetrkitError, match="another process"):
        train(replace(chosen, resume=True))
    lock.unlink()
    shutil.rmtree(chosen.output / "checkpoints")
    with pytest.raises(SettingError, match="already contains a run"):
        train(chosen)


def test_a_model_is_not_overwritten_by_mistake(recipe):
    chosen = recipe()
    with pytest.raises(SettingError, match="would overwrite"):
        train(replace(chosen, output=chosen.model))


def test_resuming_where_nothing_began_begins(recipe, caplog):
    assert len(train(recipe(epochs=1, resume=True)).rows) == 3
    assert "from the beginning" in caplog.text


def test_a_run_that_gets_no_better_stops(recipe, monkeypatch):
    numbers = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(run_module, "_measure", lambda *args, **options: {"AP": next(numbers)})
    result = train(recipe(epochs=5, patience=2))
    assert [row["AP"] for row in result.rows if "AP" in row] == [0.1, 0.3, 0.2, 0.3]
    assert result.best["epoch"] == 2
    # The saved model is the one of the second epoch.
    assert "those of epoch 2," in (result.folder / "README.md").read_text()


def test_evaluations_may_be_rarer(recipe):
    result = train(recipe(epochs=3, eval_every=2))
    assert [row["epoch"] for row in result.rows if "AP" in row] == [2, 3]


@pytest.mark.parametrize("spoil", ["prediction", "loss"])
def test_a_loss_that_is_not_finite_names_step_images_and_term(recipe, monkeypatch, spoil):
    original = DetectionTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 1:
            if spoil == "prediction":
                inputs["pixel_values"][:] = float("nan")
            else:
                model.config.giou_loss_coefficient = float("inf")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DetectionTrainer, "training_step", training_step)
    message = {
        "prediction": r"step 2: .*not finite: loss_ce of image_id \d \(predicted logits\)",
        "loss": r"step 2, images \d, \d: not finite: the sum of the losses",
    }
    with pytest.raises(TrainingError, match=message[spoil]):
        train(recipe())


def test_a_new_model_learns_batch_norm_and_is_saved_frozen(recipe, monkeypatch):
    means = []
    update = AveragedWeights.update_parameters

    def watch(self, model):
        means.append(model.model.backbone.conv_encoder.model.bn1.running_mean.clone())
        update(self, model)

    monkeypatch.setattr(AveragedWeights, "update_parameters", watch)
    chosen = recipe(
        model="deformable-detr",
        from_scratch=True,
        backbone="resnet10t",
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        queries=8,
        image_size=64,
        epochs=1,
        model_option=["dropout=0.05", "with_box_refine=true"],
    )
    train(chosen)
    assert not torch.equal(means[0], means[-1])
    config = json.loads((chosen.output / "config.json").read_text())
    assert (config["dropout"], config["with_box_refine"], config["num_queries"]) == (0.05, True, 8)
    detector = Detector.from_pretrained(chosen.output)
    assert detector.processor.size == {"shortest_edge": 64, "longest_edge": 107}
    model = type(detector.model).from_pretrained(chosen.output)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


def test_what_scores_are_trained_to_be_is_kept_by_the_model_and_by_training_it_further(recipe, tmp_path):
    first = recipe(class_targets="iou", epochs=1)
    plain = train(recipe(epochs=1, output=tmp_path / "plain"))
    assert train(first).rows[0]["loss_ce"] != plain.rows[0]["loss_ce"]
    assert read_json(first.output / "config.json")["class_targets"] == "iou"
    further = recipe(model=str(first.output), epochs=1, output=tmp_path / "further")
    train(further)
    assert read_json(further.output / "config.json")["class_targets"] == "iou"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "detr", "from_scratch": True, "backbone": "resnet18", "class_targets": "iou"}, "softmax"),
        ({"model": "deformable-dtr", "from_scratch": True}, "did you mean 'deformable-detr'"),
        ({"model": "detr", "from_scratch": True, "backbone": "resnet5O"}, "did you mean 'resnet"),
        ({"model_option": ["dropot=0"]}, "did you mean 'dropout'"),
        ({"augmentation": "lite"}, "did you mean 'light'"),
        ({"device": "cuda:9"}, "not available"),
        ({"masks": True}, "no models with masks"),
        ({"report_to": ["tensorbord"]}, "--report-to tensorbord"),
    ],
)
def test_a_mistake_is_named_before_the_first_step(recipe, options, message):
    with pytest.raises(DetrkitError, match=message):
        train(recipe(**options))


def test_the_model_is_uploaded_without_checkpoints(recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        chosen = recipe(epochs=1, push_to_hub=True, hub_id="you/cells")
        train(chosen)
        files = hub.repositories["you/cells"]["main"]
    assert {"model.safetensors", "config.json", "README.md", "metrics.csv", "recipe.json"} <= files.keys()
    assert files["model.safetensors"] == (chosen.output / "model.safetensors").read_bytes()
    assert not any("checkpoint" in name for name in files)


def test_a_missing_login_is_told_before_training(recipe, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    chosen = recipe(epochs=1, push_to_hub=True)
    with pytest.raises(DetrkitError, match="hf auth login"):
        train(chosen)
    assert not chosen.output.exists()


def test_a_model_that_cannot_be_uploaded_is_not_lost(recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with HubServer({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        chosen = recipe(epochs=1, push_to_hub=True)
        with pytest.raises(DetrkitError, match=r"the model is in .*, but could not be uploaded: .*401"):
            train(chosen)
    assert (chosen.output / "model.safetensors").exists()
