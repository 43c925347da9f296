"""What becomes of what a constructor says: the user's arguments are one line, faults of code keep their traceback."""

import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm_lab.config.build import build
from ldm_lab.config.files import ConfigError
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.signatures import fits

HERE = "tests.config.test_building"
PARAMETER = torch.nn.Parameter(torch.zeros(1))


class PlugIn:
    """A user's class."""

    def __init__(self, size, *, word="1", part=None):
        if size < 0:
            raise UserError(f"size={size}: must not be negative")
        self.size, self.word, self.part = size, int(word), part


def make(target, where="callbacks.mine", **settings):
    return build(OmegaConf.create({"_target_": target, **settings}), where)


def refusal(target, **settings):
    with pytest.raises(ConfigError) as error:
        make(target, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nested_nodes_lists_and_partials():
    inner = {"_target_": f"{HERE}.PlugIn", "size": 1}
    found = make(f"{HERE}.PlugIn", size=2, part=[inner, {"again": {**inner, "_partial_": True, "word": "7"}}])
    first, second = found.part[0], found.part[1]["again"](size=3)
    assert (found.size, first.size, first.word, second.size, second.word) == (2, 1, 1, 3, 7)
    assert build(OmegaConf.create({"_target_": f"{HERE}.PlugIn", "_args_": [5]}), "x").size == 5
    assert build(None, "x") is None
    assert build(OmegaConf.create({**inner, "_partial_": True}), "x", word="3").word == 3


def test_a_part_takes_the_place_of_an_entry():
    node = OmegaConf.create({"_target_": f"{HERE}.PlugIn", "size": 1, "part": {"_target_": "no.where"}})
    assert build(node, "x", part=PARAMETER).part is PARAMETER


def test_arguments_that_a_signature_does_not_have_are_one_line():
    assert refusal(f"{HERE}.PlugIn", size=1, colour="red") == (
        "callbacks.mine: PlugIn: got an unexpected keyword argument 'colour'; it takes size, word, part"
    )
    assert refusal(f"{HERE}.PlugIn").startswith("callbacks.mine: PlugIn: missing a required argument: 'size'")
    assert "callbacks.mine.part.0: PlugIn" in refusal(f"{HERE}.PlugIn", size=1, part=[{"_target_": f"{HERE}.PlugIn"}])


def test_arguments_that_pass_through_to_a_base_class_are_looked_at_too():
    loss, distance = (
        "ldm_lab.losses.autoencoder.AutoencoderLoss",
        {"_target_": "ldm_lab.losses.perceptual.MultiScaleL1"},
    )
    assert "unexpected keyword argument 'colour'" in refusal(loss, perceptual=distance, colour=1)
    assert "missing a required argument: 'perceptual'" in refusal(loss)
    assert refusal(loss, perceptual=distance, perceptual_weight="much").endswith("='much': must be a number")
    for module in ("autoencoder_module.AutoencoderModule", "diffusion_module.DiffusionModule"):
        assert "unexpected keyword argument 'colour'" in refusal(f"ldm_lab.training.{module}", colour=1)
    assert "missing a required argument" in refusal("ldm_lab.training.diffusion_module.DiffusionModule")


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("ldm_lab.models.codebook.CodebookUsage", {"num_codes": -1}),
        ("ldm_lab.models.discriminator.PatchDiscriminator", {"channels": -1}),
        ("ldm_lab.models.discriminator.PatchDiscriminator", {"num_layers": 0}),
        ("torch.optim.Adam", {"params": [], "betas": []}),
    ],
)
def test_a_number_that_cannot_be_is_one_line(target, settings):
    assert refusal(target, **settings).startswith("callbacks.mine: ")


def test_a_user_error_of_a_plug_in_is_one_line():
    assert refusal(f"{HERE}.PlugIn", size=-1) == "callbacks.mine: size=-1: must not be negative"


@pytest.mark.parametrize(
    ("settings", "kind"), [({"size": 1, "word": "x"}, ValueError), ({"size": "large"}, TypeError)], ids=str
)
def test_a_fault_of_a_plug_in_is_itself_and_says_what_was_built(settings, kind):
    inner = {"_target_": f"{HERE}.PlugIn", **settings}
    with pytest.raises(kind) as error:
        make(f"{HERE}.PlugIn", where="model.loss", size=1, part=inner)
    assert type(error.value) is kind
    assert error.traceback[-1].path.name == "test_building.py"
    assert error.value.doing == ["building model.loss.part"]
    assert error.value.__cause__ is None


def test_what_torch_and_lightning_refuse_is_the_user_s():
    optimizer = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": -1.0}
    module = make(f"{HERE}.PlugIn", where="model", size=1, part=optimizer)
    with pytest.raises(ConfigError, match=r"^model\.part: Invalid learning rate: -1\.0$"):
        module.part(params=[PARAMETER])  # when the training makes it
    stopping = "lightning.pytorch.callbacks.EarlyStopping"
    assert "mode" in refusal(stopping, monitor="val/loss", mode="sideways")
    assert "unexpected keyword argument 'lur'" in refusal("torch.optim.SGD", lur=1)


def test_the_trainer_refuses_in_one_line():
    ours = "ldm_lab.training.trainer.Trainer"
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    assert "unexpected keyword argument 'max_step'" in refusal(ours, **settings, max_step=3)
    assert "gradient_clip_val" in refusal(ours, **settings, gradient_clip_val="much")


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (f"{HERE}.Nothing", "'Nothing'"),
        ("tests.no_such_module.Class", "No module named 'tests.no_such_module'"),
        ("no_such_package.Class", "No module named 'no_such_package'"),
    ],
)
def test_a_target_that_is_not_there_is_one_line(target, line):
    assert line in refusal(target)


@pytest.mark.parametrize(
    ("source", "kind"),
    [("import a_package_that_is_missing", ModuleNotFoundError), ("1 +", SyntaxError), ("int('x')", ValueError)],
)
def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch, source, kind):
    (tmp_path / "broken_plug_in.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind) as error:
        make("broken_plug_in.Class")
    assert error.value.doing == ["importing broken_plug_in for callbacks.mine"]
    sys.modules.pop("broken_plug_in", None)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("levels", "two", "levels='two': must be a whole number"),
        ("levels", 2.5, "levels=2.5: must be a whole number"),
        ("levels", None, "levels=None: must be a whole number"),
        ("levels", True, "levels=True: must be a whole number"),
        ("levels", [2], "levels=[2]: must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_one_line(key, value, words):
    assert refusal("ldm_lab.losses.perceptual.MultiScaleL1", **{key: value}) == f"callbacks.mine: {words}"


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (1, float, True),
        (True, float, False),
        (None, float | None, True),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ("ab", list[str], False),
        ({}, dict[str, int], True),
        ("x", torch.nn.Module, False),
        (PARAMETER, int, True),
    ],
)
def test_types(value, hint, fit):
    assert fits(value, hint) is fit
