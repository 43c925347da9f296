"""The parts of stage 1 follow the channels of the images; a typed value that does not fit is refused."""

import pytest

from ldm_lab.config import channels
from ldm_lab.config.build import plain
from ldm_lab.config.compose import Recipe
from ldm_lab.utils import terminal
from ldm_lab.utils.errors import UserError

L1 = "ldm_lab.losses.perceptual.MultiScaleL1"


def composed(*overrides, experiment="celebahq"):
    (config,) = Recipe.parse([f"experiment={experiment}/autoencoder", "data.root=/data", *overrides]).compose()
    return plain(config)["model"]


def test_networks_follow_the_images_and_one_line_says_what_else(caplog):
    terminal.said_once.clear()
    model = composed("data.channels=5")
    assert model["autoencoder"]["in_channels"] == model["autoencoder"]["out_channels"] == 5
    assert model["loss"]["discriminator"]["in_channels"] == 5
    assert model["loss"]["perceptual"] == {"_target_": L1}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("data.channels=5: the perceptual term is MultiScaleL1, which needs no weights")


def test_lpips_sees_grey_images(caplog):
    terminal.said_once.clear()
    model = composed("data.channels=1")
    assert model["autoencoder"]["in_channels"] == model["loss"]["discriminator"]["in_channels"] == 1
    assert model["loss"]["perceptual"]["_target_"].endswith(".LPIPS")
    assert not caplog.records


def test_rgb_changes_nothing():
    model = composed()
    assert "in_channels" not in model["autoencoder"]
    assert model == composed("data.channels=3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.autoencoder.in_channels=1"], r"model\.autoencoder\.in_channels=1: the images have 3 channel\(s\)"),
        (["data.channels=5", "+model.autoencoder.out_channels=3"], r"out_channels=3: the images have 5 channel\(s\)"),
        (["data.channels=1", "model.loss.discriminator.in_channels=3"], r"discriminator\.in_channels=3: .* 1 channel"),
        (["data.channels=5", "model.loss.perceptual.weights=/vgg16.pth"], r"perceptual\.weights: LPIPS sees one .* 5"),
    ],
)
def test_typed_values_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        composed(*overrides)


RECIPE = {  # of the demo, as far as it counts here
    "stage": "autoencoder",
    "model": {
        "start": "thumbnail",
        "autoencoder": {"block_out_channels": [16, 32, 64], "norm_num_groups": 4, "latent_channels": 3},
        "loss": {"pixel": {"_target_": "ldm_lab.losses.pixel.ColourMSE"}, "perceptual": {"_target_": L1}},
    },
}


@pytest.mark.parametrize(("number", "start"), [(1, None), (2, None), (5, "random")])
def test_a_thumbnail_needs_room_for_the_channels(number, start):
    changes = channels.follow({**RECIPE, "data": {"channels": number}}, typed=())
    assert changes.get("model.start") == start
    assert changes["model.loss.pixel"] == {"_target_": "torch.nn.MSELoss"}
    wish = channels.follow({**RECIPE, "data": {"channels": number}}, typed={"model.start"})
    assert "model.start" not in wish  # `start_as_thumbnail` then says why it cannot


def test_a_typed_colour_loss_is_for_rgb_alone():
    with pytest.raises(UserError, match=r"model\.loss\.pixel\.chroma: ColourMSE knows .* RGB, and the images have 1"):
        channels.follow({**RECIPE, "data": {"channels": 1}}, typed={"model.loss.pixel.chroma"})


def test_stage_2_and_data_sets_without_the_key_are_left_alone():
    assert channels.follow({"stage": "diffusion", "data": {"channels": 5}}, typed=()) == {}
    assert channels.follow(RECIPE, typed=()) == {}
