"""Numbers gone wrong: they are named, their images are listed, and nothing of them is kept."""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from ldm_lab.training.callbacks.not_finite import NotFinite
from ldm_lab.training.planning import memory
from tests.callbacks import Signal
from tests.trained import assert_equal, final_weights, last_checkpoint, metrics, train
from tests.training.test_ddp import TWO, command

CLOCK = "perf/"


class Poison(Callback):
    """Puts `value` into the images at some positions of the stream, or into a gradient of the step that they end."""

    def __init__(self, positions, parameter=None, value=math.nan):
        self.positions, self.parameter, self.value = set(positions), parameter, value
        self.now = False
        self.every = "day"  # a callback of a user's may call anything so

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        hit = [n for n, position in enumerate(batch["position"].tolist()) if position in self.positions]
        self.now = bool(hit)
        if self.now and not self.parameter:
            batch["moments" if "moments" in batch else "image"][hit] = self.value

    def on_after_backward(self, trainer, module):
        if self.now and self.parameter:
            module.get_parameter(self.parameter).grad[0] = self.value


class Witness(Callback):
    """Notes after which steps weights, averages, statistics and moments were those from before it."""

    def __init__(self, folder):
        self.path, self.before, self.unchanged = f"{folder}/unchanged.json", None, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.images_seen % trainer.datamodule.global_batch_size == 0:
            now = copy.deepcopy((module.state_dict(), trainer.optimizers[0].state_dict()["state"]))
            if self.before is not None:
                try:
                    assert_equal(self.before, now)
                    self.unchanged.append(module.images_seen)
                except AssertionError:
                    pass
            self.before = now

    def on_train_end(self, trainer, module):
        with open(self.path, "w") as file:
            json.dump(self.unchanged, file)


class TooMuch(Callback):
    """Asks for a million gigabytes in the fourth step."""

    def on_before_backward(self, trainer, module, loss):
        if module.images_seen == 32:
            torch.empty(2**50)


def with_callbacks(**callbacks):
    """Overrides that add callbacks of this file."""
    lines = ["plugins=[tests]"]
    for name, settings in callbacks.items():
        lines.append(f"+callbacks.{name.lower()}._target_=tests.training.test_numbers.{name}")
        lines += [f"+callbacks.{name.lower()}.{key}={value}" for key, value in settings.items()]
    return lines


@pytest.fixture
def stage(request, tiny_runs, tmp_path):
    """One stage of celebahq in `tmp_path`: its name, the command, its folder, and that of the same, undisturbed."""
    name = request.param
    given = [f"autoencoder={tiny_runs}/celebahq"] if name == "diffusion" else []
    there = f"celebahq/{name}"
    return name, [f"experiment={there}", *given], tmp_path / there, tiny_runs / there


BOTH = pytest.mark.parametrize("stage", ["autoencoder", "diffusion"], indirect=True)
HEAVY_FIRST = pytest.mark.parametrize(
    "stage", [pytest.param("autoencoder", marks=pytest.mark.soak), "diffusion"], indirect=True
)
STAGE_2 = pytest.mark.parametrize("stage", ["diffusion"], indirect=True)


def assert_same_state(folder, reference):
    states = [last_checkpoint(one) for one in (folder, reference)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ldm_lab"):
        assert_equal(states[0][part], states[1][part], part)


# --- stop


@HEAVY_FIRST
def test_a_poisoned_image_ends_the_training_and_nothing_of_it_is_kept(stage, tmp_path):
    """Checkpoints are due at every 16 images; the step of images 40 to 48, the worst, is both poisoned and due."""
    name, command, folder, undisturbed = stage
    with pytest.raises(
        ValueError, match=f"^step 6 of stage {name}, images 40 to 48: not finite: loss, gradient of"
    ) as e:
        train(tmp_path, *command, *with_callbacks(Poison={"positions": [45]}))
    networks = {"autoencoder": "autoencoder, gradient of discriminator", "diffusion": "unet"}
    assert f"loss, gradient of {networks[name]}; " in str(e.value)
    path = folder / "not_finite/000000048.json"
    assert str(path) in str(e.value)
    assert "trainer.on_nan=skip" in str(e.value)
    (batch,) = json.loads(path.read_text())["batches"]
    assert batch["position"] == list(range(40, 48))
    assert len(batch["index"]) == 8
    assert (batch["rank"], batch["loss_finite"]) == (0, False)
    assert last_checkpoint(folder)["ldm_lab"]["images_seen"] == 32
    assert max(metrics(folder)) == 40
    train(tmp_path, *command)  # without the poison, from there
    assert_equal(final_weights(folder), final_weights(undisturbed))
    assert_same_state(folder, undisturbed)


@pytest.mark.parametrize(
    ("stage", "parameter", "found", "setting"),
    [
        ("diffusion", "unet.conv_in.weight", "gradient of unet", "trainer.gradient_clip_val=1"),
        ("autoencoder", "autoencoder.encoder.conv_in.bias", "gradient of autoencoder", "trainer.precision=bf16-mixed"),
        ("autoencoder", "loss.discriminator.main.0.weight", "gradient of discriminator", "data.batch_size=4"),
    ],
    indirect=["stage"],
)
def test_it_is_said_of_which_network_the_gradient_is(stage, parameter, found, setting, tmp_path):
    _, command, folder, _ = stage
    poison = {"positions": [3], "parameter": parameter, "value": math.inf}
    with pytest.raises(ValueError, match=f"^step 1 of .*: not finite: {found}; its images are listed in"):
        train(tmp_path, *command, setting, *with_callbacks(Poison=poison))
    assert json.loads((folder / "not_finite/000000008.json").read_text())["not_finite"] == [found]
    assert not (folder / "checkpoints/last.ckpt").exists()


def test_files_are_named_where_the_images_are_files(tmp_path):
    from PIL import Image

    for n in range(24):
        Image.new("RGB", (32, 32), (n, n, n)).save(tmp_path / f"{n}.png")
    command = ["experiment=folder/autoencoder", "data=image_folder", f"data.root={tmp_path}", "name=mine"]
    with pytest.raises(ValueError, match="step 1 of"):
        train(tmp_path, *command, *with_callbacks(Poison={"positions": [0]}))
    (batch,) = json.loads((tmp_path / "mine/autoencoder/not_finite/000000008.json").read_text())["batches"]
    assert len({*batch["file"]}) == 8
    assert all((tmp_path / name).is_file() for name in batch["file"])


# --- skip


@HEAVY_FIRST
def test_a_skipped_step_changes_nothing_and_a_resumed_run_repeats_it(stage, tmp_path, capsys):
    """One bad micro-batch of four spoils the step of images 24 to 32; Ctrl-C during the step after it."""
    name, command, folder, _ = stage
    settings = [*command, "trainer.on_nan=skip", "data.batch_size=2", "trainer.gradient_clip_val=1"]
    bad = {"Poison": {"positions": [27]}}
    train(tmp_path, *settings, *with_callbacks(**bad, Witness={"folder": tmp_path}))
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"skipped step 4 of stage {name}, images 24 to 32: not finite: loss, ") == 1
    assert json.loads((tmp_path / "unchanged.json").read_text()) == [32]
    batches = json.loads((folder / "not_finite/000000032.json").read_text())["batches"]
    assert [(b["position"], b["loss_finite"]) for b in batches] == [
        ([24, 25], True), ([26, 27], False), ([28, 29], True), ([30, 31], True),
    ]  # fmt: skip
    rows = metrics(folder)
    assert [row["train/skipped_steps"] for row in rows.values()] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert math.isnan(rows[32]["train/loss"])
    assert all(math.isfinite(rows[images]["train/loss"]) for images in rows if images != 32)
    assert all(value.isfinite().all() for value in last_checkpoint(folder)["state_dict"].values())

    again = [*settings, "name=again", *with_callbacks(**bad)]
    signal = {"stage": name, "images": 32}
    with pytest.raises(SystemExit):
        train(
            tmp_path,
            *again,
            *[
                f"+callbacks.signal.{k}={v}"
                for k, v in {"_target_": f"tests.callbacks.{Signal.__name__}", **signal}.items()
            ],
        )
    train(tmp_path, *again)
    other = tmp_path / "again" / name
    assert_equal(final_weights(other), final_weights(folder))
    assert_same_state(other, folder)
    pairs = zip(metrics(other).values(), rows.values(), strict=True)
    for one, two in pairs:
        one, two = ({k: str(v) for k, v in row.items() if not k.startswith(CLOCK)} for row in (one, two))
        assert one == two


@STAGE_2
def test_too_many_in_a_row_end_the_training(stage, tmp_path, monkeypatch):
    """Also where they are spread over two starts."""
    _, command, folder, _ = stage
    monkeypatch.setattr(NotFinite, "MOST_IN_A_ROW", 3)
    poison = with_callbacks(Poison={"positions": [9, 16, 40, 48, 56]})
    with pytest.raises(ValueError, match=r"^step 8 .*000000064\.json\. The last 3 steps were like this\. Nothing"):
        train(tmp_path, *command, "trainer.on_nan=skip", *poison)
    assert [path.name for path in sorted(folder.glob("not_finite/*"))] == [
        f"{images:09d}.json" for images in (16, 24, 48, 56, 64)
    ]
    assert last_checkpoint(folder)["ldm_lab"]["images_seen"] == 48
    with pytest.raises(ValueError, match=r"^step 8 .* The last 3 steps"):
        train(tmp_path, *command, "trainer.on_nan=skip", *poison)


def test_other_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.on_nan=ignore: must be stop or skip"):
        train(tmp_path, "experiment=avatars/autoencoder", "trainer.on_nan=ignore")


@pytest.mark.soak
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_all_ranks_decide_alike(tiny_runs, tmp_path, on_nan):
    """The bad image is one of rank 1."""
    dump = ["+callbacks.dump._target_=tests.callbacks.DumpWeights", f"+callbacks.dump.folder={tmp_path}/ranks"]
    done = command(
        *TWO, f"paths.runs={tmp_path}", f"autoencoder={tiny_runs}/celebahq", "experiment=celebahq/diffusion",
        f"trainer.on_nan={on_nan}", *dump, *with_callbacks(Poison={"positions": [21]}),
    )  # fmt: skip
    folder = tmp_path / "celebahq/diffusion"
    batches = json.loads((folder / "not_finite/000000024.json").read_text())["batches"]
    assert [(b["rank"], b["position"], b["loss_finite"]) for b in batches] == [
        (0, [16, 17, 18, 19], True), (1, [20, 21, 22, 23], False),
    ]  # fmt: skip
    if on_nan == "stop":
        assert done.returncode == 1
        assert done.stderr.count("error: ") == 1, done.stderr
        assert "error: step 3 of stage diffusion, images 16 to 24: not finite: loss, gradient of unet" in done.stderr
        assert last_checkpoint(folder)["ldm_lab"]["images_seen"] == 16
    else:
        assert done.returncode == 0, done.stderr
        assert_equal(*(torch.load(tmp_path / f"ranks/diffusion_{rank}.pt") for rank in (0, 1)))
        assert metrics(folder)[64]["train/skipped_steps"] == 1


# --- what is logged of a step


@BOTH
def test_the_logged_loss_is_the_mean_over_the_step(stage, tmp_path):
    """Without the discriminator, whose normalisation sees other batches."""
    name, command, folder, undisturbed = stage
    if name == "autoencoder":
        command = [*command, "model.loss.discriminator=null"]
        train(tmp_path, *command, "name=whole")
        undisturbed = tmp_path / "whole/autoencoder"
    train(tmp_path, *command, "data.batch_size=2")
    rows, expected = metrics(folder), metrics(undisturbed)
    assert rows[8]["train/loss"] == pytest.approx(expected[8]["train/loss"], rel=1e-5)
    for images, row in expected.items():
        assert rows[images]["train/loss"] == pytest.approx(row["train/loss"], rel=5e-3)


# --- memory


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "data.batch_size=8 is too much for the device: use 4, or auto"),
        ({"batch_size": 3, "global_batch_size": 6}, "data.batch_size=3 is too much for the device: use 1, or auto"),
        (
            {"batch_size": 1},
            "data.image_size=[64,32], even with data.batch_size=1: lower it, or choose smaller networks",
        ),
        ({"training": False}, "data.val_batch_size=64 is too much for the device: use 32"),
        ({"training": False, "val_batch_size": None}, "data.val_batch_size=8 is too much for the device: use 4"),
    ],
)
def test_out_of_memory_names_the_key_to_lower(settings, advice):
    module = SimpleNamespace(stage="diffusion", training=settings.pop("training", True))
    data = SimpleNamespace(
        **{"batch_size": 8, "global_batch_size": 8, "val_batch_size": 64, "image_size": (64, 32)} | settings
    )
    data.device_batch_size = lambda world_size: data.batch_size
    with pytest.raises(ValueError, match=re.escape(advice)), memory.explained(module, data, world_size=1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="another"), memory.explained(module, data, world_size=1):
        raise RuntimeError("another")


@STAGE_2
def test_out_of_memory_ends_with_one_line_and_the_last_checkpoint_there(stage, tmp_path):
    _, command, folder, _ = stage
    expected = (
        "^out of memory in stage diffusion: data.batch_size=8 is too much .*: use 4, or auto;.*can't allocate memory"
    )
    with pytest.raises(ValueError, match=expected):
        train(tmp_path, *command, *with_callbacks(TooMuch={}))
    assert last_checkpoint(folder)["ldm_lab"]["images_seen"] == 16
