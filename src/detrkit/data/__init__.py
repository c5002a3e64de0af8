"""Data sets with boxes and masks: reading, checking, augmentation and batching.

Example:
    ```python
    from torch.utils.data import DataLoader

    from detrkit.data.checks import check_dataset
    from detrkit.data.coco import DetectionDataset
    from detrkit.data.loading import AspectRatioBatchSampler, DetectionCollator, PreparedDataset

    report = check_dataset(DetectionDataset.from_coco("train", "instances_train.json"))
    examples = PreparedDataset(report.dataset, processor, "light", seed=0)
    sampler = AspectRatioBatchSampler(report.dataset.sizes, batch_size=8, seed=0)
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=DetectionCollator(processor))
    for epoch in range(50):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = model(**batch).loss
    ```
"""
