from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SMALL = ("--size", "64x96", "--repeats", 2, "--threads", 1)


def test_engines_are_measured_beside_transformers(detrkit_here: Run, tiny_detr: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = ("benchmark", "--model", tiny_detr, *SMALL, "--transformers", "--csv", out)
    done = detrkit_here(*arguments)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert [line[0] for line in table[2:]] == ["torch", "transformers"]
    assert float(table[3][-1]) == 1
    rows = list(csv.DictReader(out.open()))
    assert [(row["side"], row["stage"]) for row in rows] == [
        (side, stage) for side in ("torch", "transformers") for stage in ("forward", "end to end")
    ]
    for row in rows:
        assert float(row["fastest_s"]) <= float(row["median_s"]) <= float(row["slowest_s"])
        assert float(row["images_per_s"]) == pytest.approx(1 / float(row["median_s"]), rel=0.01)
        assert float(row["peak_mb"]) > 100
        assert (row["repeats"], row["failure"], row["threads"]) == ("2", "", "1")
    assert 0 < float(rows[0]["share_of_limit"]) < 1.5


@pytest.mark.slow
def test_an_exported_folder_is_measured_with_its_own_engine(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    from detrkit.benchmark.models import export

    export(str(tiny_detr), "onnx", tmp_path / "exported")
    done = detrkit_here("benchmark", "--model", tmp_path / "exported", *SMALL, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.strip()][-1] == "onnx"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "{model}", "--size", "800"), "800x1066"),
        (("--model", "{model}", "--size", "0x5"), "800x1066"),
        (("--model", "{model}", "--engines", "torch,onyx"), "onyx"),
        (("--model", "{model}", "--engines", "onnx", "--dtype", "float16"), "float32"),
        (("--model", "{model}", "--device", "cuda:9"), "cuda:9"),
        (("--model", "{model}", "--csv", "{folder}"), "--csv"),
        (("--model", "detr-resnet-5"), "detr-resnet-50"),
        (("--model", "detr-resnet-5", "--random-weights"), "detr-resnet-50"),
    ],
)
def test_mistakes_give_one_line_and_status_2(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = detrkit_here("benchmark", *(a.format(model=tiny_detr, folder=tmp_path) for a in arguments))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr
