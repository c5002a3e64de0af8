"""Small models for tests of logic: a ResNet of unusual widths, two layers, twelve queries."""

import torch
from transformers import ResNetConfig

from detrkit import DetrConfig


def tiny_resnet(**options) -> ResNetConfig:
    settings = {
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 1, 2, 2],
        "layer_type": "bottleneck",
        "out_features": ["stage2", "stage3", "stage4"],
    }
    return ResNetConfig(**{**settings, **options})


def tiny_config(**options) -> DetrConfig:
    settings = {
        "backbone_config": tiny_resnet(),
        "use_timm_backbone": False,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 8,
        "num_queries": 12,
        "num_labels": 5,
    }
    return DetrConfig(**{**settings, **options})


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere, norms' statistics included, so that nothing is equal by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise + 0.5)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(noise * 0.5 + 0.75)
            elif tensor.ndim == 1:
                tensor.copy_(noise * 0.2 - 0.1)
            else:
                tensor.copy_((noise - 0.5) * 2 * (3 / tensor[0].numel()) ** 0.5)
    return model


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, the second one smaller and padded: pixel values (2, 3, 128, 160) and mask."""
    pixels = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 128, 160, dtype=torch.long)
    mask[1, 90:] = 0
    mask[1, :, 100:] = 0
    return pixels * mask[:, None], mask


def some_labels(batch: int = 2, num_labels: int = 5) -> list[dict[str, torch.Tensor]]:
    """Three objects in each image but the last, which has none when there is more than one."""
    generator = torch.Generator().manual_seed(2)
    labels = []
    for i in range(batch):
        count = 0 if batch > 1 and i == batch - 1 else 3
        labels.append(
            {
                "class_labels": torch.randint(num_labels, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
            }
        )
    return labels
