"""What was counted and measured of the models that have a card.

``model_cards/generate.py`` writes the numbers to ``card_facts.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detrkit.checkpoints.cost import Cost

FACTS_FILE = Path(__file__).with_name("card_facts.json")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A measured speed: the time for one image of a size such as "800x1066".

    Attributes:
        engine: What ran the model: "torch", "onnx", ...
        stage: "forward" for the model alone, "end to end" from image to boxes.
        device: Processor and number of threads, in words.
    """

    engine: str
    stage: str
    device: str
    size: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was counted and measured of a model; ``cost`` is None if nothing was counted."""

    cost: Cost | None = None
    speeds: tuple[Speed, ...] = ()

    def size_rows(self, published_parameters: str = "", published_cost: str = "") -> list[list[str]]:
        """Rows of a table: parameters, multiply-adds, bytes; each counted, then published."""
        cost = self.cost
        if cost is None:
            return []
        rows = [
            ["parameters", f"{cost.parameters / 1e6:.1f} M", published_parameters],
            [f"multiply-adds (MAC), {cost.height}x{cost.width}", f"{cost.macs / 1e9:.1f} G", published_cost],
        ]
        if cost.sampling_macs:
            sampling = f"{cost.sampling_macs / 1e9:.2f} G"
            rows.append(["and of the samples of deformable attention", sampling, ""])
        return [*rows, ["model.safetensors, float32", f"{cost.bytes / 1e6:.0f} MB", ""]]

    def speed_rows(self) -> list[list[str]]:
        """Rows of a table: one for each measured speed."""
        return [
            [f"{each.engine}, {each.stage}, {each.size}, {each.device}", f"{each.seconds:.3g} s an image", ""]
            for each in self.speeds
        ]


def read_facts(name: str) -> Facts:
    """The facts of a model that has a card, by its short name; empty for any other."""
    from detrkit.checkpoints.cost import Cost

    entry = json.loads(FACTS_FILE.read_text(encoding="utf-8")).get(name, {})
    return Facts(
        cost=Cost(**entry["cost"]) if "cost" in entry else None,
        speeds=tuple(Speed(**speed) for speed in entry.get("speeds", ())),
    )
