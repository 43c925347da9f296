import json

import pytest
import torch
from safetensors.torch import load_file

from ldm_lab.models.discriminator import PatchDiscriminator
from tests.helpers import GOLDEN, assert_close_relative


@pytest.mark.parametrize(("num_layers", "published"), [(3, 2_765_633), (2, 663_361)])
def test_published_parameter_counts(num_layers, published):
    with torch.device("meta"):
        discriminator = PatchDiscriminator(num_layers=num_layers)
    assert sum(p.numel() for p in discriminator.parameters()) == published


def test_width_grows_up_to_eight_times():
    with torch.device("meta"):
        discriminator = PatchDiscriminator(channels=64, num_layers=5)
    widths = [layer.out_channels for layer in discriminator.main if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 512, 512, 1]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_of_the_original(mode):
    io = load_file(GOLDEN / "compvis/io.safetensors")
    settings = json.loads((GOLDEN / "compvis/meta.json").read_text())["arch"]["disc"]
    sizes = (settings[f"disc_{key}"] for key in ("in_channels", "ndf", "num_layers"))
    discriminator = PatchDiscriminator(*sizes)
    state = load_file(GOLDEN / "compvis/disc_state.safetensors")
    discriminator.load_state_dict({key: value.float() if "num_" not in key else value for key, value in state.items()})
    discriminator.train(mode == "train")
    with torch.no_grad():
        assert_close_relative(discriminator(io["in.image"]), io[f"disc.logits_{mode}"])


def test_initialisation():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=32)
    first, scale = discriminator.main[0].weight, discriminator.main[9].weight
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert (scale.mean().item(), scale.std().item()) == pytest.approx((1.0, 0.02), rel=0.15)
    assert discriminator.main[9].bias.abs().max() == 0


@pytest.mark.parametrize(("num_layers", "field"), [(3, 70), (2, 34)])
def test_each_logit_sees_its_patch_alone(num_layers, field):
    discriminator = PatchDiscriminator(channels=4, num_layers=num_layers).eval()
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == field


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_images_give_one_logit(num_layers):
    discriminator = PatchDiscriminator(channels=2, num_layers=num_layers)
    side = discriminator.smallest_side
    assert discriminator(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 3, side - 2, side))
