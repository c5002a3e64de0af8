"""detrkit's classes behind the Transformers names: auto classes and pipelines."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from detrkit.common.errors import SettingError
from detrkit.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from detrkit.inference.predictions import OutputReader
    from detrkit.results.detection_config import DetectionConfig

# What a pipeline's post-processing reads of the outputs.
_PIPELINE_FIELDS = ("logits", "pred_boxes", "pred_masks", "target_size")


def register() -> None:
    """Makes the Transformers auto classes and pipelines give detrkit's classes.

    After this call ``AutoConfig``, every ``AutoModel...``, ``AutoImageProcessor``, ``AutoFeatureExtractor``
    and ``transformers.pipeline`` use detrkit for every family in ``FAMILIES``. It lasts until the process
    ends; calling it again changes nothing.
    """
    import transformers

    for model_type, family in FAMILIES.items():
        config = family.load(family.config)
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        for name in family.models:
            for mapping in _mappings_of(name.removeprefix(family.class_prefix)):
                mapping.register(config, family.load(name), exist_ok=True)
        processor = family.load(family.processor)
        # A backend that is left out would be filled with the class of Transformers. The aliases are found by
        # their class names, which old preprocessor configs carry; the keys just have to be distinct.
        backends = {"pil": processor, "torchvision": processor}
        aliases = {name: family.load(name) for name in family.processor_aliases}
        transformers.AutoImageProcessor.register(
            config, image_processor_classes=backends | aliases, exist_ok=True
        )
        extractor = next(cls for name, cls in aliases.items() if name.endswith("FeatureExtractor"))
        transformers.AutoFeatureExtractor.register(config, extractor, exist_ok=True)


def _mappings_of(role: str) -> list[Any]:
    """Transformers' mappings from configurations to models in which a family has its class of this role.

    A role is what a model class is called after its family's prefix, such as "ForObjectDetection". A mapping
    that has it for one family gets it for all: a class left out there would silently be Transformers' own.
    """
    from transformers.models.auto import modeling_auto

    wanted = {model_type: family.class_prefix + role for model_type, family in FAMILIES.items()}

    def has_role(classes: Mapping[str, str | tuple[str, ...]]) -> bool:
        names = ((name, classes.get(model_type, ())) for model_type, name in wanted.items())
        return any(name == found or (not isinstance(found, str) and name in found) for name, found in names)

    return [
        getattr(modeling_auto, table.removesuffix("_NAMES"))
        for table, classes in vars(modeling_auto).items()
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES") and has_role(classes)
    ]


def pipeline(task: str | None = None, model: Any = None, **kwargs: Any) -> Any:
    """``transformers.pipeline`` with detrkit's models, prepared for inference, and image processors.

    Calls take images of any sizes at any ``batch_size``, and the bytes of image files and open files too.

    Args:
        task: Such as "object-detection".
        model: A Hub id, a folder, a short name of the registry ("detr-resnet-50"), or a model.
        **kwargs: Passed on to ``transformers.pipeline``.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: ``model`` is a name that is neither a folder, a Hub id nor in the registry.

    Example:
        ```python
        import detrkit

        detect = detrkit.pipeline("object-detection", model="facebook/detr-resnet-101")
        detect("photo.jpg")  # [{"score": 0.998, "label": "cat", "box": {"xmin": 344, ...}}, ...]
        ```
    """
    import transformers

    from detrkit.checkpoints.registry import resolve_model
    from detrkit.inference.own_parts import own_processor
    from detrkit.models.base import DetrFamilyPreTrainedModel

    if isinstance(model, (str, os.PathLike)):
        model = resolve_model(os.fspath(model))
    register()
    pipe = transformers.pipeline(task, model=model, **kwargs)
    if isinstance(pipe.model, DetrFamilyPreTrainedModel):
        # Parts that accelerate runs on several devices stay as they are; so does a model that is ready.
        spread = any(hasattr(module, "_hf_hook") for module in pipe.model.modules())
        if not (spread or pipe.model.is_prepared):
            pipe.model = prepare(pipe.model)
        if pipe.image_processor is not None:
            pipe.image_processor = own_processor(pipe.image_processor, pipe.model.config.model_type)
        pipe.get_iterator = partial(_batches_of_one_size, pipe, pipe.get_iterator)
        pipe.preprocess = partial(_preprocess, pipe.preprocess)
        if reader := _reader_of(pipe, model, kwargs.get("revision")):
            as_given = pipe.postprocess
            if pipe.task == "object-detection":
                as_given = partial(_postprocess, reader)
            pipe.postprocess = partial(_postprocess_whole, reader.config, as_given)
    return pipe


def _reader_of(pipe: Any, model: Any, revision: str | None) -> OutputReader | None:
    """What reads outputs with a model's detection settings; None where it has none of its own."""
    from detrkit.checkpoints.loading import is_folder, read_detection_config
    from detrkit.inference.predictions import OutputReader
    from detrkit.results.detection_config import DetectionConfig

    name = model if isinstance(model, str) else pipe.model.config.name_or_path
    if not isinstance(model, str) and not is_folder(name):
        return None  # a model that was loaded or made by other means
    config = read_detection_config(name, revision)
    if config == DetectionConfig():
        return None
    processor = pipe.image_processor
    return OutputReader(
        processor=processor,
        names={int(label): str(text) for label, text in pipe.model.config.id2label.items()},
        has_masks=False,
        object_limit=processor.object_limit(pipe.model.config.object_queries),
        config=config,
    )


def _preprocess(preprocess: Callable[..., Any], image: Any, **options: Any) -> Any:
    """A pipeline's ``preprocess``, which takes the bytes of a file and an open file too.

    They are turned upright, as Transformers turns a path.
    """
    from detrkit.processing.images import load_image
    from detrkit.processing.sources import BYTES

    if isinstance(image, BYTES) or callable(getattr(image, "read", None)):
        image = load_image(image, exif_orientation=True)
    return preprocess(image, **options)


def prepare(
    model: Any,
    *,
    engine: str = "torch",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """A copy of a model that gives the same predictions faster; a ``Detector`` runs such a copy.

    The copy has the same call and, up to rounding, the same outputs for any images. Batch norm is folded into
    the convolutions, and bias, ReLU and sums are done together with them. The copy cannot be trained
    or saved; the original model does not change.

    Args:
        model: A model of detrkit.
        engine: "torch", or "compile" for :func:`torch.compile`, which takes up to a minute at the first call.
        device: Where to run; by default where the model is.
        dtype: "float32", "float16" or "bfloat16", or the torch dtype; by default the model's.

    Raises:
        SettingError: Engine, device or dtype do not exist or are not available here.

    Example:
        ```python
        import detrkit

        model = detrkit.prepare(detrkit.DetrForObjectDetection.from_pretrained("facebook/detr-resnet-50"))
        ```
    """
    from detrkit.engines import check_engine, start
    from detrkit.engines.names import EXPORTED_ENGINES
    from detrkit.engines.placement import place

    check_engine(engine)
    if engine in EXPORTED_ENGINES:
        raise SettingError(
            f"the engine {engine!r} does not give a PyTorch model; use a Detector with engine={engine!r}"
        )
    placement = place(engine, device or model.device, dtype or model.dtype)
    return start(copy.deepcopy(model), engine, *placement)


def _batches_of_one_size(
    pipe: Any,
    as_given: Callable[..., Any],
    inputs: Any,
    num_workers: int,
    batch_size: int,
    preprocess_params: dict[str, Any],
    forward_params: dict[str, Any],
    postprocess_params: dict[str, Any],
) -> Any:
    """A pipeline's ``get_iterator``: only images of one processed size share a batch, as in a ``Detector``.

    So images of any sizes are taken, and a result does not depend on the other images.
    """
    if batch_size == 1:
        options = (preprocess_params, forward_params, postprocess_params)
        return as_given(inputs, num_workers, batch_size, *options)

    import torch

    from detrkit.inference.batching import run_in_groups

    def run(items: Sequence[Any]) -> Iterator[Any]:
        batch = copy.copy(items[0])
        for name, value in items[0].items():
            rows = [item[name] for item in items]
            batch[name] = (
                torch.cat(rows) if torch.is_tensor(value) else [row for each in rows for row in each]
            )
        outputs = pipe.forward(batch, **forward_params)
        for row in range(len(items)):
            own = {name: outputs[name][row : row + 1] for name in _PIPELINE_FIELDS if name in outputs}
            yield pipe.postprocess(type(outputs)(own), **postprocess_params)

    # A data set may have numbers only.
    given = map(inputs.__getitem__, range(len(inputs))) if hasattr(inputs, "__getitem__") else inputs
    prepared = (pipe.preprocess(item, **preprocess_params) for item in given)
    return run_in_groups(prepared, run, lambda item: tuple(item["pixel_values"].shape), batch_size)


def _postprocess_whole(
    config: DetectionConfig, postprocess: Callable[..., Any], outputs: Any, **options: Any
) -> Any:
    """A pipeline's ``postprocess``; refuses an image that the model's settings have cut into tiles."""
    height, width = (int(side) for side in outputs["target_size"][0])
    config.check_whole((height, width), None)
    return postprocess(outputs, **options)


def _postprocess(reader: OutputReader, outputs: Any, threshold: float | None = None) -> list[dict[str, Any]]:
    """A pipeline's ``postprocess`` with the model's detection settings.

    Returns:
        As Transformers gives it: for each object ``score``, ``label`` (its name) and ``box``, whose ``xmin``,
        ``ymin``, ``xmax`` and ``ymax`` are whole pixels.
    """
    from detrkit.inference.prepared import ImageFrame

    height, width = outputs["target_size"][0].tolist()
    size = height, width
    frame = ImageFrame(
        image_size=size, processed_size=size, padded_size=size, source=None, exif_orientation=True
    )
    rule = reader.rule(reader.config.with_options(threshold=threshold))
    found = reader.candidates(outputs, frame, rule).detections
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        {"score": one.score, "label": one.name, "box": dict(zip(corners, map(int, one.box.tolist())))}
        for one in found
    ]
