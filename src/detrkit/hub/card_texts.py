"""The fixed texts of model cards that belong to no single family. Cards rewrap their lines."""

from __future__ import annotations

from dataclasses import dataclass, replace

DC5 = """\
*DC5* means that the backbone's last stage uses dilated instead of strided convolutions. It keeps the
resolution of the stage before, so its feature map has four times as many positions. The model detects more
small objects, and needs more time and memory."""

MULTI_SCALE = """\
The encoder processes four feature maps together: those of the backbone's last three stages, and a coarser
map computed from the last one. The fine maps serve small objects, the coarse maps large ones."""

SINGLE_SCALE = "The encoder processes only the backbone's last feature map."

BOX_REFINE = "With *box refinement*, each decoder layer corrects the boxes of the previous layer."

TWO_STAGE = """\
In this *two-stage* model, the object queries are not learned. The encoder proposes a box at every position
of its feature maps, and the proposals with the highest scores become the queries of the decoder."""

PANOPTIC = """\
A mask head on top of the detector predicts a mask for each query. The detector finds both things (objects
that can be counted) and stuff (sky, road, wall). Merging the masks by score assigns every pixel to one
segment; the result is a panoptic segmentation."""

AUGMENTATION = """\
Training images were flipped at random. With equal probability, they were either resized to a shorter side
of 480 to 800 pixels (longer side at most 1333), or resized to a shorter side of 400, 500 or 600, cropped
to 384 to 600 pixels per side, and resized again."""

OTHER_USES = (
    "For detecting the classes that it was trained on, and as a starting point for fine-tuning "
    "(`detrkit train`).",
    "Measure its accuracy on your own images (`detrkit evaluate`).",
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The data set that released checkpoints were trained and measured on; COCO unless said otherwise.

    Attributes:
        uses: What a model trained on it is for, and where its limits are.
        data: Training data, and what is measured on.
        options: Those of ``detrkit evaluate``.
        dataset: Its name in the Hub's front matter.
        title: Name of the split that the numbers are of.
        split: The split that they are of.
        images: Number and name of the images that the published numbers are of.
        augmentation: What was done to the images in training.
    """

    uses: tuple[str, ...]
    data: str
    options: str
    dataset: str = "coco"
    title: str = "COCO 2017 (val)"
    split: str = "validation"
    images: str = "the 5,000 images of COCO's 2017 validation split"
    augmentation: str = AUGMENTATION


_COCO_LIMITS = """\
It detects no other classes. Images unlike COCO's (drawings, aerial or medical images, night scenes,
fisheye lenses) were not tested. People and objects that are rare on Flickr are rare in the training data,
and the accuracy for different groups of people has not been measured. Do not make decisions that affect
people based on this model alone, and do not use it for surveillance."""

_COCO_DETECTION = Benchmark(
    uses=(
        "For detecting everyday objects of COCO's 80 categories in photographs, as a published baseline for "
        "other methods, and as a starting point for fine-tuning to other classes (`detrkit train`).",
        _COCO_LIMITS,
    ),
    data="""\
The 2017 training split of [COCO](https://cocodataset.org): 118,287 photographs from Flickr with boxes for
objects of 80 everyday categories. The annotations are CC BY 4.0; each photograph has its own licence.
COCO's category ids have gaps, and the model predicts these ids, so only 80 of its 91 outputs are used. The
backbone started from ImageNet weights.""",
    options="--images val2017 --annotations instances_val2017.json",
)

_COCO_PANOPTIC = Benchmark(
    uses=(
        "For segmenting photographs into COCO's 133 categories of things and stuff, as a published baseline "
        "for other methods, and as a starting point for fine-tuning to other classes (`detrkit train "
        "--masks`).",
        _COCO_LIMITS,
    ),
    data="""\
The 2017 training split of [COCO](https://cocodataset.org) with panoptic annotations: 118,287 photographs
from Flickr, annotated with segments of 80 categories of things and 53 of stuff. The annotations are CC BY
4.0; each photograph has its own licence. COCO's category ids have gaps, and the model predicts these ids,
so only 133 of its 250 outputs are used. The backbone started from ImageNet weights.""",
    options="--images val2017 --annotations panoptic_val2017.json --panoptic-dir panoptic_val2017",
)

_TABLE_LIMITS = """\
It detects no other classes. Images unlike the training images (photographs of pages, handwriting, other
kinds of documents) were not tested. It does not read text: the content of the cells must come from the
document or from OCR."""

_PAGES = """\
PubTables-1M ([paper](https://arxiv.org/abs/2110.00061)): pages of scientific articles from PubMed Central
with boxes in the Pascal VOC format, 460,589 to train, 57,591 to validate and 57,125 to test. The classes
are tables and rotated tables."""

_TABLES = """\
PubTables-1M ([paper](https://arxiv.org/abs/2110.00061)): images of the tables of scientific articles from
PubMed Central with boxes in the Pascal VOC format, 758,849 to train, 94,959 to validate and 93,834 to
test. The classes are the table, its columns, rows, column headers, projected row headers and spanning
cells."""

_FINANCE = """\
FinTabNet.c ([paper](https://arxiv.org/abs/2303.00716)): images of tables from annual reports, with the
annotations of FinTabNet corrected and brought into the form of PubTables-1M by the authors."""

_PUBTABLES_DETECTION = Benchmark(
    uses=(
        "For detecting tables in images of document pages, and as a starting point for fine-tuning.",
        _TABLE_LIMITS,
    ),
    data=_PAGES,
    options="--images images --annotations test.json",
    dataset="bsmock/pubtables-1m",
    title="PubTables-1M, pages (test)",
    split="test",
    images="the test split of PubTables-1M's pages",
    augmentation="""\
Training images were cropped at random and resized to a longer side of 704 to 896 pixels.""",
)

_PUBTABLES_STRUCTURE = replace(
    _PUBTABLES_DETECTION,
    uses=(
        "For detecting rows, columns, headers and spanning cells in the image of a single table with a "
        "margin (table-transformer-detection finds the tables in a page), and as a starting point for "
        "fine-tuning.",
        _TABLE_LIMITS,
    ),
    data=_TABLES,
    title="PubTables-1M, tables (test)",
    images="the test split of PubTables-1M's tables",
    augmentation="""\
Training images were cropped to the table with a margin and resized to a longer side of 900 to 1100 pixels,
and small rectangles were erased at random.""",
)

#: Name of a benchmark -> what released checkpoints were trained and measured on.
BENCHMARKS = {
    "coco": _COCO_DETECTION,
    "coco-panoptic": _COCO_PANOPTIC,
    "pubtables-1m-detection": _PUBTABLES_DETECTION,
    "pubtables-1m-structure": _PUBTABLES_STRUCTURE,
    "fintabnet-c": replace(_PUBTABLES_STRUCTURE, data=_FINANCE, dataset="bsmock/FinTabNet.c"),
    "tables-combined": replace(_PUBTABLES_STRUCTURE, data=f"{_TABLES}\n\n{_FINANCE}"),
}
