"""Draws the figures of the documentation as SVG files: ``python docs/figures/draw.py``.

Colours of text and lines follow the reader's light or dark scheme; areas have one tint that reads on both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

_STYLE = """<style>
  .fig-text { fill: #222; } .fig-soft { fill: #666; } .fig-head { fill: #666; } .fig-line { stroke: #666; }
  @media (prefers-color-scheme: dark) {
    .fig-text { fill: #e8e8e8; } .fig-soft { fill: #aaa; }
    .fig-head { fill: #aaa; } .fig-line { stroke: #aaa; }
  }
</style>"""

BLUE, ORANGE, GREEN, PURPLE, RED = "#3b82c4", "#e0812b", "#3f9d62", "#8a63c9", "#d2504c"

Point = tuple[float, float]


class Figure:
    """Shapes on a sheet; coordinates in pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        *lines: str,
        size: int = 14,
        bold: bool = False,
        soft: bool = False,
        at="middle",
    ) -> None:
        """Lines of text, centred vertically on ``y``."""
        weight = ' font-weight="600"' if bold else ""
        first = y - (len(lines) - 1) * size * 0.62 + size * 0.35
        for number, line in enumerate(lines):
            baseline = first + number * size * 1.24
            self.shapes.append(
                f'<text class="fig-{"soft" if soft else "text"}" x="{x:g}" y="{baseline:.1f}" '
                f'font-size="{size}" text-anchor="{at}"{weight}>{escape(line)}</text>'
            )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        color: str = BLUE,
        size: int = 14,
        fill: float = 0.16,
        dash: bool = False,
        round: float = 6,
    ) -> None:
        """A tinted rectangle with text in the middle."""
        dashes = ' stroke-dasharray="5 4"' if dash else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round:g}" fill="{color}" '
            f'fill-opacity="{fill:g}" stroke="{color}" stroke-width="1.6"{dashes}/>'
        )
        self.text(x + width / 2, y + height / 2, *lines, size=size)

    def dot(self, x: float, y: float, radius: float, color: str, fill: float = 1) -> None:
        """A disc."""
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{color}" fill-opacity="{fill:g}" '
            f'stroke="{color}" stroke-width="1.4"/>'
        )

    def line(self, *points: Point, color: str | None = None, width: float = 1.6, dash: bool = False) -> None:
        """A line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        paint = f'stroke="{color}"' if color else 'class="fig-line"'
        dashes = ' stroke-dasharray="5 4"' if dash else ""
        self.shapes.append(
            f'<polyline points="{path}" fill="none" {paint} stroke-width="{width:g}"{dashes}/>'
        )

    def arrow(self, *points: Point, color: str | None = None, width: float = 1.6, dash: bool = False) -> None:
        """A line with a head at its last point."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        back = (x1 - 7 * math.cos(angle), y1 - 7 * math.sin(angle))
        self.line(*points[:-1], back, color=color, width=width, dash=dash)
        corners = [(x1, y1)]
        for side in (-1, 1):
            turned = angle + side * math.pi / 2
            corners.append(
                (
                    back[0] - 2 * math.cos(angle) + 4.5 * math.cos(turned),
                    back[1] - 2 * math.sin(angle) + 4.5 * math.sin(turned),
                )
            )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        paint = f'fill="{color}"' if color else 'class="fig-head"'
        self.shapes.append(f'<polygon points="{path}" {paint}/>')

    def grid(
        self,
        x: float,
        y: float,
        columns: int,
        rows: int,
        cell: float,
        shade: Callable[[int, int], float],
        color: str = BLUE,
    ) -> None:
        """Cells whose tint is a function of column and row, in [0, 1]."""
        for row in range(rows):
            for column in range(columns):
                self.shapes.append(
                    f'<rect x="{x + column * cell:g}" y="{y + row * cell:g}" width="{cell:g}" '
                    f'height="{cell:g}" fill="{color}" fill-opacity="{shade(column, row):.2f}" '
                    f'stroke="{color}" stroke-opacity="0.45" stroke-width="0.8"/>'
                )

    def svg(self) -> str:
        """The file's text."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'font-family="Helvetica, Arial, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                _STYLE,
                *self.shapes,
                "</svg>\n",
            ]
        )


def blob(column: float, row: float, x: float, y: float, spread: float) -> float:
    """A bump around (x, y)."""
    return math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * spread**2))


def matching() -> Figure:
    """Set prediction: every query predicts, each object gets one query, the rest get no object."""
    figure = Figure(860, 360, "Set prediction and bipartite matching")
    figure.text(130, 22, "predictions, one per query", bold=True)
    figure.text(428, 14, "cost of each pair", bold=True)
    figure.text(730, 22, "objects in the image", bold=True)
    for j, name in enumerate(("cat", "dog", "car")):
        figure.text(368 + j * 60, 36, name, size=12, soft=True)
    predictions = [
        ("query 1", "cat .61", GREEN),
        ("query 2", "dog .48", ORANGE),
        ("query 3", "cat .33", RED),
        ("query 4", "car .92", BLUE),
        ("query 5", "car .20", RED),
    ]
    costs = [(0.6, 2.9, 4.1), (2.7, 0.9, 3.8), (1.1, 2.2, 3.9), (4.0, 3.6, 0.2), (4.2, 3.9, 1.7)]
    chosen = {0: 0, 1: 1, 3: 2}
    for i, (name, said, color) in enumerate(predictions):
        y = 48 + i * 52
        figure.box(40, y, 180, 40, f"{name}: {said}", color=color)
        figure.arrow((222, y + 20), (335, y + 20))
        for j, cost in enumerate(costs[i]):
            hit = chosen.get(i) == j
            figure.box(
                340 + j * 60,
                y + 1,
                56,
                38,
                f"{cost:.1f}",
                color=color if hit else "#888888",
                fill=0.45 if hit else 0.06,
                round=3,
            )
    objects = [("cat", GREEN), ("dog", ORANGE), ("car", BLUE)]
    for j, (name, color) in enumerate(objects):
        y = 48 + (0, 52, 156)[j]
        figure.box(660, y, 140, 40, name, color=color)
        figure.line((522, y + 20), (656, y + 20), color=color, width=2.4)
    for y in (172, 276):
        figure.text(730, y, "no object", soft=True)
        figure.line((522, y), (680, y), dash=True)
    figure.text(
        430,
        330,
        "The assignment with the lowest total cost gives each object one query. Query 3 also predicts cat",
        "and is trained to predict no object, so a fully trained DETR rarely gives duplicates.",
        size=13,
        soft=True,
    )
    return figure


def architecture() -> Figure:
    """From the image to the set."""
    figure = Figure(900, 330, "DETR from the image to the set")
    y = 96
    figure.box(20, y, 96, 74, "image", "3 x H x W", color="#888888")
    figure.box(150, y, 110, 74, "backbone", "ResNet", color=BLUE)
    figure.box(294, y, 110, 74, "1x1 conv", "256 x H/32", "x W/32", color=BLUE, size=13)
    figure.box(438, y, 118, 74, "encoder", "6 layers", color=PURPLE)
    figure.box(616, y, 118, 74, "decoder", "6 layers", color=ORANGE)
    figure.box(778, y - 28, 104, 44, "class head", color=GREEN)
    figure.box(778, y + 58, 104, 44, "box head", color=GREEN)
    for x0, x1 in ((116, 150), (260, 294), (404, 438)):
        figure.arrow((x0, y + 37), (x1, y + 37))
    figure.arrow((556, y + 37), (616, y + 37))
    figure.text(586, y + 22, "memory", size=12, soft=True)
    figure.arrow((734, y + 30), (756, y + 30), (756, y - 6), (778, y - 6))
    figure.arrow((734, y + 44), (756, y + 44), (756, y + 80), (778, y + 80))
    figure.text(830, y - 46, "classes + no object", size=12, soft=True)
    figure.text(830, y + 118, "cx, cy, w, h in [0, 1]", size=12, soft=True)
    figure.box(425, 226, 144, 40, "sine positions", color=PURPLE, fill=0.06, dash=True)
    figure.arrow((497, 226), (497, y + 74), dash=True)
    figure.box(603, 226, 144, 40, "100 object queries", color=ORANGE, fill=0.06, dash=True)
    figure.arrow((675, 226), (675, y + 74), dash=True)
    figure.text(497, 66, "positions attend to positions", size=12, soft=True)
    figure.text(668, 54, "queries attend to each other,", "then to the positions", size=12, soft=True)
    figure.text(
        430,
        302,
        "One forward pass predicts all objects at once. In training, every decoder layer has a loss.",
        size=13,
        soft=True,
    )
    return figure


def conditional_attention() -> Figure:
    """What Conditional DETR changes in the cross-attention."""
    figure = Figure(860, 400, "Cross-attention of Conditional DETR")
    figure.box(30, 52, 170, 44, "decoder state", "what: content", color=ORANGE, size=13)
    figure.box(30, 150, 170, 44, "reference point", "where: s", color=GREEN, size=13)
    figure.box(240, 52, 130, 44, "scale", "small network", color=ORANGE, size=13)
    figure.box(240, 150, 130, 44, "sine of s", color=GREEN, size=13)
    figure.box(430, 101, 130, 44, "product", "channel by channel", color=PURPLE, size=12)
    figure.arrow((200, 74), (240, 74))
    figure.arrow((200, 172), (240, 172))
    figure.arrow((370, 74), (400, 74), (400, 116), (430, 116))
    figure.arrow((370, 172), (400, 172), (400, 130), (430, 130))
    figure.box(620, 26, 104, 44, "content", color=ORANGE)
    figure.box(724, 26, 104, 44, "position", color=PURPLE)
    figure.text(724, 12, "query of the attention", size=12, soft=True)
    figure.arrow((115, 52), (115, 34), (616, 34), color=ORANGE)
    figure.arrow((560, 123), (776, 123), (776, 74), color=PURPLE)
    figure.box(620, 228, 104, 44, "content", color=BLUE)
    figure.box(724, 228, 104, 44, "position", color=BLUE)
    figure.text(724, 288, "key: one per position in the image", size=12, soft=True)
    figure.arrow((672, 74), (672, 224), color=ORANGE)
    figure.arrow((790, 74), (790, 224), color=PURPLE)
    figure.text(664, 176, "dot", at="end", size=13)
    figure.text(800, 176, "dot", at="start", size=13)
    figure.text(731, 176, "+", size=20, bold=True)
    figure.grid(
        232,
        240,
        12,
        6,
        15,
        lambda c, r: (
            0.06 + 0.85 * max(blob(c, r, 2.5, 2.4, 0.8), blob(c, r, 6, 0.5, 0.8), blob(c, r, 9, 3, 0.8))
        ),
        PURPLE,
    )
    figure.box(264, 250, 120, 62, color=GREEN, fill=0)
    figure.dot(324, 281, 4, GREEN)
    figure.text(
        322, 352, "weights of three heads:", "each attends to one side of the box", size=12, soft=True
    )
    figure.line((616, 262), (560, 262), (560, 300), (418, 300), dash=True)
    figure.text(
        430,
        386,
        "Content and position are concatenated, not added, so position has its own dot product.",
        size=13,
        soft=True,
    )
    return figure


def deformable_attention() -> Figure:
    """Sampling points over feature levels."""
    figure = Figure(860, 400, "Deformable attention: a few samples instead of every position")
    levels = [(8, 16, 12, "stride 8"), (4, 8, 24, "stride 16"), (2, 4, 48, "stride 32")]
    reference = (0.55, 0.45)
    offsets = [
        [(-0.16, -0.10), (0.05, -0.17), (0.19, 0.06), (-0.04, 0.20)],
        [(-0.20, 0.02), (0.10, -0.22), (0.24, 0.10), (-0.08, 0.24)],
        [(-0.26, -0.14), (0.16, -0.20), (0.26, 0.20), (-0.20, 0.24)],
    ]
    for number, (rows, columns, cell, name) in enumerate(levels):
        x, y = 330, 24 + number * 112
        width, height = columns * cell, rows * cell
        figure.grid(x, y, columns, rows, cell, lambda c, r: 0.07)
        px, py = x + reference[0] * width, y + reference[1] * height
        for dx, dy in offsets[number]:
            end = (px + dx * width * 0.8, py + dy * height * 1.1)
            figure.line((px, py), end, color=ORANGE, width=1.4)
            figure.dot(*end, 4.5, ORANGE)
        figure.dot(px, py, 4.5, GREEN)
        figure.text(x - 14, y + height / 2, name, at="end", size=13)
        figure.line((x + width + 6, y + height / 2), (576, y + height / 2), (576, 184))
    figure.arrow((576, 184), (628, 184))
    figure.box(630, 158, 200, 52, "sum of samples,", "weights that add up to 1", color=ORANGE, size=13)
    figure.arrow((730, 210), (730, 256))
    figure.text(730, 272, "new state of the query", size=13)
    figure.box(24, 60, 180, 44, "state of one query", color=ORANGE, size=13)
    figure.arrow((114, 104), (114, 138))
    figure.box(24, 140, 180, 62, "two linear layers:", "offsets and weights", color=PURPLE, size=13)
    figure.arrow((204, 171), (246, 171))
    figure.dot(40, 240, 4.5, GREEN)
    figure.text(54, 240, "reference point", at="start", size=13)
    figure.dot(40, 266, 4.5, ORANGE)
    figure.text(54, 266, "sample, between four positions", at="start", size=13)
    figure.text(
        430,
        374,
        "Four samples per head in each of four levels (three are drawn), read bilinearly.",
        "The cost grows linearly with the number of positions, not quadratically.",
        size=13,
        soft=True,
    )
    return figure


def mask_head() -> Figure:
    """From a query's attention to a mask, and to the panoptic segmentation."""
    figure = Figure(880, 360, "Masks and the panoptic segmentation")
    figure.box(20, 60, 116, 50, "query's state", color=ORANGE)
    figure.box(20, 190, 116, 50, "memory", "of the encoder", color=PURPLE, size=13)
    figure.box(180, 110, 130, 70, "attention", "8 heads,", "one map each", color=PURPLE, size=13)
    figure.arrow((136, 85), (158, 85), (158, 130), (180, 130))
    figure.arrow((136, 215), (158, 215), (158, 160), (180, 160))
    names = ("stride 32", "stride 16", "stride 8", "stride 4")
    for number, name in enumerate(names):
        width = 62 + 16 * number
        x = 350 + sum(62 + 16 * k + 22 for k in range(number))
        height = 44 + 12 * number
        figure.box(x, 145 - height / 2, width, height, "conv", color=BLUE, size=13)
        figure.text(x + width / 2, 145 + height / 2 + 12, name, size=11, soft=True)
        if number < 3:
            figure.arrow((x + width, 145), (x + width + 22, 145))
        if number:
            figure.arrow((x + width / 2, 252), (x + width / 2, 145 + height / 2 + 22), dash=True)
    figure.arrow((310, 145), (350, 145))
    figure.box(
        425,
        252,
        330,
        34,
        "backbone's feature maps, added at each level",
        color=BLUE,
        fill=0.06,
        dash=True,
        size=13,
    )
    x = 782
    figure.arrow((760, 145), (x, 145))
    figure.box(x, 118, 84, 54, "mask of", "the query", color=GREEN, size=13)
    figure.text(
        440,
        30,
        "For each query that detected an object, a pyramid turns its attention into a mask",
        size=14,
        bold=True,
    )
    figure.text(
        430,
        326,
        "Panoptic segmentation: every pixel goes to the query with the strongest mask there.",
        "Pieces of the same stuff become one segment. After segments of four pixels or fewer are removed,",
        "pixels are assigned again.",
        size=13,
        soft=True,
    )
    return figure


FIGURES: Sequence[Callable[[], Figure]] = (
    matching,
    architecture,
    conditional_attention,
    deformable_attention,
    mask_head,
)


def main() -> None:
    """Writes every figure beside this file."""
    for make in FIGURES:
        path = Path(__file__).parent / f"{make.__name__}.svg"
        path.write_text(make().svg(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
