"""`scripts/slurm.sh` under a real Slurm: two nodes of two tasks train, are stopped, cancelled and lost, and draw."""

import subprocess

import pytest

from tests.clusters.callbacks import hold
from tests.clusters.slurm import NODES
from tests.reliability.commands import ROOT
from tests.reliability.sameness import assert_same_run
from tests.sampling.test_generate import MODEL
from tests.trained import metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = "scripts/slurm.sh"
TINY = ("debug=tiny", "logger=csv", "callbacks=none", "trainer.accelerator=cpu", "plugins=[tests]", "max_images=128")
STAGES = ("autoencoder", "diffusion")


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    """The run of a job that nothing has happened to, and its log."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = slurm.submit(folder / "log", SCRIPT, *TINY, f"paths.runs={folder}")
    log = folder / "log"
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    return folder / "avatars", log.read_text()


def test_two_nodes_of_two_tasks_train_both_stages(undisturbed):
    run, log = undisturbed
    for stage in STAGES:
        assert log.count(f"{stage} on 4 x 1 CPU threads") == 1, log
        assert list(metrics(run / stage)) == list(range(8, 129, 8))
    assert (run / "model_index.json").is_file()


@pytest.mark.soak
def test_a_run_that_is_stopped_cancelled_and_loses_a_node_ends_like_an_undisturbed_one(slurm, undisturbed, tmp_path):
    """The end of the job's time, `scancel` and the same line again, a node that dies and comes back."""
    log, places = tmp_path / "log", ("autoencoder-56", "autoencoder-88", "diffusion-56")
    line = (SCRIPT, *TINY, f"paths.runs={tmp_path}", *hold(tmp_path, *places))
    job = slurm.submit(log, "--time=60", "--signal=USR1@55", *line)
    slurm.reached(job, tmp_path / places[0])
    slurm.let_time_end(job)
    slurm.until(lambda: slurm.state(job)[1] == 1, "the time is over: queued again")
    slurm.call("scontrol", "update", f"job={job}", "timelimit=60")
    slurm.reached(job, tmp_path / places[1])
    slurm.call("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    job = slurm.submit(log, "--time=60", *line)
    slurm.reached(job, tmp_path / places[2])
    slurm.kill_node(NODES[1])
    (tmp_path / "go").touch()
    slurm.until(lambda: slurm.state(job)[1] == 1, "a node is gone: queued again")
    slurm.start_node(NODES[1])
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    assert log.read_text().count("continuing") == 3
    assert_same_run(tmp_path / "avatars", undisturbed[0])


@pytest.mark.soak
def test_a_run_that_is_queued_again_many_times_ends_like_an_undisturbed_one(slurm, undisturbed, tmp_path):
    places = [f"{stage}-{images}" for stage in STAGES for images in (24, 56, 88)]
    line = (SCRIPT, *TINY, f"paths.runs={tmp_path}", *hold(tmp_path, *places))
    job = slurm.submit(tmp_path / "log", *line)
    for number, place in enumerate(places, 1):
        slurm.reached(job, tmp_path / place)
        slurm.call("scancel", "--signal=USR1", job)  # what Slurm sends, without the wait
        slurm.until(lambda number=number: slurm.state(job)[1] == number, f"queued again at {place}")
    assert slurm.ended(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "avatars", undisturbed[0])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--gpus-per-node=1", SCRIPT), "error: 2 tasks a node for 1 GPUs: --ntasks-per-node must be --gpus-per-node"),
        (("--ntasks=3", SCRIPT), "error: 3 tasks do not fit 2 nodes of 2: set --ntasks-per-node, not --ntasks"),
        (("--nodes=1", "--wrap=srun python train.py debug=tiny"), "error: Slurm has 2 task(s) (SLURM_NTASKS), but"),
    ],
)
def test_tasks_that_do_not_fit_end_the_job_in_one_line(slurm, tmp_path, words, line):
    job = slurm.submit(tmp_path / "log", *words)
    assert slurm.ended(job) == "FAILED"
    said = [one for one in (tmp_path / "log").read_text().splitlines() if one.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(line)


@pytest.mark.soak
def test_the_nodes_share_a_thousand_samples(slurm, tmp_path):
    words = f"ckpt={MODEL}", "sampler.steps=2", "num_samples=1000", f"output={tmp_path}/out"
    job = slurm.submit(tmp_path / "log", SCRIPT, "sample.py", *words, "trainer.accelerator=cpu")
    assert slurm.ended(job) == "COMPLETED", (tmp_path / "log").read_text()
    names = sorted(path.name for path in (tmp_path / "out/images").iterdir())
    assert names == [f"{index:06d}.png" for index in range(1000)]


@pytest.mark.soak
def test_each_job_of_a_sweep_is_queued_by_itself_and_again_at_its_end(slurm, tmp_path):
    words = "experiment=avatars/autoencoder", *TINY, *hold(tmp_path, "autoencoder-24"), f"paths.runs={tmp_path}"
    command = ("python", "train.py", "-m", "hydra/launcher=submitit_slurm", *words, "seed=1,2")
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        sweep = subprocess.Popen(command, cwd=ROOT, env=slurm.environment, stdout=log, stderr=log)
    slurm.until((tmp_path / "autoencoder-24").exists, "a job of the sweep trains", 900)
    jobs = slurm.call("squeue", "-h", "-r", "-o", "%A").split()
    assert len(jobs) == 2
    slurm.call("scancel", "--signal=USR1", *jobs)
    slurm.until(lambda: any(slurm.state(job)[1] for job in jobs), "a job is queued again")
    assert sweep.wait(1800) == 0, (tmp_path / "log").read_text()
    for seed in (1, 2):
        assert list(metrics(tmp_path / f"avatars-seed-{seed}/autoencoder")) == list(range(8, 129, 8))
    said = [path.read_text() for path in tmp_path.glob("multirun/.submitit/*/*.out")]
    assert len(said) == 2
    for log in said:
        assert log.count("stopped and saved") == log.count("continuing")
    assert "continuing" in said[0] + said[1]
