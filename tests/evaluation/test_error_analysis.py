from __future__ import annotations

import gzip
import json

import pytest

from detrkit.evaluation import evaluate_predictions
from detrkit.evaluation.coco import read_ground_truth
from detrkit.evaluation.error_analysis import KINDS, analyse_errors
from tests.evaluation.test_coco import ground_truth, perfect_results, result
from tests.golden import COCO_RESULTS

# What tidecv 1.0.1 gives, in percent: AP50, and cost and count of each kind.
TIDE = {
    "bbox": (
        64.20498881733425,
        (22.24603974, 0.22789102, 0, 0.01897297, 0, 8.52357379),
        (83, 1, 0, 1, 0, 97),
    ),
    "segm": (
        51.80081155512982,
        (16.18600085, 11.60072279, 1.01285095, 0, 0.26811075, 7.77863934),
        (76, 82, 7, 0, 4, 109),
    ),
}


@pytest.mark.parametrize("iou_type", TIDE)
def test_the_numbers_are_those_of_tide(iou_type: str) -> None:
    truth = read_ground_truth(COCO_RESULTS / "instances_val2014_100.json.gz", masks=True)
    packed = (COCO_RESULTS / f"instances_val2014_fake{iou_type}100_results.json.gz").read_bytes()
    results = json.loads(gzip.decompress(packed))
    ap50, costs, counts = TIDE[iou_type]
    found = analyse_errors(truth, results, iou_type)
    assert 100 * found.ap50 == pytest.approx(ap50, abs=1e-6)
    assert [100 * found.costs[kind] for kind in KINDS] == pytest.approx(costs, abs=1e-6)
    assert tuple(found.counts[kind] for kind in KINDS) == counts


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda r: r[0].update(category_id=8), "classification"),
        (lambda r: r[0].update(bbox=[60, 0, 100, 100]), "localisation"),
        (lambda r: r[0].update(bbox=[60, 0, 100, 100], category_id=8), "both"),
        (lambda r: r.append({**r[0], "score": 0.5}), "duplicate"),
        (lambda r: r.append(result(1, 3, [0, 250, 20, 20], 0.5)), "background"),
        (lambda r: r.pop(0), "missed"),
    ],
)
def test_a_mistake_is_of_its_kind(change, kind: str) -> None:
    results = perfect_results()
    change(results)
    counts = analyse_errors(read_ground_truth(ground_truth()), results).counts
    assert counts[kind] == 1
    others = {name: number for name, number in counts.items() if number and name != kind}
    assert others == ({"missed": 1} if kind == "both" else {})


def test_perfect_detections_have_no_mistakes(tmp_path) -> None:
    for name, content in (("truth", ground_truth()), ("found", perfect_results())):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    evaluation = evaluate_predictions(tmp_path / "truth.json", tmp_path / "found.json", errors=True)
    assert evaluation.errors.ap50 == 1
    assert set(evaluation.errors.costs.values()) == {0}
    assert evaluation.to_dict()["errors"]["counts"] == dict.fromkeys(KINDS, 0)
    assert evaluation.errors.table().row_count == 6
