from detrkit.models.detr.original_detr import ORIGINAL as DETR
from detrkit.models.original import OriginalLayout

ORIGINAL = OriginalLayout(
    markers=(*DETR.markers, "transformer.encoder.norm.weight"),
    names={**DETR.names, "transformer.encoder.norm": "model.encoder.layernorm"},
)
