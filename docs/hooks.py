"""What mkdocs makes while it builds: the reference, the notebooks' pages, tables of measurements, drawings.

Pages that repeat what the program says of itself are made from the program, so that they cannot fall behind.
"""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import detrkit
from detrkit.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

# What the families inherit, and what lies one import deeper than detrkit itself.
_SHARED = {
    "Configuration": ("detrkit.models.configuration.DetrFamilyConfig",),
    "Models": (
        "detrkit.models.detection.ObjectDetectionModel",
        "detrkit.models.segmentation.SegmentationModel",
    ),
    "Outputs": ("detrkit.models.outputs",),
    "Image processors": ("detrkit.processing.image_processor.DetrImageProcessorBase",),
    "Segments": (
        "detrkit.processing.segmentation_processor.SegmentationPostProcessing",
        "detrkit.processing.segmentation.Segmentation",
        "detrkit.processing.segmentation.PanopticPng",
    ),
    "Targets": ("detrkit.common.schema.Target",),
}
_TOOLBOX = {
    "Data sets": (
        "detrkit.data.coco.DetectionDataset",
        "detrkit.data.yolo.read_yolo",
        "detrkit.data.voc.read_voc",
        "detrkit.data.checks.check_dataset",
        "detrkit.data.checks.DatasetReport",
    ),
    "Training": ("detrkit.training.recipe.TrainingRecipe", "detrkit.training.run.train"),
    "Evaluation": (
        "detrkit.evaluation.evaluate.evaluate_detector",
        "detrkit.evaluation.evaluate.evaluate_predictions",
        "detrkit.evaluation.evaluate.Evaluation",
    ),
    "Predictions": (
        "detrkit.inference.predictions.Prediction",
        "detrkit.inference.predictions.Candidates",
    ),
    "Clusters": ("detrkit.inference.cluster.RayDetector",),
    "Export": ("detrkit.engines.export.export_model",),
    "Reading images": ("detrkit.processing.images.load_image", "detrkit.ImageLimits"),
    "Videos": (
        "detrkit.inference.video.read_video",
        "detrkit.processing.frames.VideoFrame",
        "detrkit.inference.tracking.Tracker",
    ),
    "Errors": ("detrkit.errors",),
}
_LOSSES = {
    "Set criterion": (
        "detrkit.losses.criterion.detection_loss",
        "detrkit.losses.criterion.proposal_loss",
        "detrkit.losses.criterion.mean_box_count",
    ),
    "Bipartite matching": (
        "detrkit.losses.matcher.match",
        "detrkit.losses.matcher.Matches",
        "detrkit.losses.matcher.PackedTargets",
    ),
    "A model's loss": ("detrkit.models.detection.ModelWithHeads",),
    "Boxes": ("detrkit.common.boxes",),
}
RESULTS = ROOT / "benchmarks" / "results"
_CHARTS = "figures/benchmarks"  # where charts of measurements are in the site
# Columns of measurements that would make the tables too wide.
_LEFT_TO_THE_FILE = {"fastest_s", "slowest_s", "ratio_low", "ratio_high", "gmac", "sampling_gmac", "gflops"}
_PUBLISHED_MARK, _RESULTS_MARK = "<!-- published -->", "<!-- results -->"
_DRAWING = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[\w/.-]*figures/[\w-]+\.svg)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made here."""
    made: dict[str, str | bytes] = {
        "reference/commands.md": commands_page(),
        "reference/shared.md": deeper_page("What the families share", _SHARED),
        "reference/losses.md": deeper_page("Losses", _LOSSES),
        "reference/toolbox.md": deeper_page("Data, training, evaluation", _TOOLBOX),
        **{f"reference/{name}.md": text for name, text in api_pages().items()},
    }
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        made |= {f"notebooks/{name}": content for name, content in notebook_files(path).items()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    for chart in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"{_CHARTS}/{chart.name}", abs_src_path=str(chart)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts tables and drawings where the page asks for them."""
    if _PUBLISHED_MARK in markdown:
        markdown = markdown.replace(_PUBLISHED_MARK, published_table())
    if _RESULTS_MARK in markdown:
        markdown = markdown.replace(_RESULTS_MARK, benchmark_results(RESULTS))
    folder = (DOCS / page.file.src_uri).parent
    return _DRAWING.sub(lambda match: drawing(folder / match["path"], match["alt"]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Takes the roles off names in docstrings, which mkdocs would print: ``:class:`Name```."""
    return re.sub(r":(?:mod|class|func|meth|attr):<code>~?", "<code>", html)


# The commands


def commands_page() -> str:
    """Every command with its arguments, options, examples and exit statuses, from the program itself."""
    import typer

    from detrkit.cli import app
    from detrkit.cli.help import EXIT_STATUSES

    program = typer.main.get_command(app)
    statuses = _table(["Exit status", "meaning"], [[f"{k}", text] for k, text in EXIT_STATUSES.items()])
    parts = [
        "# Commands",
        "This page is generated from the program. `detrkit COMMAND --help` prints the same text, and "
        "`python -m detrkit` is the same program. `detrkit --install-completion` installs completion of "
        "commands and options in bash, zsh, fish and PowerShell.",
        "Results go to stdout or to files, messages and progress to stderr.",
        statuses,
        "A command that gives one of these another meaning says so below.",
        *_options(program),
    ]
    for name, command in program.commands.items():
        if not getattr(command, "hidden", False):
            parts += _command(command, f"detrkit {name}", 2)
        for inner, part in getattr(command, "commands", {}).items():
            parts += _command(part, f"detrkit {name} {inner}", 3)
    return "\n\n".join(parts) + "\n"


def _command(command: Any, path: str, level: int) -> list[str]:
    """The section of a command."""
    from detrkit.cli.help import EXAMPLES, EXIT_STATUSES, exit_statuses, usage, wrap_command

    parts = [f"{'#' * level} {path}", _paragraphs(command.help)]
    lines = [usage(command, path), "", "# Examples", *(wrap_command(line, 100) for line in EXAMPLES[path])]
    parts += ["```bash\n" + "\n".join(lines) + "\n```", *_options(command)]
    own = {k: text for k, text in exit_statuses(path).items() if text != EXIT_STATUSES[k]}
    return parts + [f"Exit status {status}: {text}." for status, text in own.items()]


def _options(command: Any) -> list[str]:
    """A table for each group of arguments and options."""
    from detrkit.cli.help import GENERAL, grouped

    tables = []
    for group, entries in grouped(command).items():
        if group == GENERAL and command.name != "detrkit":  # the same everywhere
            entries = [entry for entry in entries if not entry[0].startswith("-h")]
        rows = [f"| <code>{_cell(names)}</code> | {_cell(text)} |" for names, text in entries]
        tables.append("\n".join([f"| {group} | |", "| --- | --- |", *rows]))
    return tables


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _cell(text: str) -> str:
    """Text in a table; brackets are no references."""
    for character, entity in {"|": "&#124;", "*": "&#42;", "<": "&lt;", "[": "&#91;"}.items():
        text = text.replace(character, entity)
    return text


# The interface in Python


def api_pages() -> dict[str, str]:
    """Name of a page -> its text; together they have every public name of ``detrkit``."""
    names = [name for name in detrkit.__all__ if not name.startswith("__")]
    pages = {}
    for page, family in FAMILIES.items():
        own = [name for name in names if name.startswith(family.class_prefix)]
        title = family.title
        pages[page] = _api_page(title, f"The classes of {title}. Import them from `detrkit`.", own)
        names = [name for name in names if name not in own]
    pages["detector"] = _api_page("Detector", "The names to start with. Import them from `detrkit`.", names)
    return pages


def _api_page(title: str, introduction: str, names: Iterable[str]) -> str:
    return f"# {title}\n\n{introduction}\n\n" + "\n\n".join(f"::: detrkit.{name}" for name in names) + "\n"


def deeper_page(title: str, groups: Mapping[str, Iterable[str]]) -> str:
    """A page of names that are imported from where they are defined."""
    parts = [f"# {title}"]
    for heading, names in groups.items():
        parts.append(f"## {heading}")
        for name in names:
            parts.append(f"::: {name}\n    options:\n      heading_level: 3\n      show_root_full_path: true")
    return "\n\n".join(parts) + "\n"


# Notebooks


def notebook_files(path: Path) -> dict[str, str | bytes]:
    """File name -> content of a notebook's page, with its stored outputs, and of their images."""
    parts, images = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/jpeg" in data:
                name = f"{path.stem}-{len(images) + 1}.jpg"
                images[name] = base64.b64decode("".join(data["image/jpeg"]))
                parts.append(f"![Output of the cell above]({name})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    where = f"docs/notebooks/{path.name}"
    parts.insert(1, f"This page is the notebook `{where}` of the repository. Open it there to run it.")
    return {f"{path.stem}.md": "\n\n".join(parts) + "\n", **images}


# Tables and drawings


def benchmark_results(folder: Path) -> str:
    """Every CSV file of a folder as a table; without any, how they come to be."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        return (
            "No results are available yet. The scripts in `benchmarks/` write CSV files to "
            "`benchmarks/results/`. Each file becomes a table here the next time this page is built."
        )
    parts = []
    for path in files:
        parts += [f"### {path.stem.replace('_', ' ').capitalize()}", *csv_table(path)]
        if path.with_suffix(".png").is_file():
            parts.append(f"![{path.stem}]({_CHARTS}/{path.stem}.png)")
        script = ROOT / "benchmarks" / f"{path.stem}.py"
        made = f"Made by `python benchmarks/{script.name}`. " if script.is_file() else ""
        parts.append(f"{made}All columns: `benchmarks/results/{path.name}`.")
    return "\n\n".join(parts)


def csv_table(path: Path) -> list[str]:
    """A CSV file as a table of what differs from row to row, and a line of what does not."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return ["Empty."]
    columns = {name: [row[name] or "" for row in rows] for name in rows[0]}
    if "ratio_low" in columns:
        columns["ratio"] = [
            f"{ratio} ({low} to {high})" if ratio else ""
            for ratio, low, high in zip(columns["ratio"], columns["ratio_low"], columns["ratio_high"])
        ]
    same = {name: values[0] for name, values in columns.items() if len(rows) > 1 and len(set(values)) == 1}
    shown = [name for name in columns if name not in same and name not in _LEFT_TO_THE_FILE]
    setting = ", ".join(f"{name} {value}" for name, value in same.items() if value)
    table = _table(shown, [[columns[name][i] for name in shown] for i in range(len(rows))])
    return [table, f"The same in all rows: {setting}."] if setting else [table]


def published_table() -> str:
    """The released checkpoints with their authors' numbers on COCO."""
    from detrkit.checkpoints.registry import REGISTRY

    heading = ["name", "AP", "small, medium, large", "mask AP", "PQ", "params (M)", "GFLOPs", "Hub"]
    rows = []
    for entry in REGISTRY.values():
        if not entry.benchmark.startswith("coco"):
            continue
        sizes = (entry.ap_small, entry.ap_medium, entry.ap_large)
        numbers = [
            _number(entry.ap),
            ", ".join(map(_number, sizes)) if None not in sizes else "",
            *map(_number, (entry.mask_ap, entry.pq)),
            *(f"{value:g}" if value else "" for value in (entry.params, entry.gflops)),
        ]
        hub = f"[yes](https://huggingface.co/{entry.hub_id})" if entry.hub_id else f"[file]({entry.url})"
        rows.append([f"`{entry.name}`", *numbers, hub])
    return _table(heading, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(heading: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def drawing(path: Path, alt: str) -> str:
    """A drawing inside the page, where it takes the colours of the page's scheme."""
    text = path.resolve().read_text(encoding="utf-8")
    text = re.sub(r"<\?xml.*?\?>|<style>.*?</style>|\n\s*", "", text, flags=re.DOTALL)
    return f'<figure class="drawing" role="img" aria-label="{alt}">{text}</figure>'
