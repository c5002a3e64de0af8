"""Data sets with boxes and masks: reading, checking, augmentation and batching.

Example:
    ```python
    from torch.utils.data import DataLoader

    from detrkit.data import DetectionDataset, check_dataset
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

from __future__ import annotations

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

if TYPE_CHECKING:
    from detrkit.data.checks import check_dataset as check_dataset
    from detrkit.data.coco import DetectionDataset as DetectionDataset
    from detrkit.data.scale import training_scale as training_scale
    from detrkit.data.voc import read_voc as read_voc
    from detrkit.data.yolo import read_yolo as read_yolo
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__)
