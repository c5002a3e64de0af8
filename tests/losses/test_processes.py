"""Losses of a batch that lies on two processes: their mean is the loss of the whole batch."""

import pytest
import torch
from torch import distributed, multiprocessing

from detrkit import ConditionalDetrConfig
from detrkit.losses.criterion import detection_loss, mean_box_count
from tests.losses.test_criterion import layered_predictions, targets_of

TERMS = ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0")


def batch():
    """Two images for each of two processes, with 4 and 1 objects."""
    return layered_predictions(2, batch=4), targets_of(3, 1, 0, 1)


def terms_of(logits, boxes, targets):
    """The total, the gradients and the terms of the loss, in a list."""
    logits, boxes = logits.requires_grad_(), boxes.requires_grad_()
    loss, terms = detection_loss(logits, boxes, targets, ConditionalDetrConfig(num_labels=5))
    gradients = torch.autograd.grad(loss, (logits, boxes))
    return [loss.detach(), *(terms[name].detach() for name in TERMS)], gradients


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    (logits, boxes), targets = batch()
    own = slice(2 * rank, 2 * rank + 2)
    count = mean_box_count(targets[own], logits.device)
    terms, gradients = terms_of(logits[:, own].clone(), boxes[:, own].clone(), targets[own])
    # A process without objects, beside one with a single object: still at least 1.
    least = mean_box_count(targets_of(rank), logits.device)
    torch.save((count, least, terms, gradients), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_divide_by_the_mean_of_their_box_counts(tmp_path):
    multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for count, least, _, _ in results:
        assert count == 2.5
        assert least == 1
    (logits, boxes), targets = batch()
    terms, gradients = terms_of(logits, boxes, targets)
    for ours, *parts in zip(terms, *(result[2] for result in results)):
        torch.testing.assert_close(sum(parts) / 2, ours)
    # Each process has the gradients of its own images, of which DistributedDataParallel takes the mean.
    for ours, *parts in zip(gradients, *(result[3] for result in results)):
        torch.testing.assert_close(torch.cat(parts, dim=1) / 2, ours)
