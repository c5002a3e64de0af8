"""Detections as rows of tables and lines of JSON."""

from __future__ import annotations

import builtins
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from detrkit.common.tables import csv_lines, write_csv
from detrkit.errors import MissingExtraError
from detrkit.results.detections import Detections
from detrkit.results.tables import (
    COUNTS_MARKS,
    OBJECTS_MARK,
    count_columns,
    count_row,
    json_line,
    object_columns,
    object_rows,
)

IMAGE = {"id": 4, "file_name": "clip.gif#frame=3", "width": 60, "height": 40}
FRAME = IMAGE | {"frame_index": 2, "timestamp": 0.25}
FOUND = [
    {"category_id": 2, "bbox": [1.5, 2.0, 10.25, 20.0], "score": 0.9, "track_id": 7},
    {"category_id": 0, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5},
]
NAMES = {0: "cat", 1: "dog", 2: "total", 3: "cat"}


def some_detections() -> Detections:
    return Detections(
        boxes=np.array([[1, 2, 3.3, 4.7], [0, 0, 5, 5]], dtype=np.float32),
        scores=np.array([0.9, 0.6], dtype=np.float32),
        labels=np.array([2, 0]),
        names=["couch", "=cat"],
        image_size=(40, 60),
        source="shots/a.jpg",
    )


def test_an_object_has_a_row_with_its_corners_and_the_size_of_its_image() -> None:
    first, second = object_rows(IMAGE, FOUND, NAMES)
    assert first == ["clip.gif#frame=3", 2, "total", 0.9, 1.5, 2.0, 11.75, 22.0, 60, 40]
    assert second[1:3] == [0, "cat"]
    assert len(object_columns()) == len(first)


def test_a_frame_has_its_index_and_time_in_columns_of_their_own() -> None:
    first, second = object_rows(FRAME, FOUND, NAMES, frames=True, tracks=True)
    assert first[:5] == ["clip.gif", 2, 0.25, 7, 2]
    assert second[3] is None
    assert object_columns(frames=True, tracks=True)[:5] == [
        *("file_name", "frame_index", "timestamp", "track_id", "label")
    ]
    [still, _] = object_rows(IMAGE, FOUND, NAMES, frames=True)
    assert still[:3] == ["clip.gif#frame=3", None, None]


def test_counts_have_a_column_for_each_class_and_no_two_of_one_name() -> None:
    columns = count_columns(NAMES)
    assert columns == ["file_name", "total", "cat (0)", "dog", "total (2)", "cat (3)"]
    assert count_row(IMAGE, FOUND, NAMES) == ["clip.gif#frame=3", 2, 1, 0, 1, 0]
    assert count_row(IMAGE, [], NAMES)[1:] == [0, 0, 0, 0, 0]
    assert count_row(FRAME, FOUND, NAMES, frames=True)[:4] == ["clip.gif", 2, 0.25, 2]


def test_headings_bear_the_marks_by_which_a_later_run_knows_its_tables() -> None:
    for frames in (False, True):
        for tracks in (False, True):
            [heading] = csv_lines(object_columns(frames=frames, tracks=tracks), [])
            assert OBJECTS_MARK in heading.encode()
        [heading] = csv_lines(count_columns(NAMES, frames=frames), [])
        assert heading.encode().startswith(COUNTS_MARKS)


def test_a_line_of_json_is_one_image() -> None:
    line = json_line(FRAME, FOUND, NAMES)
    assert line.endswith("}\n")
    document = json.loads(line)
    assert document["objects"][0] == {
        **{"label": 2, "name": "total", "score": 0.9},
        **{"box": [1.5, 2.0, 11.75, 22.0], "track_id": 7},
    }
    assert (document["frame_index"], document["width"]) == (2, 60)
    assert "track_id" not in document["objects"][1]


def test_no_cell_is_a_formula_and_any_file_name_can_be_written(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["=a", "b"], [["@sum", None], ["byte\udcff, \n.jpg", -1.5]])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["'=a", "b"], ["'@sum", ""], ["byte\\udcff, \n.jpg", "-1.5"]]


def test_detections_give_the_rows_of_the_command() -> None:
    rows = some_detections().to_rows()
    assert [list(row) for row in rows] == [object_columns()] * 2
    assert [row["name"] for row in rows] == ["couch", "=cat"]
    np.testing.assert_allclose([rows[0][c] for c in ("x0", "y0", "x1", "y1")], [1, 2, 3.3, 4.7], atol=1e-6)
    assert rows[0]["file_name"] == "shots/a.jpg"


def test_detections_become_a_data_frame_with_columns_even_if_there_are_none() -> None:
    pandas = pytest.importorskip("pandas")
    frame = some_detections().to_pandas()
    assert list(frame.columns) == object_columns()
    assert frame["label"].tolist() == [2, 0]
    assert (frame["width"] == 60).all()
    nothing = some_detections()[:0].to_pandas()
    assert isinstance(nothing, pandas.DataFrame)
    assert (list(nothing.columns), len(nothing)) == (object_columns(), 0)
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False)
    assert len(buffer.getvalue().splitlines()) == 3


def test_without_pandas_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        some_detections().to_pandas()
