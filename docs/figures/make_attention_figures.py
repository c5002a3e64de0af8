"""Draws the figures of docs/attention.md and measures its table, of a Deformable DETR.

    python docs/figures/make_attention_figures.py --model blood-cells --images bccd/val

Writes docs/figures/attention_*.png, and the table between the marks in docs/attention.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detrkit import Detector
from detrkit.attention.drawing import draw_attention, draw_panels, draw_queries
from detrkit.attention.maps import (
    AttentionSamples,
    NothingDetectedError,
    decoder_attention,
    encoder_attention,
    query_statistics,
)
from detrkit.common.files import atomic_file
from detrkit.inference.prepared import read_image
from detrkit.models.layers.feature_levels import MultiScaleDeformableAttention
from detrkit.results.detections import Detections

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "attention.md"
MARKS = ("<!-- measured: make_attention_figures.py -->", "<!-- end of measured -->")
MOST_BYTES = 300_000
PLACES = 20  # boxes elsewhere that stand for all, for each object


def main() -> None:
    """Reads the arguments, then writes the figures and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="blood-cells", help="a Deformable DETR: folder or name")
    parser.add_argument("--images", required=True, type=Path, help="folder of images to measure on")
    parser.add_argument("--image", type=Path, default=HERE.parents[1] / "examples/BloodImage_00000.jpg")
    parser.add_argument("--threshold", type=float, default=0.5)
    options = parser.parse_args()

    detector = Detector.from_pretrained(options.model, device="cpu")
    draw_figures(detector, options.image, options.threshold)
    files = sorted(path for path in options.images.iterdir() if path.suffix in {".jpg", ".png"})
    save(draw_queries(query_statistics(detector, files, options.threshold)), "attention_queries")

    table = shares_table(detector, files, options.threshold)
    print(table)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with atomic_file(PAGE) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


def draw_figures(detector: Detector, path: Path, threshold: float) -> None:
    """The decoder's and the encoder's attention in one image."""
    image = read_image(path)
    found = decoder_attention(detector, image, threshold)
    boxes = detections_of(found)
    classes = [np.flatnonzero(boxes.labels == label) for label in np.unique(boxes.labels)]
    save(draw_attention(image, found[np.concatenate([rows[:4] for rows in classes])]), "attention_decoder")
    # What scores low may be an object all the same.
    empty = emptiest_point(detector(image, 0.1))
    points = [*found.points[[rows[0] for rows in classes]].tolist(), empty]
    attention = encoder_attention(detector, image, points)
    save(draw_panels(image, attention, columns=len(points)), "attention_encoder", width=1500)


def emptiest_point(found: Detections) -> tuple[float, float]:
    """The point inside the image that is farthest from all boxes and the border."""
    height, width = found.image_size
    y, x = np.mgrid[4:height:8, 4:width:8]
    distance = np.minimum.reduce([x, y, width - x, height - y]).astype(float)
    for x0, y0, x1, y1 in found.boxes:
        beside = np.hypot(
            np.maximum(np.maximum(x0 - x, x - x1), 0), np.maximum(np.maximum(y0 - y, y - y1), 0)
        )
        distance = np.minimum(distance, beside)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return float(x[row, column]), float(y[row, column])


def shares_table(detector: Detector, files: list[Path], threshold: float) -> str:
    """Shares of attention inside of boxes, over all detections: a Markdown table, and a line beneath."""
    rng = np.random.default_rng(0)
    measured: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    patterns = []
    for path in files:
        image = read_image(path)
        with starting_samples(detector) as starts:
            try:
                found = decoder_attention(detector, image, threshold)
            except NothingDetectedError:
                continue
            boxes = detections_of(found)
            centres = found.points.clip(0, image.size)
            looks = {"decoder": (found, starts["decoder"](found, found.queries))}
            at_centre = encoder_attention(detector, image, centres)
            looks["encoder, from the box's centre"] = (at_centre, starts["encoder"](at_centre, None))
        sizes = (boxes.boxes[:, 2:] - boxes.boxes[:, :2])[:, None, None, None]
        patterns.append(((found.locations - found.points[:, None, None, None]) / sizes, found.weights))
        elsewhere, kept = boxes_elsewhere(boxes, rng)
        for part, (attention, start) in looks.items():
            own = attention.share_inside(boxes.boxes)
            before = start.share_inside(boxes.boxes)
            others = np.mean([attention.share_inside(moved) for moved in elsewhere], axis=0)
            for i in np.flatnonzero(kept):
                row = (own[i], others[i], before[i])
                for name in (boxes.names[i], "all"):
                    measured.setdefault((part, name), []).append(row)
    lines = [
        "| attention of the last layer | class | objects | in the object's box "
        "| in a box of its size elsewhere | in its box, samples as before training |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (part, name), rows in sorted(measured.items(), key=lambda item: (item[0][0], item[0][1] == "all")):
        shares = " | ".join(f"{100 * share:.0f} %" for share in np.mean(rows, axis=0))
        lines.append(f"| {part} | {name} | {len(rows)} | {shares} |")
    places, weights = (np.concatenate(parts) for parts in zip(*patterns))
    usual = weights.mean(axis=0)[..., None]
    lines += [
        "",
        f"The mean over all objects explains {100 * common_share(places, usual):.1f} % of the variance of "
        "the decoder's samples' positions in their boxes.",
        f"It explains {100 * common_share(weights, np.ones_like(usual[..., 0])):.1f} % of the variance of "
        "their weights.",
    ]
    return "\n".join(lines)


def common_share(values: np.ndarray, importance: np.ndarray) -> float:
    """How much of the variance among samples is one pattern that all objects share.

    Args:
        values: (N, heads, levels, points, ...), of N objects.
        importance: (heads, levels, points, ...), how much each sample counts.
    """
    importance = importance / importance.sum()
    mean = values.mean(axis=0)
    centre = (mean * importance).sum(axis=(0, 1, 2))
    within = (values.var(axis=0) * importance).sum()
    between = ((mean - centre) ** 2 * importance).sum()
    return float(between / (between + within))


def boxes_elsewhere(found: Detections, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Boxes of the same sizes at random places of the image, each clear of the one that it is moved from.

    Returns:
        ``PLACES`` times (N, 4), and (N,) bool, for which objects there is such a place.
    """
    height, width = found.image_size
    moved = np.repeat(found.boxes[None].astype(np.float64), PLACES, axis=0)
    kept = np.ones(len(found), dtype=bool)
    for i, (x0, y0, x1, y1) in enumerate(found.boxes.astype(np.float64)):
        room = np.array([width - (x1 - x0), height - (y1 - y0)]).clip(min=0)
        corners = rng.uniform(0, 1, (2000, 2)) * room
        clear = (np.abs(corners[:, 0] - x0) >= x1 - x0) | (np.abs(corners[:, 1] - y0) >= y1 - y0)
        corners = corners[clear][:PLACES]
        kept[i] = len(corners) == PLACES
        if kept[i]:
            moved[:, i] = np.hstack([corners, np.add(corners, (x1 - x0, y1 - y0))])
    return list(moved), kept


@contextmanager
def starting_samples(detector: Detector) -> Iterator[dict[str, Callable[[AttentionSamples, Any], Any]]]:
    """Notes where the last layers sample, for what they would have sampled before they learned to.

    Yields:
        For "encoder" and "decoder", what turns an attention and the queries of its rows into the same with
        the offsets and the even weights that training starts from, around the same points or boxes.
    """
    model, config, noted = detector.model.model, detector.model.config, {}
    parts = {
        "encoder": (model.encoder.layers[-1].self_attn, config.encoder_n_points),
        "decoder": (model.decoder.layers[-1].encoder_attn, config.decoder_n_points),
    }

    def note(part: str) -> Callable[..., None]:
        return lambda _, inputs: noted.__setitem__(part, (inputs[1], inputs[3].shapes))

    def start(part: str, attention: Any, rows: Any) -> Any:
        layer, points = parts[part]
        fresh = MultiScaleDeformableAttention(config, layer.heads, points)
        fresh.reset_parameters()
        layout = (layer.heads, layer.levels, points, 2)
        offsets = fresh.sampling_offsets.bias.detach().view(layout).numpy()
        around, shapes = noted[part]
        height, width = attention.image_size
        if part == "decoder":
            centre = around.centre[0, rows].numpy() * (width, height)
            unit = around.unit[0, rows].numpy() * (width, height)
        else:
            centre = attention.points[:, None, None, None]
            unit = np.array([(width / w, height / h) for h, w in shapes])[:, None]
        even = np.full_like(attention.weights, 1 / (layer.levels * points))
        return replace(attention, locations=centre + offsets * unit, weights=even)

    hooks = [layer.register_forward_pre_hook(note(part)) for part, (layer, _) in parts.items()]
    try:
        yield {part: lambda attention, rows, part=part: start(part, attention, rows) for part in parts}
    finally:
        for hook in hooks:
            hook.remove()


def detections_of(attention: Any) -> Detections:
    """The detections of a decoder's attention."""
    found = attention.detections
    assert found is not None
    return found


def save(picture: Image.Image, name: str, width: int | None = None) -> None:
    """Writes a PNG file, reduced in size until it is small enough for a page."""
    if width is not None and width < picture.width:
        picture = picture.resize(
            (width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS
        )
    path = HERE / f"{name}.png"
    with atomic_file(path) as temporary:
        while True:
            picture.save(temporary, optimize=True)
            excess = temporary.stat().st_size / MOST_BYTES
            if excess < 1:
                break
            scale = min(0.9, math.sqrt(1 / excess))
            size = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
    print(f"{path.name}: {picture.width}x{picture.height}, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
