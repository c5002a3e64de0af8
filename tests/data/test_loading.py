import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from detrkit import DetrImageProcessor
from detrkit.data.augmentation import PRESETS
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.data.loading import AspectRatioBatchSampler, DetectionCollator, PreparedDataset
from detrkit.errors import SettingError
from tests.data.synthetic import make_document, make_panoptic, write_dataset
from tests.golden import DATA, needs_data

PROCESSOR = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 60})


def equal(first, second):
    labels, others = first["labels"], second["labels"]
    return torch.equal(first["pixel_values"], second["pixel_values"]) and all(
        torch.equal(labels[key], others[key]) for key in labels | others
    )


def test_an_example_without_augmentation_is_what_the_image_processor_gives(tmp_path):
    dataset = write_dataset(tmp_path, labels={2: 2, 7: 7, 90: 90}, return_masks=True)
    document = make_document()
    for index, prepared in enumerate(map(PreparedDataset(dataset, PROCESSOR).__getitem__, range(3))):
        entries = [a for a in document["annotations"] if a["image_id"] == index + 1]
        expected = PROCESSOR(
            dataset[index][0],
            {"image_id": index + 1, "annotations": entries},
            return_segmentation_masks=True,
            return_tensors="pt",
        )
        assert torch.equal(prepared["pixel_values"], expected["pixel_values"][0])
        for key, value in expected["labels"][0].items():
            assert torch.equal(prepared["labels"][key], value), key
            assert type(prepared["labels"][key]) is torch.Tensor


@pytest.mark.parametrize("preset", PRESETS)
def test_an_example_repeats_whatever_came_before_it(tmp_path, preset):
    dataset = write_dataset(tmp_path, return_masks=True)
    first = PreparedDataset(dataset, PROCESSOR, preset, seed=5, mosaic=0.5)
    again = PreparedDataset(dataset, PROCESSOR, preset, seed=5, mosaic=0.5)
    example = first[3, 1]
    torch.manual_seed(0)
    _ = again[0, 0], again[1, 1], torch.rand(7)
    assert equal(example, again[3, 1])
    others = [again[4, 1], PreparedDataset(dataset, PROCESSOR, preset, seed=6, mosaic=0.5)[3, 1]]
    if preset != "none":
        assert not any(equal(example, other) for other in others)


def test_worker_processes_give_the_same_examples(tmp_path):
    dataset = PreparedDataset(write_dataset(tmp_path), PROCESSOR, "strong", seed=1)
    sampler = AspectRatioBatchSampler(dataset.dataset.sizes, 2, seed=1)
    sampler.set_epoch(2)
    options = {"batch_sampler": sampler, "collate_fn": DetectionCollator(PROCESSOR)}
    alone = list(DataLoader(dataset, **options))
    workers = DataLoader(dataset, num_workers=2, persistent_workers=True, **options)
    _ = list(workers)
    sampler.set_epoch(3)
    later = list(workers)  # by workers that were started in epoch 2
    assert torch.equal(later[0]["pixel_values"], next(iter(DataLoader(dataset, **options)))["pixel_values"])
    sampler.set_epoch(2)
    for mine, theirs in zip(alone, workers):
        assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
    assert len(alone) == 2


def test_panoptic_examples_are_prepared_too(tmp_path):
    document = make_panoptic(tmp_path)
    dataset = write_dataset(tmp_path, document, panoptic_dir=tmp_path / "png", return_masks=True)
    for preset in PRESETS:
        example = PreparedDataset(dataset, PROCESSOR, preset)[0]
        assert example["labels"]["masks"].shape[1:] == example["pixel_values"].shape[1:]


def test_a_transform_of_ones_own_is_taken(tmp_path):
    dataset = write_dataset(tmp_path)
    flipped = PreparedDataset(dataset, PROCESSOR, lambda image, target: (image.rotate(180), target))[0]
    plain, _ = dataset[0]
    expected = PROCESSOR(plain.rotate(180), do_resize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(flipped["pixel_values"], expected)


def test_settings_are_checked_at_once(tmp_path):
    dataset = write_dataset(tmp_path)
    with pytest.raises(SettingError, match="did you mean 'strong'"):
        PreparedDataset(dataset, PROCESSOR, "stong")
    with pytest.raises(ValueError, match="mosaic"):
        PreparedDataset(dataset, PROCESSOR, mosaic=2)


def test_a_prepared_data_set_can_be_sent_to_other_processes(tmp_path):
    dataset = PreparedDataset(write_dataset(tmp_path), PROCESSOR, "strong")
    assert equal(pickle.loads(pickle.dumps(dataset))[1, 0], dataset[1, 0])


def test_a_batch_is_padded_with_a_mask_only_where_sizes_differ(tmp_path):
    dataset = PreparedDataset(write_dataset(tmp_path, return_masks=True), PROCESSOR)
    collator = DetectionCollator(PROCESSOR)
    same = collator([dataset[0], dataset[2]])
    assert set(same) == {"pixel_values", "labels"}
    assert same["pixel_values"].shape == (2, 3, 32, 48)
    mixed = collator([dataset[0], dataset[1]])
    assert mixed["pixel_values"].shape == (2, 3, 48, 48)
    assert mixed["pixel_mask"].sum((1, 2)).tolist() == [32 * 48, 32 * 48]
    assert mixed["labels"][0]["masks"].shape == (2, 48, 48)
    assert torch.equal(mixed["labels"][0]["boxes"], dataset[0]["labels"]["boxes"])
    assert type(mixed["labels"][0]) is dict
    fixed = DetectionCollator(DetrImageProcessor(pad_size={"height": 60, "width": 60}))([dataset[0]])
    assert fixed["pixel_values"].shape == (1, 3, 60, 60)
    assert fixed["pixel_mask"].sum() == 32 * 48


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=60)


@given(sizes, st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_every_image_comes_once_an_epoch(image_sizes, batch_size, epoch, shuffle):
    sampler = AspectRatioBatchSampler(image_sizes, batch_size, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for _, index in batch) == list(range(len(image_sizes)))
    assert {e for batch in batches for e, _ in batch} == {epoch}
    assert sum(len(batch) != batch_size for batch in batches) <= 1
    assert batches == list(sampler)


@given(sizes, st.integers(1, 9), st.integers(1, 4))
def test_processes_get_as_many_batches_and_all_images(image_sizes, batch_size, world_size):
    whole = list(AspectRatioBatchSampler(image_sizes, batch_size, seed=3))
    ranks = [
        AspectRatioBatchSampler(image_sizes, batch_size, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [list(sampler) for sampler in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])}
    together = [batch for step in zip(*shares) for batch in step]
    assert together[: len(whole)] == whole
    assert all(batch in whole for batch in together)
    assert len(together) - len(whole) < world_size


@given(sizes, st.integers(1, 9))
def test_dropping_the_last_batch_leaves_only_whole_ones(image_sizes, batch_size):
    if len(image_sizes) < batch_size:
        with pytest.raises(ValueError, match="too few for a batch"):
            AspectRatioBatchSampler(image_sizes, batch_size, drop_last=True)
        return
    sampler = AspectRatioBatchSampler(image_sizes, batch_size, drop_last=True)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(image_sizes) // batch_size
    assert all(len(batch) == batch_size for batch in batches)


def test_batches_hold_images_of_like_aspect_ratio():
    image_sizes = [(30, 40)] * 40 + [(40, 30)] * 40 + [(30, 60)] * 20
    mixed = 0
    for epoch in range(5):
        sampler = AspectRatioBatchSampler(image_sizes, 8)
        sampler.set_epoch(epoch)
        mixed += sum(len({image_sizes[index] for _, index in batch}) > 1 for batch in sampler)
    assert mixed == 0  # 40 are 5 whole batches; the 4 that are left of 20 are a batch of their own


def test_no_image_is_dropped_in_every_epoch():
    image_sizes = [(10, 10 + i) for i in range(30)]
    seen = set()
    for epoch in range(20):
        sampler = AspectRatioBatchSampler(image_sizes, 8, drop_last=True)
        sampler.set_epoch(epoch)
        seen |= {index for batch in sampler for _, index in batch}
    assert seen == set(range(30))


def test_epochs_and_seeds_differ_and_an_epoch_can_be_repeated():
    image_sizes = [(30, 40)] * 50
    sampler = AspectRatioBatchSampler(image_sizes, 8, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [[i for _, i in b] for b in first] != [[i for _, i in b] for b in second]
    assert first != list(AspectRatioBatchSampler(image_sizes, 8, seed=2))
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert len(sampler) == 7
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "rank": 1}])
def test_impossible_batches_are_refused(options):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        AspectRatioBatchSampler([(3, 4)], **options)
    with pytest.raises(ValueError, match="0 images are too few for a batch"):
        AspectRatioBatchSampler([], 2)


@needs_data
def test_real_images_become_batches_for_every_preset():
    folder = DATA / "coco_tiny"
    dataset = check_dataset(
        DetectionDataset.from_coco(
            folder / "train2017", folder / "annotations" / "instances_train2017.json", return_masks=True
        )
    ).dataset
    processor = DetrImageProcessor(size={"shortest_edge": 160, "longest_edge": 266})
    for preset in PRESETS:
        prepared = PreparedDataset(dataset, processor, preset, mosaic=0.3)
        sampler = AspectRatioBatchSampler(dataset.sizes, 4)
        keys = next(iter(sampler))
        batch = DetectionCollator(processor)([prepared[key] for key in keys])
        padded = batch["pixel_values"].shape[-2:]
        for target, (_, index) in zip(batch["labels"], keys):
            assert target["image_id"].item() == dataset.document["images"][index]["id"]
            assert target["masks"].shape == (len(target["boxes"]), *padded)
            centre, size = target["boxes"].split(2, dim=1)
            assert (centre - size / 2 >= -1e-5).all()
            assert (centre + size / 2 <= 1 + 1e-5).all()
