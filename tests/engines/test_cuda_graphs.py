"""A replayed pass gives what the pass itself gives, and gives way wherever it could not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from detrkit.engines.cuda_graphs import EAGER_CALLS, GRAPHS_KEPT, replay_recurring
from tests.tiny import FAMILIES, padded_batch

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Counting(nn.Module):
    """Doubles and shifts; counts how often Python runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: torch.Tensor, shift: float = 0.0, unused: object = None) -> dict[str, torch.Tensor]:
        self.runs += 1
        return {"sum": self.inner(x) + shift}


@pytest.fixture
def counting() -> Counting:
    module = Counting().eval().cuda()
    replay_recurring(module)
    return module


def call(module: Counting, x: torch.Tensor, times: int = 1, **options: object) -> torch.Tensor:
    with torch.inference_mode():
        for _ in range(times):
            found = module(x, **options)["sum"]
    return found


def test_without_a_gpu_the_pass_runs_as_written() -> None:
    module = Counting().eval()
    x = torch.randn(2, 4)
    expected = call(module, x)
    replay_recurring(module)
    assert torch.equal(call(module, x, EAGER_CALLS + 3), expected)
    assert module.runs == EAGER_CALLS + 4


class TestReplays:
    pytestmark = on_gpu

    def test_a_shape_that_recurs_is_replayed(self, counting: Counting) -> None:
        x = torch.randn(2, 4, device="cuda")
        expected = call(counting, x, EAGER_CALLS)
        call(counting, x)  # records
        runs = counting.runs
        torch.testing.assert_close(call(counting, x, 3), expected)
        assert counting.runs == runs

    def test_each_result_is_that_of_its_own_input_and_remains(self, counting: Counting) -> None:
        inputs = [torch.randn(2, 4, device="cuda") for _ in range(EAGER_CALLS + 5)]
        results = [call(counting, x) for x in inputs]
        for x, result in zip(inputs, results):
            torch.testing.assert_close(result, counting.inner(x))

    def test_plain_arguments_belong_to_the_recording(self, counting: Counting) -> None:
        x = torch.randn(2, 4, device="cuda")
        plain = call(counting, x, EAGER_CALLS + 2)
        torch.testing.assert_close(call(counting, x, EAGER_CALLS + 2, shift=1.0), plain + 1)
        torch.testing.assert_close(call(counting, x), plain)

    def test_weights_that_change_or_move_count(self, counting: Counting) -> None:
        x = torch.randn(2, 4, device="cuda")
        call(counting, x, EAGER_CALLS + 2)
        with torch.no_grad():
            counting.inner.weight.zero_()
        torch.testing.assert_close(call(counting, x), counting.inner.bias.expand(2, 4))
        counting.double()
        assert call(counting, x.double()).dtype == torch.float64
        counting.float().cpu()
        kept = torch.full((4, 4), 9.0, device="cuda")  # may take an address that a weight had
        counting.cuda()
        with torch.no_grad():
            counting.inner.weight.fill_(1.0)
        torch.testing.assert_close(call(counting, x, EAGER_CALLS + 2), counting.inner(x))
        assert kept.eq(9).all()

    @pytest.mark.parametrize("reason", ["gradients", "training", "autocast", "hook", "stream", "argument"])
    def test_what_a_recording_could_get_wrong_runs_as_written(self, counting: Counting, reason: str) -> None:
        x = torch.randn(2, 4, device="cuda")
        call(counting, x, EAGER_CALLS + 2)
        runs, hooked = counting.runs, []
        if reason == "gradients":
            assert counting(x)["sum"].requires_grad
        elif reason == "training":
            call(counting.train(), x)
        elif reason == "autocast":
            with torch.autocast("cuda", torch.bfloat16):
                assert call(counting, x).dtype == torch.bfloat16
        elif reason == "hook":
            counting.inner.register_forward_hook(lambda *_: hooked.append(True))
            call(counting, x)
            assert hooked
        elif reason == "stream":
            with torch.cuda.stream(torch.cuda.Stream()):
                call(counting, x)
        else:
            call(counting, x, unused=object())
        assert counting.runs == runs + 1

    def test_only_so_many_graphs_are_kept(self, counting: Counting) -> None:
        for rows in range(1, GRAPHS_KEPT + 3):
            call(counting, torch.randn(rows, 4, device="cuda"), EAGER_CALLS + 1)
        graphed = counting.forward
        assert len(graphed._recordings) == GRAPHS_KEPT
        first = torch.randn(1, 4, device="cuda")
        torch.testing.assert_close(call(counting, first), counting.inner(first))

    def test_a_copy_replays_its_own_weights(self, counting: Counting) -> None:
        x = torch.randn(2, 4, device="cuda")
        call(counting, x, EAGER_CALLS + 2)
        other = copy.deepcopy(counting)
        with torch.no_grad():
            other.inner.weight.zero_()
        torch.testing.assert_close(call(other, x, EAGER_CALLS + 2), other.inner.bias.expand(2, 4))

    def test_what_cannot_be_recorded_runs_as_written_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Reading(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x) * float(x.sum())

        module = Reading().eval().cuda()
        replay_recurring(module)
        x = torch.randn(2, 4, device="cuda")
        with torch.inference_mode(), caplog.at_level("WARNING", "detrkit"):
            for _ in range(EAGER_CALLS + 3):
                torch.testing.assert_close(module(x), module.inner(x) * float(x.sum()))
        assert [record.message.partition(":")[0] for record in caplog.records] == [
            "Reading runs without CUDA graphs"
        ]
        # Neither the stream nor the generator of random numbers is left in the recording.
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.randn(2, device="cuda")

    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "not-padded"])
    @pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
    def test_every_family_is_replayed(self, family, padded: bool) -> None:
        model = family.detector().cuda()
        pixels, mask = padded_batch()
        batches = [(x.cuda(), mask.cuda() if padded else None) for x in (pixels, pixels.flip(0))]
        with torch.inference_mode():
            expected = [model(*batch) for batch in batches]
            replay_recurring(model)
            for _ in range(EAGER_CALLS + 1):
                model(*batches[0])
            assert not model.forward._refused
            assert len(model.forward._recordings) == 1
            for batch, right in zip(batches, expected):
                found = model(*batch)
                torch.testing.assert_close(found.logits, right.logits, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(found.pred_boxes, right.pred_boxes, rtol=1e-3, atol=1e-3)
