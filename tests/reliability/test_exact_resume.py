"""A run that is killed, at any moment and as often as one likes, ends as the run that was never disturbed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import assert_close_relative
from tests.reliability.kills import ROOT, SEED, TALLY, TIME_LIMIT, Moment, start
from tests.reliability.sameness import assert_same_run
from tests.trained import SMALL, assert_equal, final_weights

INTERVAL, STEP = 16, 8  # images between checkpoints, and of a step, of debug=tiny

VQ = ("experiment=celebahq", SMALL)
KL = ("experiment=lsun_churches", SMALL, "model.loss.adversarial.start_images=16")
CSV = "logger=csv"
LOADERS = "data.num_workers=2"
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
AVERAGES = ("model.power_ema=[0.05,0.1]", "snapshots=16")

# name -> overrides, processes. The VQ model has its discriminator from the start, KL after two steps, the demo none.
VARIANTS = {
    "vq, W&B": (VQ, 1),
    "vq, loaders, few rows": ((*VQ, CSV, LOADERS, "trainer.log_every_n_steps=3"), 1),
    "vq, accumulation": ((*VQ, CSV, "data.batch_size=2"), 1),
    "kl, averages": ((*KL, CSV, *AVERAGES), 1),
    "kl, accumulation, loaders, W&B": ((*KL, LOADERS, "data.batch_size=4"), 1),
    "demo, two processes, averages": (("experiment=avatars", CSV, *TWO, *AVERAGES), 2),
    "vq, two processes, accumulation": ((*VQ, CSV, "data.batch_size=2", *TWO), 2),
    "kl, two processes, loaders": ((*KL, CSV, LOADERS, *TWO), 2),
}
COMPILED = {"vq, compiled": ((*VQ, CSV, "compile=true"), 1)}  # apart: compiling takes minutes

# In the order in which a run meets them.
NAMED = {
    "before anything is written": Moment("mkdir autoencoder"),
    "while config.yaml is written": Moment("rename autoencoder/config.yaml"),
    "before the first checkpoint": Moment("hook autoencoder on_train_batch_start 8"),
    "while the first checkpoint is written": Moment("open autoencoder/checkpoints/.last.ckpt.PID"),
    "before a checkpoint gets its name": Moment("rename autoencoder/checkpoints/last.ckpt"),
    "when the first has its name": Moment("remove autoencoder/checkpoints/.last.ckpt.PID"),
    "in a step": Moment("hook autoencoder on_before_optimizer_step 24"),
    "when the second checkpoint has its name": Moment("remove autoencoder/checkpoints/.last.ckpt.PID"),
    "in the validation of stage 1": Moment("hook autoencoder on_validation_batch_start", 2),
    "in the preview of stage 1": Moment("rename autoencoder/samples"),
    "while the older checkpoint is kept": Moment("(rename|link) autoencoder/checkpoints/.?previous"),
    "while metrics.csv is written": Moment("rename autoencoder/metrics.csv", 2),
    "in the last validation of stage 1": Moment("hook autoencoder on_validation_batch_end 64"),
    "in the export of stage 1": Moment("rename autoencoder/final/"),
    "before stage 1 counts as finished": Moment("rename autoencoder/status.json", 2),
    "between the stages": Moment("remove autoencoder/.status.json.PID", 2),
    "at the start of stage 2": Moment("rename diffusion/status.json"),
    "while the first latents are made": Moment("encode diffusion 0"),
    "before the first checkpoint of stage 2": Moment("hook diffusion on_train_batch_end 8"),
    "while a checkpoint of stage 2 is written": Moment("open diffusion/checkpoints/.last.ckpt.PID", 2, delay=0.002),
    "when a checkpoint of stage 2 has its name": Moment("remove diffusion/checkpoints/.last.ckpt.PID"),
    "in the validation of stage 2": Moment("hook diffusion on_validation_batch_end"),
    "in the preview of stage 2": Moment("open diffusion/samples"),
    "in the last step": Moment("hook diffusion on_train_batch_start 56"),
    "when the last checkpoint has its name": Moment("remove diffusion/checkpoints/.last.ckpt.PID"),
    "in the last validation": Moment("hook diffusion on_validation_batch_start 64", 2),
    "in the export of stage 2": Moment("rename diffusion/final/unet"),
    "while the run becomes a pipeline": Moment("link unet", 1),
    "before the pipeline's index is there": Moment("rename model_index.json"),
    "before stage 2 counts as finished": Moment("rename diffusion/status.json", 2),
}

# While stage 2 encodes its four shards.
ENCODING = {
    "before the cache is named": Moment("rename latents/.*/meta.json"),
    "when the first shard is claimed": Moment("open latents/.*/00000.lock"),
    "while the first shard is written": Moment("open latents/.*/.00000.safetensors.PID.tmp", delay=0.001),
    "before a shard has its name": Moment("rename latents/.*/.*.safetensors", 2),
    "when a shard has its name": Moment("remove latents/.*/.0000..safetensors.PID.tmp", 3),
    "before its claim is given back": Moment("remove latents/.*.lock"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Variant -> its run that was never disturbed, and how many events that took; trained when first asked for."""
    done = {}

    def run(variant):
        if variant not in done:
            runs = tmp_path_factory.mktemp("undisturbed") / "runs"
            overrides, world_size = {**VARIANTS, **COMPILED}[variant]
            events = start(runs, [*overrides, "debug=tiny"], world_size=world_size).events
            done[variant] = the_run(runs), events
        return done[variant]

    return run


@pytest.fixture
def numbers(request):
    """Random numbers of one test: others with KILLS_SEED=n."""
    return random.Random(f"{SEED} {request.node.name}")


def the_run(runs):
    (run,) = (path for path in runs.iterdir() if path.is_dir() and path.name != "cache")
    return run


def kill_repeatedly(runs, variant, moments, *further):
    """Start a run, kill it at the `moments`, one a start, and let it come to its end; returns the starts.

    Each start goes on where the last checkpoint says, and repeats an interval at most: that, and what was trained
    while a checkpoint was being written.
    """
    overrides, world_size = {**VARIANTS, **COMPILED}[variant]
    starts = []
    for moment in [*moments, None]:
        starts.append(start(runs, [*overrides, "debug=tiny", *further], moment, world_size))
        assert_little_is_repeated(*starts[-2:])
    return starts


def assert_little_is_repeated(before, now=None):
    if now is None or before.images < INTERVAL + STEP or before.stage not in now.resumed:
        return
    repeated = before.images - now.resumed[before.stage]
    assert repeated < 2 * INTERVAL, f"{repeated} images are repeated after {before}"
    TALLY["images repeated at most"] = max(repeated, TALLY["images repeated at most"])


@contextlib.contextmanager
def typed(runs, *overrides):
    """A command as users type it, in a shell of its own; what is left of it is killed."""
    command = [sys.executable, "train.py", *VQ, "debug=tiny", f"paths.runs={runs}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        TALLY["kills"] += process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_three_times(tiny_runs, tmp_path):
    """Once from outside, when there is a checkpoint; then at two moments that are sure to hurt."""
    runs = tmp_path / "runs"
    with typed(runs, CSV) as process:
        while not (runs / "celebahq/autoencoder/checkpoints/last.ckpt").is_file() and process.poll() is None:
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    command = [*VQ, "debug=tiny", CSV]
    first, *others = [
        start(runs, command, moment)
        for moment in (
            NAMED["in the last validation of stage 1"],
            NAMED["when a checkpoint of stage 2 has its name"],
            None,
        )
    ]
    assert (first.killed, others[0].killed, others[1].killed) == (True, True, False)
    assert first.resumed["autoencoder"] >= INTERVAL
    assert_same_run(runs / "celebahq", tiny_runs / "celebahq")


@pytest.mark.soak
def test_killed_at_every_moment_that_has_a_name(undisturbed, tmp_path):
    starts = kill_repeatedly(tmp_path / "runs", "vq, W&B", NAMED.values())
    missed = [name for name, now in zip(NAMED, starts, strict=False) if not now.killed]
    assert_same_run(the_run(tmp_path / "runs"), undisturbed("vq, W&B")[0])
    assert missed == []


@pytest.mark.soak
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments(undisturbed, tmp_path, variant, numbers):
    """At four of those that have a name, and at any event or a little later."""
    run, events = undisturbed(variant)
    named = [NAMED[name] for name in sorted(numbers.sample(list(NAMED), 4), key=list(NAMED).index)]
    moments = [Moment(count=numbers.randint(1, events // 5), delay=numbers.choice((0, 0.01))) for _ in range(4)]
    for place, moment in enumerate(named):
        moments.insert(2 * place, moment)
    kill_repeatedly(tmp_path / "runs", variant, moments)
    assert_same_run(the_run(tmp_path / "runs"), run)


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["kl, averages", "demo, two processes, averages"])
def test_killed_while_the_scale_is_measured(undisturbed, tmp_path, variant):
    moments = [Moment("encode diffusion 0", count) for count in (1, 3)]
    starts = kill_repeatedly(tmp_path / "runs", variant, moments)
    assert [now.killed for now in starts] == [True, True, False]
    assert_same_run(the_run(tmp_path / "runs"), undisturbed(variant)[0])


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["vq, W&B", "kl, averages", "demo, two processes, averages"])
def test_killed_while_latents_are_encoded(undisturbed, tmp_path, variant):
    """The latents are those of the undisturbed run, too."""
    run, _ = undisturbed(variant)
    runs, alone = tmp_path / "runs", VARIANTS[variant][1] == 1
    names = list(ENCODING)[0 if alone else 1 :]  # which rank names the cache is a matter of luck
    starts = kill_repeatedly(runs, variant, [ENCODING[name] for name in names], f"paths.cache={runs}/cache")
    killed = [name for name, now in zip(names, starts, strict=False) if now.killed]
    assert_same_run(the_run(runs), run)
    caches = runs / "cache/latents", Path(os.environ["LDM_LAB_CACHE"], "latents")
    made = sorted(path.relative_to(caches[0]) for path in caches[0].glob("*/*.safetensors"))
    assert [path.name for path in made] == [f"0000{n}.safetensors" for n in range(4)]
    for path in made:
        assert_equal(*(load_file(folder / path) for folder in caches), where=str(path))
    assert killed == names if alone else len(killed) > 1  # the other rank may do what a moment waits for


@pytest.mark.soak
def test_a_compiled_run_killed_in_both_stages(undisturbed, tmp_path):
    names = ("in a step", "in the validation of stage 1", "while a checkpoint of stage 2 is written")
    starts = kill_repeatedly(tmp_path / "runs", "vq, compiled", [NAMED[name] for name in names])
    assert [now.killed for now in starts] == [True, True, True, False]
    assert_same_run(the_run(tmp_path / "runs"), undisturbed("vq, compiled")[0])


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
def test_the_plug_of_a_typed_command_is_pulled_at_any_time(tmp_path, numbers, processes):
    """The launcher is Lightning's own."""
    several = TWO if processes == 2 else ()
    with typed(tmp_path / "whole", *several) as whole:
        began = time.monotonic()
        assert whole.wait(timeout=TIME_LIMIT) == 0
        seconds = time.monotonic() - began
    for _ in range(4):
        with typed(tmp_path / "runs", *several) as process, contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=numbers.uniform(0.3, 1.0) * seconds)
    with typed(tmp_path / "runs", *several) as process:
        assert process.wait(timeout=TIME_LIMIT) == 0
    assert_same_run(tmp_path / "runs/celebahq", tmp_path / "whole/celebahq")


@pytest.mark.soak
def test_another_number_of_devices_goes_on_with_the_same_images_and_noise(tiny_runs, tmp_path):
    """One, two and again one process; stage 2 has the first stage of the other run, which two processes would not make.

    (The discriminator's BatchNorm sees the images of one process.)
    """
    stream = ["plugins=[tests]", "+callbacks.stream._target_=tests.callbacks.Stream"]
    settings = ["debug=tiny", CSV, *stream]
    given = f"autoencoder={tiny_runs}/celebahq"
    start(tmp_path / "whole", [*VQ, *settings, f"+callbacks.stream.folder={tmp_path}/drawn"])
    for stage, own in (("autoencoder", (SMALL,)), ("diffusion", (given,))):
        mine = [f"experiment=celebahq/{stage}", *settings, f"+callbacks.stream.folder={tmp_path}/drawn again", *own]
        for world_size, images in ((1, 24), (2, 48)):
            moment = Moment(f"hook {stage} on_train_batch_end {images}")
            now = start(tmp_path / "runs", [*mine, *(TWO if world_size == 2 else ())], moment, world_size)
            assert (now.killed, now.images) == (True, images)
        assert now.resumed == {stage: INTERVAL}
        assert start(tmp_path / "runs", mine).resumed[stage] in (INTERVAL, 2 * INTERVAL)
        drawn = [(tmp_path / folder / f"{stage}.txt").read_text().splitlines() for folder in ("drawn", "drawn again")]
        assert set(drawn[0]) == set(drawn[1])
        assert len(drawn[0]) == 64 < len(drawn[1])
    weights = [final_weights(runs / "celebahq/diffusion") for runs in (tmp_path / "runs", tiny_runs)]
    for key, value in weights[1]["unet/diffusion_pytorch_model.safetensors"].items():
        assert_close_relative(weights[0]["unet/diffusion_pytorch_model.safetensors"][key], value, 1e-3)
