"""The scripts in benchmarks/: that they can be started, and what they do beside measuring."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from detrkit.benchmark.report import append_csv
from tests.tiny import FAMILIES

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The module that the test is parametrised with, imported as when it is run."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module(request.param)
    for name in [name for name, module in sys.modules.items() if _comes_from(module, FOLDER)]:
        del sys.modules[name]


def _comes_from(module: ModuleType, folder: Path) -> bool:
    return Path(getattr(module, "__file__", None) or "/").parent == folder


@pytest.mark.parametrize(
    "script", ["engines", "gpu", "growth", "throughput", "time_by_kind"], indirect=True, ids=str
)
def test_help_comes_from_the_scripts_own_account(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 0
    assert f"python benchmarks/{script.__name__}.py" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_the_script_for_gpus_runs_on_a_cpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:

    def save_tiny(name: str, folder: Path) -> None:
        family = "deformable_detr_two_stage" if name.startswith("deformable") else "detr"
        FAMILIES[family].save(folder)

    monkeypatch.setattr(script.models, "save_random", save_tiny)
    monkeypatch.setattr(script.machine, "matrix_rate", lambda *_: 1.0)
    command = "gpu.py --device cpu --size 64x96 --repeats 1 --photos 2 --training-batch 1 --batches 1"
    command += " --dtypes float32 --models detr-resnet-50 --compile --steps operator training images models"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--csv", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert not left.value.code
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gpu_images.csv", "gpu_models.csv", "gpu_operator.csv", "gpu_training.csv"]
    assert "no time was left" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["growth"], indirect=True)
def test_the_chart_of_growth_has_a_panel_for_each_axis(script: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"model": "m", "side": side, "axis": axis, "value": value, "median_s": seconds, "peak_mb": 500}
        for axis in ("side", "batch")
        for value, seconds in ((1, 0.5), (2, 0.9), (3, None))
        for side in ("torch", "transformers")
    ]
    append_csv(tmp_path / "growth.csv", rows)
    script.draw(tmp_path / "growth.csv", tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size == (1080, 840)
    text_rows = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert script.lines(text_rows, "batch", "median_s")["m", "torch"] == [(1, 0.5), (2, 0.9)]


@pytest.mark.parametrize("script", ["throughput"], indirect=True)
def test_detections_are_counted_as_found_once(script: ModuleType) -> None:
    cat, far = ("cat", 0.9, [1.0, 2.0, 3.0, 4.0]), ("cat", 0.9, [9.0, 2.0, 13.0, 4.0])
    near = ("cat", 0.9005, [1.9, 2.9, 3.5, 4.9])
    assert script.share_found({"a": [cat]}, {"a": [near]}) == 1
    assert script.share_found({"a": [cat, cat]}, {"a": [near]}) == 0.5
    assert script.share_found({"a": [cat]}, {"a": [far, ("dog", 0.9, cat[2]), ("cat", 0.5, cat[2])]}) == 0


@pytest.mark.parametrize("script", ["time_by_kind"], indirect=True)
@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("detrkit::deformable_attention", "deformable attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("aten::addmm", "matrix product"),
        ("mkldnn::_linear_pointwise", "matrix product"),
        ("aten::native_layer_norm", "norm"),
        ("aten::mul_", "elementwise"),
        ("aten::copy_", "gather and copy"),
        ("aten::empty", "other"),
        ("FusedConv", "convolution"),
        ("FullyConnected", "matrix product"),
        ("FusedMatMul", "matrix product"),
        ("Softmax", "attention"),
        ("Convert", "gather and copy"),
        ("MVN", "norm"),
        ("Mul", "elementwise"),
    ],
)
def test_operators_have_a_kind(script: ModuleType, operator: str, kind: str) -> None:
    assert script.kind_of(operator) == kind
