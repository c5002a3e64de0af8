"""What the model cards say in words: of each family, of its variants, of COCO. Cards wrap it anew."""

from __future__ import annotations

DC5 = """\
*DC5* means that the backbone's last stage keeps the resolution of the one before, by dilated instead of
strided convolutions: its map has four times as many places. That finds more small objects and costs
more time and memory."""

MULTI_SCALE = """\
The encoder works on four maps together: those of the backbone's last three stages, and a coarser one
made from the last. Small objects are found in the fine maps, large ones in the coarse."""

SINGLE_SCALE = "The encoder works on the backbone's last map alone."

BOX_REFINE = "With *box refinement* each decoder layer corrects the boxes of the layer before."

TWO_STAGE = """\
In this *two-stage* model the object queries are not learned: the encoder proposes a box at every place
of its maps, and the best-scored ones become the queries of the decoder."""

PANOPTIC = """\
A mask head on top of the detector gives each query a mask. The boxes are those of things (objects that
can be counted) and of stuff (sky, road, wall); merging the masks by score gives every pixel to one
segment, which is a panoptic segmentation."""

COCO_DETECTION = """\
The 2017 training split of [COCO](https://cocodataset.org): 118,287 photographs from Flickr with boxes
for objects of 80 everyday categories. The annotations are CC BY 4.0; each photograph has a licence of
its own. COCO's category ids have gaps, and the model predicts the ids as they are: of its 91 outputs 80
are used. The backbone started from weights trained on ImageNet."""

COCO_PANOPTIC = """\
The 2017 training split of [COCO](https://cocodataset.org) with panoptic annotations: 118,287
photographs from Flickr in which every segment of 80 categories of things and 53 of stuff is marked. The
annotations are CC BY 4.0; each photograph has a licence of its own. COCO's category ids have gaps, and
the model predicts the ids as they are: of its 250 outputs 133 are used. The backbone started from
weights trained on ImageNet."""

PANOPTIC_TRAINING = """\
First the detector, on the boxes of things and stuff: AdamW with a learning rate of 1e-4 (backbone 1e-5)
and weight decay 1e-4, gradients clipped to a norm of 0.1, dropout 0.1. The loss adds the cross-entropy of
the classes, 5 times the L1 distance and 2 times the generalised IoU of the boxes, after every decoder
layer; *no object* counts a tenth of a class. Then the mask head on the frozen detector, with a focal and a
Dice loss of the masks. Epochs, hardware and time of this checkpoint's training are not known."""

AUGMENTATION = """\
In training, images were flipped at random and, with equal chance, either resized to a shorter side of
480 to 800 pixels (longer side at most 1333), or resized to 400, 500 or 600, cropped to a region of 384
to 600 pixels a side and resized again."""

COCO_USES = {
    "detection": """\
For finding everyday objects of COCO's 80 categories in photographs, for comparing methods with a
published baseline, and as the start of fine-tuning to other classes (`detrkit train`).""",
    "panoptic": """\
For dividing photographs into COCO's 133 categories of things and stuff, for comparing methods with a
published baseline, and as the start of fine-tuning to other classes (`detrkit train --masks`).""",
}

OTHER_USES = (
    "For finding the classes that it was trained for, and as the start of fine-tuning (`detrkit train`)."
)

COCO_LIMITS = """\
It knows no other classes, and photographs unlike COCO's (drawings, aerial or medical images, night,
fisheye lenses) were not tested. People and objects that are rare on Flickr are rare in its training;
how well it works for different groups of people has not been measured. Do not let it alone decide
anything that matters to somebody, and do not use it to watch people."""

OTHER_LIMITS = "How well it works has to be measured on your own images (`detrkit evaluate`)."
