"""`examples/`: fields that SkyPilot and Kubeflow know, around a command line that train.py takes."""

import re
import shlex
from pathlib import Path

import yaml

from ldm_lab.config.compose import Recipe

ROOT = Path(__file__).resolve().parents[1]
# Of SkyPilot's task and Kubeflow's TrainJob (v1alpha1): those that the files may use.
TASK = {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
TRAINER = {"image", "numNodes", "numProcPerNode", "resourcesPerNode", "command", "args", "env"}


def read(name):
    return yaml.safe_load((ROOT / "examples" / name).read_text(encoding="utf-8"))


def assert_trains(words, devices, nodes):
    """Words from `torchrun` on: both stages of the recipe compose, for so many processes."""
    overrides = words[words.index("train.py") + 1 :]
    assert any(word.startswith("paths.mirror=s3://") for word in overrides)
    configs = Recipe.parse(overrides).compose()
    assert [config.stage for config in configs] == ["autoencoder", "diffusion"]
    for config in configs:
        assert (config.trainer.devices, config.trainer.num_nodes) == (devices, nodes)
        assert config.data.root == "s3://my-bucket/celebahq"


def test_the_task_of_skypilot():
    task = read("skypilot.yaml")
    assert task.keys() <= TASK
    assert task["resources"].keys() <= {"accelerators", "use_spot", "job_recovery"}
    values = {"BUCKET": "s3://my-bucket", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NUM_NODES": "2"}
    run = re.sub(r"\$(\w+)", lambda found: values.get(found[1], "0"), task["run"].replace("\\\n", " "))
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"].endswith(":8")
    assert_trains(shlex.split(run), devices=8, nodes=2)


def test_the_job_of_kubernetes():
    job = read("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"].keys() == {"runtimeRef", "trainer"}
    trainer = job["spec"]["trainer"]
    assert trainer.keys() <= TRAINER
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    assert_trains(trainer["command"], devices=trainer["numProcPerNode"], nodes=trainer["numNodes"])
