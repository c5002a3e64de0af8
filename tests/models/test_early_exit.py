"""A model that keeps its first decoder layers only gives what those layers give in the whole one."""

from pathlib import Path

import pytest
import torch

from detrkit.errors import SettingError
from tests.tiny import FAMILIES, TinyFamily, padded_batch


@pytest.mark.parametrize("refines", [False, True])
def test_the_kept_layers_give_what_they_give_in_the_whole_model(
    family: TinyFamily, refines: bool, tmp_path: Path
) -> None:
    if refines and family.points is None:
        pytest.skip("only Deformable DETR refines boxes")
    options = {"with_box_refine": True} if refines else {}
    for count in (1, 2, 3):
        model = family.detector(**options)
        wanted = model.predict_layers(*padded_batch())
        model.keep_decoder_layers(count)
        model.save_pretrained(tmp_path / str(count))
        loaded = family.detector_class.from_pretrained(tmp_path / str(count)).eval()
        for one in (model, loaded):
            found = one.predict_layers(*padded_batch())
            assert len(found["logits"]) == one.config.decoder_layers == count
            for name, layers in found.items():
                torch.testing.assert_close(layers, wanted[name][:count])
    # The layers differ, so that the comparison can fail.
    assert (wanted["logits"][0] - wanted["logits"][-1]).abs().max() > 1e-2


@pytest.mark.parametrize("count", [0, 4])
def test_layers_that_are_not_there_cannot_be_kept(count: int) -> None:
    with pytest.raises(SettingError, match="the model has 3 decoder layers; keep 1 or more"):
        FAMILIES["detr"].detector().keep_decoder_layers(count)
