"""A trial: the real steps of a stage, and no trace of them."""

import tempfile

import pytest
import torch

from ldm_lab.training.planning import memory
from ldm_lab.training.planning.memory import num_bytes
from ldm_lab.training.planning.trial import Trial
from tests.trained import last_checkpoint, small, undisturbed
from tests.training.stages import trial

GB = 2**30


@pytest.mark.parametrize("experiment", ["celebahq/autoencoder", "lsun_churches/diffusion"])
def test_a_trial_measures_and_leaves_nothing(experiment, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    tried = trial(experiment, "data.batch_size=auto", *small([f"experiment={experiment}"]))
    before = {key: value.clone() for key, value in tried.module.state_dict().items()}
    with undisturbed():
        measured = tried.run(batch_size=2, images=8, steps=4)
    assert (len(measured.seconds), measured.images) == (3, 8)
    assert min(measured.seconds) <= 8 / measured.rate <= max(measured.seconds)
    assert 2**27 < measured.peak < memory.total(torch.device("cpu"))  # PyTorch itself takes that
    state = last_checkpoint(tiny_runs / experiment)
    assert measured.checkpoint == num_bytes([state["state_dict"], state["optimizer_states"]])
    assert all(torch.equal(value, before[key]) for key, value in tried.module.state_dict().items())
    assert (tried.module.images_seen, tried.data.batch_size, tried.data.global_batch_size) == (0, "auto", 8)
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_a_trial_ends_with_its_time_but_takes_two_steps():
    with undisturbed():
        assert len(trial().run(batch_size=8, images=8, steps=50, seconds=0).seconds) == 1


@pytest.mark.parametrize(
    ("batch_size", "free", "message"),
    [
        (4, 3, r"data\.batch_size=4: training the diffusion stage takes more than the 3 GB that are free: lower it, "),
        (
            4,
            0.5,
            r"data\.image_size=\[32,32\]: training the diffusion stage takes more than the 512 MB that are free, ",
        ),
        (
            1,
            0.5,
            r"data\.image_size=\[32,32\]: .* one image at a time: lower it, or choose smaller networks with model=",
        ),
    ],
)
def test_what_a_cpu_cannot_hold_is_refused_before_it_is_run(batch_size, free, message, monkeypatch):
    tried = trial()
    tried.needs = lambda images: images * GB
    tried.run = None
    monkeypatch.setattr(memory, "free", lambda _: int(free * GB))
    with pytest.raises(ValueError, match=message):
        tried.attempt(batch_size)


class OnGpu(Trial):
    """A trial on a GPU that holds `room` images."""

    device, room = torch.device("cuda", 0), 2

    def run(self, batch_size, images, **_):
        if batch_size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.ran = batch_size, images
        return type("Measured", (), {"peak": batch_size * GB})


def test_a_gpu_is_tried(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda _: 3 * GB)
    tried = trial()
    tried.__class__ = OnGpu
    assert [tried.needs(images) for images in (1, 2, 4)] == [GB, 2 * GB, float("inf")]
    tried.needs(2)
    assert tried.ran == (2, 4)  # two micro-batches
    tried.room = 8
    tried.needs(8)
    assert tried.ran == (8, 8)  # there is one
    tried.room = 2
    assert tried.attempt(2).peak == 2 * GB
    assert tried.ran == (2, 8)
    with pytest.raises(ValueError, match=r"data\.batch_size=4: .* more than the 3 GB"):
        tried.attempt(4)
    tried.room = 0
    with pytest.raises(ValueError, match=r"data\.image_size=\[32,32\]: "):
        tried.attempt(4)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    tried = trial()
    tried.run = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        tried.attempt(8)
