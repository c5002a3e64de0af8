"""The page: an image and a model on the left, what was found on the right."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from detrkit.common.errors import DetrkitError
from detrkit.common.log import logger
from detrkit.demo.choices import ModelChoices
from detrkit.demo.results import MIN_THRESHOLD, Result, ResultStore, View, message

# The sides of an image on the page, in pixels; what is downloaded has the size of the image.
_PREVIEW_SIZE = 1600
# Seconds between two searches for old files, and the age at which they go.
_FILE_SEARCH, _FILE_AGE = 600, 3600

_WAITING = "Drop an image on the left, or pick an example."
_NO_MASKS = "This model detects boxes only. Choose a panoptic one, such as detr-resnet-50-panoptic."
_NOT_ASKED = "Press Show attention: the model runs once more and shows where it looks."
_ALL_OBJECTS = "The most confident objects together"
_FAULT = "Something went wrong on the server, and the cause is in its log. Try another image or model."

# Images to click on, which would have no name for those who do not see them.
_NAME_EXAMPLES = """() => document.querySelectorAll('#detrkit-examples button').forEach(
    (button, index) => button.setAttribute('aria-label', `Example image ${index + 1}`))"""


def _upload() -> gr.Image:
    """An image as the visitor gave it: path on the server and name, or None.

    ``gr.Image`` opens the file before it asks anybody else, and a broken one ends in a bare "Error"; the page
    reads it itself and says what is wrong. This is no subclass, since gradio writes a file beside the source
    of each; so no event may answer with ``gr.update`` for this component, which would create it again.
    """

    def as_given(payload: ImageData | None) -> tuple[str, str] | None:
        if payload is None or not payload.path:
            return None
        return payload.path, Path(payload.orig_name or payload.path).name

    image = gr.Image(label="Image", sources=["upload", "clipboard"], height=300)
    image.preprocess = as_given
    return image


class _Tab:
    """Drawing, details and downloads of one way to look at a result, below the tab's own controls."""

    def __init__(self, noun: str, document: bool = True) -> None:
        self.drawing = gr.Image(
            label=f"Image with {noun}",
            show_label=False,  # it would hide a corner
            interactive=False,
            height=440,
            buttons=["fullscreen"],
        )
        self.details = gr.HTML(message(_WAITING), label=f"List of {noun}")
        with gr.Row():
            self.json = gr.DownloadButton("Download JSON", interactive=False, size="md") if document else None
            self.png = gr.DownloadButton("Download PNG", interactive=False, size="md")

    @property
    def outputs(self) -> list[Any]:
        """The components that ``show`` and ``clear`` give values for."""
        return [self.drawing, self.details, self.png, *([] if self.json is None else [self.json])]

    def show(self, view: View) -> list[Any]:
        """Values of ``outputs`` for what was found."""
        # In gradio's own folder files are served as they are, and removed when they are old.
        folder = Path(self.png.GRADIO_CACHE) / secrets.token_hex(16)
        folder.mkdir(parents=True)
        drawing = folder / f"{view.file_stem}.png"
        view.drawing.save(drawing, compress_level=1)
        preview = drawing
        if max(view.drawing.size) > _PREVIEW_SIZE:
            preview = folder / "preview.jpg"
            view.drawing.thumbnail((_PREVIEW_SIZE, _PREVIEW_SIZE))
            view.drawing.save(preview, quality=90)
        downloads = [drawing]
        if self.json is not None:
            downloads.append(folder / f"{view.file_stem}.json")
            downloads[-1].write_text(json.dumps(view.document) + "\n", encoding="utf-8")
        buttons = [gr.update(value=str(path), interactive=True) for path in downloads]
        return [str(preview), view.details, *buttons]

    def clear(self, text: str) -> list[Any]:
        """Values of ``outputs`` for a message in their place."""
        buttons = [gr.update(value=None, interactive=False) for _ in self.outputs[2:]]
        return [None, message(text), *buttons]


def _threshold(noun: str, value: float) -> gr.Slider:
    return gr.Slider(
        MIN_THRESHOLD,
        0.99,
        value,
        step=0.01,
        label=f"Threshold of {noun}",
        info=f"Only {noun} with a higher score are shown",
    )


def build_page(choices: ModelChoices, examples: Sequence[Path] = (), queue_size: int = 32) -> gr.Blocks:
    """The page, ready to be launched.

    Args:
        choices: The models.
        examples: Image files to offer.
        queue_size: How many visitors may wait for the model; the next ones are told that it is busy.
    """
    store = ResultStore()
    with gr.Blocks(title="detrkit", analytics_enabled=False, delete_cache=(_FILE_SEARCH, _FILE_AGE)) as page:
        token = gr.State(None, time_to_live=_FILE_AGE, delete_callback=store.discard)
        gr.HTML(
            "<h1>detrkit</h1><p>Objects in images with DETR, Conditional DETR and Deformable DETR</p>",
            elem_classes="detrkit-head",
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image = _upload()
                model = gr.Dropdown(choices.labels, value=choices.labels[0], label="Model")
                gallery = gr.Dataset(
                    components=[gr.Image(render=False)],
                    samples=[[str(example)] for example in examples],
                    type="index",
                    label="Examples",
                    elem_id="detrkit-examples",
                    visible=bool(examples),
                )
            with gr.Column(scale=7, min_width=340), gr.Tabs():
                with gr.Tab("Boxes"):
                    own = gr.Checkbox(
                        True,
                        label="The model's own threshold",
                        info="As chosen for the model, or 0.5; moving the slider sets another",
                    )
                    least_score = _threshold("objects", 0.5)
                    boxes = _Tab("objects")
                with gr.Tab("Panoptic map"):
                    least_segment_score = _threshold("segments", 0.85)
                    segments = _Tab("segments")
                with gr.Tab("Attention"):
                    with gr.Row(equal_height=True):
                        choice = gr.Dropdown([_ALL_OBJECTS], value=_ALL_OBJECTS, label="Object", scale=3)
                        explain = gr.Button("Show attention", variant="primary", scale=1, min_width=190)
                    attention = _Tab("attention", document=False)

        def clear(text: str) -> list[Any]:
            return [None, *boxes.clear(text), *segments.clear(text), *attention.clear(text), no_choice]

        no_choice = gr.update(choices=[_ALL_OBJECTS], value=_ALL_OBJECTS)

        def forget(old: str | None) -> list[Any]:
            store.discard(old)
            return clear(_WAITING)

        def look(
            upload: tuple[str, str] | None,
            label: str,
            own: bool,
            score: float,
            segment_score: float,
            old: str | None,
            progress: Any = gr.Progress(),  # noqa: B008 - gradio looks for it here
        ) -> list[Any]:
            if upload is None:
                return forget(old)
            store.discard(old)
            try:
                if not choices.is_loaded(label):
                    progress(0, desc=f"Loading {label}")
                detector = choices.get(label)
                # A result holds its model, which would stay in memory after it made room for another one.
                store.retain(choices.is_loaded)
                result = Result.of(*upload, detector, label)
                shown = boxes.show(result.boxes(None if own else score))
                if result.detector.has_masks:
                    shown += segments.show(result.segments(segment_score))
                else:
                    shown += segments.clear(_NO_MASKS)
            except Exception as error:
                text = _said(error)
                gr.Warning(text, title="No result")
                return clear(text)
            return [store.put(result), *shown, *attention.clear(_NOT_ASKED), no_choice]

        def look_inside(token: str | None, own: bool, score: float) -> list[Any]:
            least = None if own else score
            if token is None:
                return [*attention.clear(_WAITING), no_choice]
            try:
                result = store.get(token)
                result.look_inside()
                view, objects = result.attention_together(least), result.attending(least)
            except Exception as error:
                return [*attention.clear(_said(error)), no_choice]
            return [*attention.show(view), gr.update(choices=[_ALL_OBJECTS, *objects], value=_ALL_OBJECTS)]

        def choose(token: str | None, chosen: str, own: bool, score: float) -> list[Any]:
            def view(result: Result) -> View | None:
                if result.attention is None:
                    return None
                if chosen != _ALL_OBJECTS:
                    return result.attention_of([int(chosen.split(":")[0]) - 1])
                return result.attention_together(None if own else score)

            return _redraw(store, attention, token, view)

        model_runs: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        # The model is not needed, so nobody waits for those who wait for it.
        drawing: dict[str, Any] = {
            "trigger_mode": "always_last",
            "queue": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        looking: dict[str, Any] = {
            "fn": look,
            "inputs": [image, model, own, least_score, least_segment_score, token],
            "outputs": [token, *boxes.outputs, *segments.outputs, *attention.outputs, choice],
            "trigger_mode": "always_last",
            **model_runs,
        }
        gr.on(
            [image.upload, model.input],
            **looking,
            api_name="detect",
            api_visibility="undocumented",
        )
        gallery.click(
            lambda index: str(examples[index]), gallery, image, queue=False, api_visibility="private"
        ).then(**looking, api_visibility="private")
        page.load(js=_NAME_EXAMPLES)
        # Of an example that is removed, the browser still sends the image.
        image.clear(forget, [token], looking["outputs"], queue=False, api_visibility="private")
        explain.click(
            look_inside,
            [token, own, least_score],
            [*attention.outputs, choice],
            api_visibility="private",
            **model_runs,
        )
        choice.input(choose, [token, choice, own, least_score], attention.outputs, **drawing)
        own.input(
            lambda token, own, score: _redraw(
                store, boxes, token, lambda result: result.boxes(None if own else score)
            ),
            [token, own, least_score],
            boxes.outputs,
            **drawing,
        )
        least_score.change(
            lambda token, score: [
                False,
                *_redraw(store, boxes, token, lambda result: result.boxes(score)),
            ],
            [token, least_score],
            [own, *boxes.outputs],
            **drawing,
        )
        least_segment_score.change(
            lambda token, score: _redraw(
                store,
                segments,
                token,
                lambda result: result.segments(score) if result.detector.has_masks else None,
            ),
            [token, least_segment_score],
            segments.outputs,
            **drawing,
        )
        page.queue(max_size=queue_size, api_open=False)
    return page


def _redraw(
    store: ResultStore, tab: _Tab, token: str | None, view: Callable[[Result], View | None]
) -> list[Any]:
    """The outputs of a tab for another view of a result, unchanged if there is none."""
    try:
        shown = None if token is None else view(store.get(token))
    except Exception as error:
        return tab.clear(_said(error))
    return tab.show(shown) if shown is not None else [gr.skip()] * len(tab.outputs)


def _said(error: Exception) -> str:
    """What a visitor is told of an error: the remedy of a mistake, nothing of the server's inside."""
    if isinstance(error, DetrkitError):
        text = " ".join(str(error).split())
        return f"{text}."
    logger.error("demo: %s", error, exc_info=error)
    return _FAULT
