from functools import partial

import torch

from ldm_lab.models.layers.blocks import DownBlock, MidBlock, UpBlock
from ldm_lab.models.layers.resample import Downsample, Upsample
from ldm_lab.models.layers.resnet import ResnetBlock

RESNET = partial(ResnetBlock, groups=2)


def test_skips_are_left_on_the_way_down_and_taken_on_the_way_up():
    down = DownBlock(4, 8, 2, RESNET, downsample=Downsample)
    up = UpBlock(8, 4, [8, 8, 8], RESNET, upsample=Upsample)
    skips = []
    x = down(torch.randn(2, 4, 16, 16), None, skips)
    assert [tuple(skip.shape) for skip in skips] == [(2, 8, 16, 16), (2, 8, 16, 16), (2, 8, 8, 8)]
    assert skips[-1] is x
    same_size = [torch.randn(2, 8, 8, 8) for _ in range(3)]
    assert up(x, None, same_size).shape == (2, 4, 16, 16)
    assert same_size == []


def test_the_last_skip_is_taken_first():
    up = UpBlock(4, 4, [2, 6], RESNET)
    early, late = torch.randn(1, 6, 4, 4), torch.randn(1, 2, 4, 4)
    assert up(torch.randn(1, 4, 4, 4), None, [early, late]).shape == (1, 4, 4, 4)


def test_without_attention_there_are_no_tensors_for_it():
    for block in (DownBlock(4, 4, 1, RESNET), MidBlock(4, RESNET), UpBlock(4, 4, [0], RESNET)):
        assert all(key.startswith("resnets.") for key in block.state_dict())
