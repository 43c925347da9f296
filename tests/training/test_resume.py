"""What was interrupted continues as if nothing had happened; what cannot be continued is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ldm_lab.training.schedules import CosineWithWarmup, LinearWithWarmup
from ldm_lab.utils.reading import LoadError, read_yaml
from tests.data.pictures import save
from tests.helpers import assert_close_relative
from tests.trained import assert_equal, copy, final_weights, last_checkpoint, metrics, train

ROOT = Path(__file__).resolve().parents[2]
RECIPE, STAGE_1, STAGE_2 = (f"experiment=celebahq{stage}" for stage in ("", "/autoencoder", "/diffusion"))
STAGES = ("autoencoder", "diffusion")
MEASURED = "perf/"  # metrics that are matters of the clock and the machine

# train/loss of the ten steps of each stage of `experiment=celebahq debug=tiny`, which is of eight steps and continued
# with `max_images=80`; recorded with torch 2.14 on a CPU. A change that is not meant to change training must
# reproduce them.
WHOLE = "model.loss.discriminator.channels=64"  # as users have it; other tests train with a smaller one
LOSSES = {
    "autoencoder": [2.611, 2.66223, 2.37933, 2.4272, 2.14183, 2.11205, 2.2913, 2.18853, 1.91933, 1.91153],
    "diffusion": [0.9732, 1.01535, 1.00605, 0.95118, 0.96893, 0.9823, 1.0012, 0.95915, 1.02508, 0.98183],
}


def interrupt(stage, images, **more):
    """Overrides that send a signal, Ctrl-C unless told, to the step which begins at `images` images of a stage."""
    arguments = {"_target_": "tests.callbacks.Signal", "stage": stage, "images": images, **more}
    return ["plugins=[tests]", *[f"+callbacks.interrupt.{key}={value}" for key, value in arguments.items()]]


def status(stage_folder):
    return json.loads((stage_folder / "status.json").read_text())


def without_stage_2(tiny_runs, tmp_path):
    """A copy of a run that has only its autoencoder."""
    runs = copy(tiny_runs, tmp_path)
    shutil.rmtree(runs / "celebahq/diffusion")
    return runs


def assert_same_training(stage_folder, reference):
    assert_equal(final_weights(stage_folder), final_weights(reference))
    states = [last_checkpoint(folder) for folder in (stage_folder, reference)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ldm_lab"):
        assert_equal(states[0][part], states[1][part], part)
    rows = [
        {n: {k: v for k, v in row.items() if not k.startswith(MEASURED)} for n, row in metrics(f).items()}
        for f in (stage_folder, reference)
    ]
    assert rows[0] == rows[1]


def test_losses_are_those_that_were_recorded(tmp_path):
    train(tmp_path, RECIPE, WHOLE)
    train(tmp_path, STAGE_2, "max_images=80")
    train(tmp_path, STAGE_1, "max_images=80", WHOLE)
    first, second = ([row["train/loss"] for row in metrics(tmp_path / "celebahq" / stage).values()] for stage in STAGES)
    assert second == pytest.approx(LOSSES["diffusion"], rel=1e-3)
    assert first[:3] == pytest.approx(LOSSES["autoencoder"][:3], rel=1e-3)
    assert first == pytest.approx(LOSSES["autoencoder"], rel=2e-2)  # two players enlarge what is lost in rounding


def test_an_interrupted_run_ends_as_an_undisturbed_one(tiny_runs, tmp_path, capsys):
    """In steps with a validation to come and without, in the last one, in validations; each time the same command."""
    folder = tmp_path / "celebahq"
    for stage, images, where, number in (
        ("autoencoder", 24, "train", signal.SIGINT),  # the step has a validation to come
        ("autoencoder", 40, "train", signal.SIGTERM),
        ("autoencoder", 56, "train", signal.SIGINT),  # the last step
        ("diffusion", 32, "validation", signal.SIGUSR1),
        ("diffusion", 40, "train", signal.SIGUSR1),
        ("diffusion", 64, "validation", signal.SIGTERM),  # the last one
    ):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path, RECIPE, *interrupt(stage, images, where=where, number=int(number)))
        ends = images + 8 * (where == "train")
        assert stop.value.code == 128 + number
        assert f"stopped and saved at {ends} images; the same command continues" in capsys.readouterr().out
        assert last_checkpoint(folder / stage)["ldm_lab"]["images_seen"] == ends
        assert status(folder / stage)["finished"] is False
        assert (folder / "diffusion").exists() is (stage == "diffusion")
    train(tmp_path, RECIPE)
    assert f"continuing {folder}/diffusion at 64 of 64 images" in capsys.readouterr().out
    for stage in STAGES:
        assert_same_training(folder / stage, tiny_runs / "celebahq" / stage)
        hours = [row["perf/device_hours"] for row in metrics(folder / stage).values()]
        assert hours == sorted(hours)  # counted on


def ask(stage, images, where="train"):
    """Overrides with a callback that asks for an end in the step or validation at `images` images of a stage."""
    arguments = {"_target_": "tests.callbacks.Ask", "stage": stage, "images": images, "where": where}
    return ["plugins=[tests]", *[f"+callbacks.ask.{key}={value}" for key, value in arguments.items()]]


NO_TIME = ["+trainer.max_time=00:00:00:00"]  # a start takes one step
THRESHOLD = [  # falls below it in the first validation
    f"+callbacks.early.{setting}"
    for setting in (
        "_target_=lightning.pytorch.callbacks.EarlyStopping", "monitor=val/loss", "stopping_threshold=1e3",
    )
]  # fmt: skip


def test_a_training_that_a_callback_ends_is_saved_and_continues(tiny_runs, tmp_path, capsys):
    """The second stage does not begin on an unfinished first; in the end all is as if nothing had happened."""
    folder = tmp_path / "celebahq"
    for stage, overrides, ends, why in (
        ("autoencoder", NO_TIME, 8, "the time of trainer.max_time is over"),
        ("autoencoder", NO_TIME, 16, "the time of trainer.max_time is over"),
        ("autoencoder", ask("autoencoder", 32), 40, "a callback has set trainer.should_stop"),
        ("diffusion", ask("diffusion", 0, "setup"), 8, "a callback has set trainer.should_stop"),
        ("diffusion", THRESHOLD, 32, r"EarlyStopping: Stopping threshold reached: val/loss = [\d.]+ < 1000.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path, RECIPE, *overrides)
        assert stop.value.code == 75
        line = capsys.readouterr().out.splitlines()[-1]
        here = rf"with experiment=\.\.\./{stage} and max_images={ends} it finishes here"
        assert re.fullmatch(rf"stopped at {ends} images: {why}; the same command continues, {here}", line), line
        assert last_checkpoint(folder / stage)["ldm_lab"]["images_seen"] == ends
        assert status(folder / stage)["finished"] is False
        assert (folder / "diffusion").exists() is (stage == "diffusion")
    train(tmp_path, RECIPE, *THRESHOLD)  # in the last validation it ends anyway
    assert "Done. Next: " in capsys.readouterr().out
    for stage in STAGES:
        assert_same_training(folder / stage, tiny_runs / "celebahq" / stage)


def test_a_stopped_training_can_be_finished_where_it_stands(tmp_path, capsys):
    folder = tmp_path / "celebahq/autoencoder"
    with pytest.raises(SystemExit):
        train(tmp_path, RECIPE, *ask("autoencoder", 16))
    for length in (16, 32):
        with pytest.raises(ValueError, match=r"or finished where it stands \(max_images=24\), not shortened"):
            train(tmp_path, STAGE_1, f"max_images={length}")
    loss = train(tmp_path, STAGE_1, "max_images=24")
    assert "Done. Next: python train.py experiment=celebahq/diffusion" in capsys.readouterr().out
    assert status(folder) | {"finished": True, "max_images": 24, "val/loss": loss} == status(folder)
    assert final_weights(folder)
    assert list(metrics(folder)) == [8, 16, 24]
    with pytest.raises(ValueError, match=r"a run can be continued, not shortened"):
        train(tmp_path, STAGE_1, "max_images=16")
    with pytest.raises(SystemExit):  # and trained on
        train(tmp_path, STAGE_1, *ask("autoencoder", 24))
    assert last_checkpoint(folder)["ldm_lab"]["images_seen"] == 32


def test_a_second_ctrl_c_stops_at_once_and_loses_no_more_than_an_interval(tiny_runs, tmp_path, capsys):
    runs = without_stage_2(tiny_runs, tmp_path)
    with pytest.raises(SystemExit) as stop:
        train(runs, STAGE_2, *interrupt("diffusion", 40, times=2))
    assert stop.value.code != 0
    stale = (
        runs / "celebahq/diffusion/checkpoints/.last.ckpt.1.tmp"
    )  # as a process leaves it that is killed while saving
    stale.write_bytes(b"half a file")
    train(runs, STAGE_2)
    assert "at 32 of 64 images" in capsys.readouterr().out
    assert not stale.exists()
    assert_same_training(runs / "celebahq/diffusion", tiny_runs / "celebahq/diffusion")


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_whose_tensors_lie_otherwise_goes_on_alike(tiny_runs, tmp_path, stage):
    """As one from a device on which channels lie outermost: fused optimizers would mix numbers up, silently."""
    runs = without_stage_2(tiny_runs, tmp_path)
    if stage == "autoencoder":
        shutil.rmtree(runs / "celebahq")
    recipe = f"experiment=celebahq/{stage}"
    with pytest.raises(SystemExit):
        train(runs, recipe, *interrupt(stage, 24))
    path, turned = runs / "celebahq" / stage / "checkpoints/last.ckpt", []

    def outermost(tensor):
        turned.append(not tensor.is_contiguous())
        return tensor.contiguous()

    state = torch.load(path, weights_only=True)
    for part in ("state_dict", "optimizer_states"):
        state[part] = tree_map_only(torch.Tensor, outermost, state[part])
    assert sum(turned) > 10
    torch.save(state, path)
    train(runs, recipe)
    assert_same_training(runs / "celebahq" / stage, tiny_runs / "celebahq" / stage)


def test_more_images_continue_even_over_a_power_cut_at_the_end(tiny_runs, tmp_path):
    runs = copy(tiny_runs, tmp_path)
    folder = runs / "celebahq/diffusion"
    scores = status(folder)
    cut = ("plugins=[tests]", "+callbacks.cut._target_=tests.callbacks.FailAtTheEnd")
    with pytest.raises(RuntimeError, match="power cut"):
        train(runs, STAGE_2, "max_images=80", *cut)
    assert status(folder)["finished"] is False
    assert_equal(final_weights(folder), final_weights(tiny_runs / "celebahq/diffusion"))  # what was there stays
    train(runs, STAGE_2, "max_images=80")
    rows = metrics(folder)
    assert rows[80]["val/loss"] == pytest.approx(status(folder)["val/loss"], rel=1e-5)
    assert status(folder)["val/loss"] < scores["val/loss"]
    state = last_checkpoint(folder)["state_dict"]
    for key, value in final_weights(runs / "celebahq/diffusion")["unet/diffusion_pytorch_model.safetensors"].items():
        assert torch.equal(value, state[f"ema.model.{key}"]), key
    assert (runs / "celebahq/unet/config.json").samefile(folder / "final/unet/config.json")


def test_a_stage_2_keeps_its_autoencoder(tiny_runs, tmp_path, capsys):
    runs = copy(tiny_runs, tmp_path)
    train(runs, STAGE_1, "max_images=80")
    advice = f"experiment=celebahq/diffusion debug=tiny paths.runs={runs}"
    assert capsys.readouterr().out.splitlines()[-1] == f"Done. Next: python train.py {advice}"
    last = runs / "celebahq/diffusion/checkpoints/last.ckpt"
    for length in ("max_images=64", "max_images=72"):  # finished, and to be continued
        with pytest.raises(ValueError, match="celebahq/diffusion was trained on another autoencoder") as error:
            train(runs, STAGE_2, length)
    advice = f"autoencoder={last}"
    assert str(error.value).endswith(f"choose another name=, or go on with its own, {advice}")
    train(runs, STAGE_2, "max_images=72", advice)
    assert metrics(runs / "celebahq/diffusion")[72].keys() >= {"train/loss", "val/loss"}


def test_accumulation_and_a_given_autoencoder_change_nothing(tiny_runs, tmp_path, capsys):
    train(tmp_path, RECIPE, f"autoencoder={tiny_runs}/celebahq", "data.batch_size=4")
    assert f"autoencoder={tiny_runs}/celebahq is given: its stage is skipped" in capsys.readouterr().out
    assert not (tmp_path / "celebahq/autoencoder").exists()
    one, other = (final_weights(runs / "celebahq/diffusion") for runs in (tmp_path, tiny_runs))
    assert_equal(one["vqvae/diffusion_pytorch_model.safetensors"], other["vqvae/diffusion_pytorch_model.safetensors"])
    for key, value in other["unet/diffusion_pytorch_model.safetensors"].items():
        assert_close_relative(
            one["unet/diffusion_pytorch_model.safetensors"][key], value, 1e-3
        )  # Adam enlarges rounding


def test_another_schedule_of_the_learning_rate_is_another_setting(tiny_runs, tmp_path, capsys):
    """With `resume=force` the run says which rate it has had, by the schedule that it was started with."""
    runs = copy(tiny_runs, tmp_path, "avatars")
    longer, warmup = ("experiment=avatars/autoencoder", "max_images=72"), "model.schedule.warmup_images"
    with pytest.raises(ValueError, match=rf"started with other settings: {warmup}: 160 -> 0\. Choose"):
        train(runs, *longer, f"{warmup}=0")
    capsys.readouterr()
    cosine = "model.schedule._target_=ldm_lab.training.schedules.CosineWithWarmup"
    train(runs, *longer, f"{warmup}=0", "resume=force", cosine, "+model.schedule.final=0.5")
    rate = read_yaml(runs / "avatars/autoencoder/config.yaml")["model"]["optimizer"]["lr"]
    was, now = (rate * schedule(64) for schedule in (LinearWithWarmup(160, 64), CosineWithWarmup(0, 72, final=0.5)))
    change = f"{was:.2g} here before, goes on at {now:.2g} and ends at {rate / 2:.2g}"
    assert f"max_images 64 -> 72: the learning rate, {change}" in capsys.readouterr().out


def test_force_goes_on_with_the_new_settings(tiny_runs, tmp_path):
    runs = copy(tiny_runs, tmp_path)
    train(runs, STAGE_2, "max_images=72", "model.optimizer.lr=0.5e-3", "resume=force")
    rows = metrics(runs / "celebahq/diffusion")
    assert [rows[n]["train/lr"] for n in (64, 72)] == [9.6e-5, 0.5e-3]
    train(runs, STAGE_2, "max_images=80", "model.optimizer.lr=0.5e-3")  # they are the run's own now
    assert metrics(runs / "celebahq/diffusion")[80]["train/lr"] == 0.5e-3


def test_data_is_known_by_its_files_and_not_by_its_path(tmp_path):
    for number in range(12):
        save(tmp_path / f"photos/{number}.png", size=(32 + number, 40))
    command = ("experiment=celebahq/autoencoder", "callbacks=none", "data.val_fraction=0.2")
    train(tmp_path, *command, "max_images=16", f"data.root={tmp_path}/photos")
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere")
    train(tmp_path, *command, "max_images=24", f"data.root={tmp_path}/elsewhere")
    (tmp_path / "elsewhere/3.png").unlink()
    save(tmp_path / "elsewhere/new.png")
    with pytest.raises(ValueError, match=r"other images: 1 added and 1 missing of 12 .* or resume=force"):
        train(tmp_path, *command, "max_images=32", f"data.root={tmp_path}/elsewhere")
    train(tmp_path, *command, "max_images=32", f"data.root={tmp_path}/elsewhere", "resume=force")
    train(tmp_path, *command, "max_images=40", f"data.root={tmp_path}/elsewhere")  # they are the run's own now


def test_a_checkpoint_of_something_else_is_refused(tiny_runs, tmp_path):
    runs = copy(tiny_runs, tmp_path)
    more = (STAGE_2, "max_images=72")
    with pytest.raises(LoadError, match=r"of another network .*choose another name=") as error:
        train(runs, *more, "model.unet.layers_per_block=2", "resume=force")
    assert "\n" not in str(error.value)
    last = runs / "celebahq/diffusion/checkpoints/last.ckpt"
    last.unlink()
    shutil.copy(runs / "celebahq/autoencoder/checkpoints/last.ckpt", last)
    with pytest.raises(LoadError, match="of stage 'autoencoder' cannot continue stage 'diffusion'"):
        train(runs, *more, "resume=force")
    last.unlink()
    last.write_bytes(b"not a checkpoint")
    last.with_name("previous.ckpt").unlink()
    with pytest.raises(LoadError, match=r"last\.ckpt: damaged .* no whole checkpoint is left; put one there, or"):
        train(runs, *more, "resume=force")


def test_a_start_that_failed_binds_nobody(tmp_path):
    """Nothing was trained: the next start may have other settings."""
    failing = ("weightless._target_=ldm_lab.losses.perceptual.LPIPS", "+weightless.weights=/nowhere")
    with pytest.raises(ValueError, match="weights=/nowhere"):
        train(tmp_path, STAGE_1, *failing)
    assert (tmp_path / "celebahq/autoencoder/config.yaml").is_file()
    train(tmp_path, STAGE_1, "max_images=8")
    assert sorted(metrics(tmp_path / "celebahq/autoencoder")) == [8]


def test_a_lost_result_is_exported_again(tiny_runs, tmp_path):
    runs = copy(tiny_runs, tmp_path)
    for stage in STAGES:
        shutil.rmtree(runs / "celebahq" / stage / "final")
    train(runs, RECIPE)
    for stage in STAGES:
        assert_same_training(runs / "celebahq" / stage, tiny_runs / "celebahq" / stage)


@pytest.mark.soak
def test_ctrl_c_in_a_terminal_reaches_the_loaders_too(tmp_path):
    command = [sys.executable, "train.py", "debug=tiny", "logger=csv", "callbacks=none", f"paths.runs={tmp_path}"]
    process = subprocess.Popen(
        [*command, "max_images=1000000", "data.num_workers=2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stage = tmp_path / "avatars/autoencoder"
    deadline = time.monotonic() + 60
    while not (stage / "checkpoints/last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert re.search(r"stopped and saved at [\d,]+ images; the same command continues", output), output
