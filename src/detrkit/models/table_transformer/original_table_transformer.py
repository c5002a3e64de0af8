"""The tensors of microsoft/table-transformer's checkpoints: those of DETR, always with the encoder's norm."""

from __future__ import annotations

from dataclasses import replace

from detrkit.models.detr.original_detr import ORIGINAL as DETR

ORIGINAL = replace(DETR, markers=(*DETR.markers, "transformer.encoder.norm.weight"))
