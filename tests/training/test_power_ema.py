"""Averages for a choice after training: reconstruction, exact resume, the command, `ema=`, refusals."""

import json
import re
import shutil
from itertools import chain

import pytest
import torch
from torch import nn

import sample
from ldm_lab import LDMPipeline
from ldm_lab.checkpoints import averages, locate
from ldm_lab.config import kinds
from ldm_lab.config.compose import Recipe, plain
from ldm_lab.config.stages import try_training
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.tools import ema
from ldm_lab.training.power_ema import PowerEMA
from ldm_lab.utils.power_profiles import Profile, fit
from tests.helpers import assert_close_relative
from tests.trained import assert_equal, copy, final_weights, last_checkpoint, train
from tests.training.test_resume import interrupt

STAGE_2 = "experiment=celebahq/diffusion"
FEATURE = ("model.power_ema=[0.05,0.1]", "snapshots=8")


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory):
    """A run with averages in 8 snapshots, interrupted and resumed."""
    runs = copy(tiny_runs, tmp_path_factory.mktemp("power"))
    shutil.rmtree(runs / "celebahq/diffusion")
    with pytest.raises(SystemExit):
        train(runs, STAGE_2, *FEATURE, *interrupt("diffusion", 24))
    train(runs, STAGE_2, *FEATURE)
    return runs


@pytest.fixture
def run(runs):
    return runs / "celebahq"


def walk(lengths, steps, batch, keep=()):
    """Averages along a random walk of weights, which lie around 5; and their copies at some images seen."""
    network, generator = nn.Linear(30, 10), torch.Generator().manual_seed(0)
    followed, kept = PowerEMA(network, lengths), {}
    moves = torch.randn(steps, 10, 30, generator=generator)
    with torch.no_grad():
        network.weight.fill_(5)
    for step, move in enumerate(moves, start=1):
        with torch.no_grad():
            network.weight.add_(0.01 * move)
        followed.update(network, step * batch, batch)
        if step * batch in keep:
            kept[step * batch] = [average.weight.clone() for average in followed.averages.values()]
    return [average.weight for average in followed.averages.values()], kept


def test_a_profile_that_was_tracked_is_reconstructed():
    steps, batch = 480, 5
    times = range(200, 2401, 200)
    tracked, _ = walk([0.03, 0.07, 0.12], steps, batch)
    (short, long), kept = walk([0.05, 0.1], steps, batch, times)
    stored = [Profile(length, time) for time in times for length in (0.05, 0.1)]
    for length, direct in zip([0.03, 0.07, 0.12], tracked, strict=True):
        weights = fit(stored, Profile(length, 2400)).weights
        made = sum(w * value for w, value in zip(weights, chain(*kept.values()), strict=True))
        spread = (direct - direct.mean()).norm()
        assert (made - direct).norm() < 0.05 * spread
        assert (made - direct).norm() < 0.2 * min((direct - short).norm(), (direct - long).norm())


def test_the_first_update_forgets_the_initial_weights_and_the_batch_does_not_matter():
    network = nn.Linear(2, 2)
    followed = PowerEMA(network)
    with torch.no_grad():
        network.weight.fill_(3)
    followed.update(network, 8, 8)
    assert all(torch.equal(average.weight, network.weight) for average in followed.averages.values())
    few, many = (walk([0.05, 0.1], 300, batch)[0] for batch in (1, 32))
    assert_equal([value.detach() for value in few], [value.detach() for value in many])


def test_a_network_of_lower_precision_has_float32_averages():
    network = nn.Linear(2, 2).to(torch.bfloat16)
    followed = PowerEMA(network)
    followed.update(network, 8, 8)
    assert {average.weight.dtype for average in followed.averages.values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in followed.parameters())


@pytest.mark.parametrize("lengths", [[], [0.05, 0.05], [0.05, 0.3], [0], [-0.1]])
def test_impossible_lengths_end_in_one_line(lengths):
    with pytest.raises(ValueError, match=rf"^model\.power_ema={re.escape(str(lengths))}: .*such as") as error:
        PowerEMA(nn.Linear(1, 1), lengths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lengths", ["[short]", "[0.05,0.3]"])
def test_impossible_lengths_are_refused_before_anything_trains(lengths):
    config = Recipe.parse(["experiment=celebahq", f"model.power_ema={lengths}"]).compose()[1]
    with pytest.raises(ValueError, match=r"^model\.power_ema=") as error:
        try_training(config.model)
    assert "\n" not in str(error.value)


def test_a_single_number_is_refused():
    with pytest.raises(ValueError, match=r"^model\.power_ema=0\.05: must be list of a number"):
        kinds.check(plain(Recipe.parse(["experiment=celebahq", "model.power_ema=0.05"]).compose()[1]))


def test_training_is_unchanged_and_resumes_exactly(runs, tiny_runs, tmp_path):
    stage = runs / "celebahq/diffusion"
    assert_equal(final_weights(stage), final_weights(tiny_runs / "celebahq/diffusion"))
    undisturbed = copy(tiny_runs, tmp_path)
    shutil.rmtree(undisturbed / "celebahq/diffusion")
    train(undisturbed, STAGE_2, FEATURE[0])
    states = [last_checkpoint(folder) for folder in (stage, undisturbed / "celebahq/diffusion")]
    for part in ("state_dict", "optimizer_states"):
        assert_equal(states[0][part], states[1][part], part)
    assert list(locate.snapshots(undisturbed / "celebahq/diffusion/snapshots")) == [
        64
    ]  # the last, without `snapshots=`
    (average,) = averages.stored(locate.find(f"{undisturbed}/celebahq@64"))[1:]
    key = "power_ema.averages.0_1."
    saved = {name.removeprefix(key): value for name, value in states[0]["state_dict"].items() if name.startswith(key)}
    assert average.profile == Profile(0.1, 64)
    assert_equal(dict(UNet2DModel.from_pretrained(average.folder).state_dict()), saved)


@pytest.mark.parametrize("setting", ["model.power_ema=null", "model.power_ema=[0.05,0.2]"])
def test_a_run_with_averages_goes_on_with_the_same(runs, setting):
    with pytest.raises(ValueError, match=r"was started with other settings: .*power_ema"):
        train(runs, STAGE_2, "max_images=72", "snapshots=8", setting)
    with pytest.raises(ValueError, match=r"another network \(power_ema\.averages\.0_"):
        train(runs, STAGE_2, "max_images=72", "snapshots=8", setting, "resume=force")


def test_a_run_without_averages_does_not_begin_them(tiny_runs):
    with pytest.raises(ValueError, match=r"model\.power_ema: None -> \[0\.05, 0\.1\]"):
        train(tiny_runs, STAGE_2, "max_images=72", *FEATURE)


def test_averages_begin_with_the_weights_of_init(run, tmp_path):
    first = ["max_images=8", f"autoencoder={run}", *FEATURE]
    train(tmp_path, STAGE_2, f"init={run}", *first)
    kept = [average.folder for average in averages.stored(locate.find(f"{tmp_path}/celebahq@8"))]
    source = LDMPipeline.from_pretrained(run).unet.conv_in.weight
    for folder in kept:
        assert_close_relative(UNet2DModel.from_pretrained(folder).conv_in.weight, source, 0.1)
    assert len(kept) == 2


def test_the_command_lists_and_writes(run, tmp_path, capsys):
    ema.main([str(run), "--length", "0.07", "0.05", "--at", "48"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("averages up to 48 images")
    assert [line.split()[0] for line in lines[2:]] == ["0.07", "0.05"]
    assert [float(line.split()[1]) < 0.05 for line in lines[2:]] == [True, True]
    for length in ("0.07", "0.1"):
        ema.main([str(run), "--length", length, "--output", str(tmp_path / length)])
    pipes = {length: LDMPipeline.from_pretrained(tmp_path / length) for length in ("0.07", "0.1")}
    stored = UNet2DModel.from_pretrained(run / "diffusion/snapshots/000000064/power_ema/0.1")
    assert_equal(dict(pipes["0.1"].unet.state_dict()), dict(stored.state_dict()))
    found = averages.stored(locate.find(f"{run}@64"))
    weights = fit([average.profile for average in found], Profile(0.07, 64)).weights
    bias = sum(
        w * UNet2DModel.from_pretrained(average.folder).conv_out.bias.double()
        for w, average in zip(weights, found, strict=True)
    )
    assert_close_relative(pipes["0.07"].unet.conv_out.bias, bias, 1e-6)


def test_the_command_evaluates_each_length(run, tmp_path, capsys, monkeypatch):
    calls = []

    def evaluate_state(request, state, trainer, evaluator=None):
        calls.append((request.sampling.ema, state.images_seen, request.sampling.num_samples))
        kind = type("Extractor", (), {"distance": "fd_own"})
        return {"fd_own": type("Score", (), {"value": 3 - len(calls)})}, type("Evaluator", (), {"extractor": kind})

    monkeypatch.setattr("ldm_lab.tools.evaluate.evaluate.evaluate_state", evaluate_state)
    flags = ["--num-samples", "12", "--accelerator", "cpu"]
    ema.main([str(run), "--length", "0.05", "0.07", "--evaluate", *flags])
    assert calls == [(0.05, 64, 12), (0.07, 64, 12)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["length", "residual", "fd_own"]
    assert lines[-1].split()[2:] == ["1", "best"]


def test_samples_of_a_length(run, tmp_path):
    """Their folder and manifest name the length; the images are those of the written pipeline."""
    settings = [f"ckpt={run}", "num_samples=2", "sampler.steps=2", "trainer=cpu", "trainer.precision=32-true"]
    for length in (0.05, 0.07):
        sample.job([*settings, f"ema={length}"])
    folders = {length: run / f"samples/ddim_2_eta0_seed0_at64_ema{length}" for length in (0.05, 0.07)}
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders.values()]
    assert [manifest["ema"] for manifest in manifests] == [0.05, 0.07]
    ema.main([str(run), "--length", "0.07", "--output", str(tmp_path / "written")])
    sample.job([f"ckpt={tmp_path / 'written'}", *settings[1:], f"output={tmp_path / 'out'}"])
    hashes = [json.loads((folder / "manifest.json").read_text())["hashes"]["unet"] for folder in folders.values()]
    written = json.loads((tmp_path / "out/manifest.json").read_text())
    assert hashes[0] != hashes[1] == written["hashes"]["unet"]
    assert written["ema"] is None
    image = "images/000001.png"
    assert (folders[0.07] / image).read_bytes() == (tmp_path / "out" / image).read_bytes()


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("0.5", r"ema=0\.5: a length must be above 0 and below 0\.289"),
        ("-1", r"ema=-1: must be a number above 0"),
        ("long", r"ema=long: must be a number"),
        ("0.01", r"ema=0\.01: the snapshots up to 64 images give this length with an error of \d+%; take 0\.0\d+, or"),
    ],
)
def test_lengths_that_cannot_be_are_refused(run, length, message):
    with pytest.raises(ValueError, match=message) as error:
        sample.job([f"ckpt={run}", f"ema={length}", "trainer=cpu"])
    assert "\n" not in str(error.value)


def test_models_without_averages_are_refused(tiny_runs, run):
    final = run / "diffusion/final"
    for source in (tiny_runs / "celebahq", final, run / "diffusion/checkpoints/last.ckpt"):
        with pytest.raises(ValueError, match=r"ema=0\.07: .* no run with snapshots; train\.py model\.power_ema="):
            sample.job([f"ckpt={source}", "ema=0.07", "trainer=cpu"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--length 0.3", r"--length 0\.3: a length must be"),
        ("--length 0.01", r"--length 0\.01: the snapshots up to 64 images"),
        ("--length 0.05 --at 5k", r"no such snapshot; there are 8, 16"),
        ("--length 0.05 0.07 --output x", r"--output x is for a single --length"),
        (f"--length 0.05 --output {__file__}", r"must not exist"),
        ("--length 0.05 --evaluate --snapshots", r"--evaluate --snapshots: not for the lengths"),
        ("--length 0.05 --evaluate --steps 0", r"--steps 0"),
    ],
)
def test_flags_that_cannot_be_end_in_one_line(run, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        ema.main([str(run), *flags.split()])
    assert "\n" not in str(error.value)
