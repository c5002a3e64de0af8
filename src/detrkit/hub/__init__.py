"""Uploads to the Hugging Face Hub, model cards, and the handler of an Inference Endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

if TYPE_CHECKING:
    from detrkit.hub.cards import plain_card as plain_card
    from detrkit.hub.upload import push_to_hub as push_to_hub
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__)
