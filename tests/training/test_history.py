from detrkit.training.history import best_row, columns, has_stalled, merge_log

LOG = [
    {"loss": 3.0, "loss_ce": 1.0, "learning_rate": 1e-4, "epoch": 0.5, "step": 1},
    {"loss": 2.0, "loss_ce": 0.5, "learning_rate": 1e-4, "epoch": 1.0, "step": 2},
    {"eval_AP": 0.25, "eval_AP50": 0.5, "epoch": 1.0, "step": 2},
    {"train_runtime": 12.0, "epoch": 1.0, "step": 2},
]


def evaluations(*values):
    return [{"step": i, "epoch": i, "AP": value} for i, value in enumerate(values, start=1)]


def test_a_step_has_one_row():
    rows = merge_log(LOG)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1] == {
        "loss": 2.0,
        "loss_ce": 0.5,
        "learning_rate": 1e-4,
        "epoch": 1.0,
        "step": 2,
        "AP": 0.25,
        "AP50": 0.5,
    }


def test_columns_do_not_depend_on_the_order_of_the_log():
    rows = merge_log(LOG)
    expected = ["step", "epoch", "loss", "learning_rate", "AP", "AP50", "loss_ce"]
    assert columns(rows) == expected
    assert columns([dict(sorted(row.items())) for row in reversed(rows)]) == expected


def test_the_best_is_the_earliest_of_equals():
    assert best_row(evaluations(0.1, 0.3, 0.3, 0.2), "AP")["step"] == 2
    assert best_row([], "AP") is None


def test_a_run_stalls_after_so_many_evaluations_without_a_better_one():
    assert not has_stalled(evaluations(0.1, 0.3, 0.2), "AP", 2)
    assert has_stalled(evaluations(0.1, 0.3, 0.2, 0.3), "AP", 2)
    assert not has_stalled(evaluations(0.1, 0.3, 0.2, 0.31), "AP", 2)
    assert not has_stalled(evaluations(0.3, 0.2, 0.1), "AP", None)
