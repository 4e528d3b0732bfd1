"""Selecting, joining and expanding conditionings."""

import pytest
import torch

from scoredist3d.priors import Conditioning


def test_conditionings_select_join_and_expand():
    text, camera = torch.arange(12.0).reshape(3, 2, 2), torch.ones(3, 16)
    conditioning = Conditioning(text, camera)
    assert len(conditioning[1:]) == 2 and torch.equal(conditioning[torch.tensor([2])].text, text[2:])
    joined = Conditioning.cat([conditioning, conditioning[:1]])
    assert len(joined) == 4 and torch.equal(joined.camera, torch.ones(4, 16)) and joined.pooled is None
    assert conditioning[:1].expand(5).text.shape == (5, 2, 2) and conditioning.expand(3) is conditioning
    with pytest.raises(ValueError, match="3 items cannot be used for a batch of 2"):
        conditioning.expand(2)
    with pytest.raises(ValueError, match="camera is given in some and missing in others"):
        Conditioning.cat([conditioning, Conditioning(text)])
