"""What `trainer` may ask of a machine."""

import pytest

from ldm_lab.training import device
from tests.trained import train


@pytest.fixture(params=[0, 2], ids=["cpu", "two GPUs"])
def gpus(request, monkeypatch):
    """A machine with so many CUDA devices."""
    for module in ("fabric", "pytorch"):
        monkeypatch.setattr(f"lightning.{module}.accelerators.cuda.num_cuda_devices", lambda: request.param)
    monkeypatch.setattr(device.MPSAccelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    return request.param


def refusal(**settings):
    """What is said of settings; None: they are taken."""
    try:
        device.check({"accelerator": "auto", "devices": 1, "strategy": "auto", "precision": "auto", **settings})
    except ValueError as error:
        return str(error)
    return None


NO_DEVICE = "trainer.accelerator={}: no such device here; use trainer.accelerator=cpu"


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_is_taken_where_there_is_one(gpus, accelerator):
    assert refusal(accelerator=accelerator) == (None if gpus else NO_DEVICE.format(accelerator))


@pytest.mark.parametrize("accelerator", ["auto", "cpu", {"_target_": "lightning.pytorch.accelerators.CPUAccelerator"}])
def test_what_is_there_everywhere_is_taken(gpus, accelerator):
    assert refusal(accelerator=accelerator) is None


@pytest.mark.parametrize("accelerator", ["mps", "tpu"])
def test_other_devices_are_not_here(gpus, accelerator):
    assert refusal(accelerator=accelerator) == NO_DEVICE.format(accelerator)


@pytest.mark.parametrize("accelerator", ["quantum", 3, None, ["cpu"]])
def test_a_kind_of_device_that_is_none(gpus, accelerator):
    assert refusal(accelerator=accelerator).startswith(f"trainer.accelerator={accelerator}: there is no such kind")


def test_why_a_card_is_not_used_is_said(monkeypatch):
    monkeypatch.setattr(device.CUDAAccelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(device.torch.version, "cuda", None)
    assert "no such device here (this torch is built without CUDA" in refusal(accelerator="cuda")


@pytest.mark.parametrize("devices", [0, "0", -2, "two", "", [], 1.5, True, None])
def test_a_number_of_devices_that_is_none(gpus, devices):
    said = refusal(devices=devices)
    assert said.startswith(f"trainer.devices={devices}: ")
    assert "this machine has 2; use trainer.devices=auto, a number up to 2" in said if gpus else "devices=1" in said


@pytest.mark.parametrize("devices", [1, "2", 2, "auto"])
def test_a_number_of_devices_that_is_there(gpus, devices):
    assert refusal(devices=devices) is None


@pytest.mark.parametrize(("devices", "there"), [(9, False), (-1, True), ([0, 1], True), ("0,1", True), ([2], False)])
def test_gpus_are_counted_and_processes_on_a_cpu_are_not(gpus, devices, there):
    if gpus:
        assert (refusal(devices=devices) is None) is there
    assert (refusal(accelerator="cpu", devices=devices) is None) is (devices == 9)


@pytest.mark.parametrize(
    ("strategy", "there"), [("ddp", True), ({"_target_": "a.B"}, True), ("nonsense", False), (3, False)]
)
def test_strategies(strategy, there):
    said = refusal(strategy=strategy)
    assert (said is None) is there
    assert there or said.startswith(f"trainer.strategy={strategy}: there is no such strategy; use")


@pytest.mark.parametrize("precision", ["16-mixed", 16, "16"])
def test_float16_needs_a_gpu(gpus, precision):
    said = f"trainer.precision={precision}: needs a GPU; use trainer.precision=bf16-mixed or 32-true on a CPU"
    assert refusal(precision=precision) == (None if gpus else said)
    assert refusal(precision=precision, accelerator="cpu") == said


@pytest.mark.parametrize(
    "setting", ["trainer.precision=bf15", "trainer.accelerator=tpu", "trainer.devices=-2", "trainer.strategy=nonsense"]
)
def test_it_is_said_before_any_image_is_looked_at(setting, tmp_path):
    with pytest.raises(ValueError, match=f"^{setting}: "):
        train(tmp_path, "experiment=folder/autoencoder", "data=image_folder", "data.root=/nowhere", setting)


def test_a_precision_that_is_none_is_refused_before_an_epoch_is_counted(tmp_path):
    settings = ("data=image_folder", "data.root=/nowhere", "max_images=1ep", "trainer.precision=bf16-true")
    with pytest.raises(ValueError, match=r"^trainer\.precision=bf16-true: training keeps its weights in float32: give"):
        train(tmp_path, "experiment=folder/autoencoder", *settings)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_short_names_of_precisions_are_those_of_lightning(precision, tmp_path, capsys):
    command = ("experiment=celebahq/autoencoder", "callbacks=none", "max_images=8", f"trainer.precision={precision}")
    train(tmp_path, *command)
    assert f"CPU threads, {'32-true' if precision == '32' else 'bf16-mixed'}\n" in capsys.readouterr().out
