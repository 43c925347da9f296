"""Sampling that is killed and started again: each sample once, whole, and the one that an undisturbed command draws."""

import itertools
import os
import random
import signal
import time
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ldm_lab import LDMPipeline
from ldm_lab.sampling.files import RGB_PNG
from ldm_lab.sampling.generate import MissingSamples, SamplingModule, claim
from ldm_lab.training.trainer import Trainer
from ldm_lab.utils.images import save_png
from tests.helpers import contents
from tests.reliability.commands import ROOT, TIME_LIMIT, TWO, free_port
from tests.reliability.kills import processes, rank_environment
from tests.sampling.test_generate import MODEL, SETTINGS, write_images

TINY = (f"ckpt={MODEL}", "sampler.steps=2")
ONE = ("trainer=cpu",)
MANIFEST = {"ckpt": "x", "hashes": {}, **asdict(SETTINGS)}


def fork(function):
    """The exit status of a process that does nothing else; that of a signal is negative."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_what_a_killed_process_was_writing_does_not_count(tmp_path, monkeypatch, moment):
    write_images(tmp_path, 2)
    claim_new(tmp_path)

    def write():
        monkeypatch.setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save_png(Image.new("RGB", (8, 8)), RGB_PNG.path(tmp_path, 2))

    before = sorted(contents(tmp_path))
    assert fork(write) == -signal.SIGKILL
    assert len(contents(tmp_path)) == len(before) + 1  # it has begun
    assert RGB_PNG.missing(tmp_path, 3) == [2]
    claim(tmp_path, MANIFEST)
    assert sorted(contents(tmp_path)) == before


def claim_new(folder):
    images = list((folder / "images").iterdir())
    (folder / "images").rename(folder.parent / "aside")
    claim(folder, MANIFEST)
    (folder.parent / "aside").rename(folder / "images")
    assert images


def test_a_process_killed_at_its_manifest_binds_nobody(tmp_path, monkeypatch):
    folder = tmp_path / "output"

    def write():
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        claim(folder, MANIFEST)

    assert fork(write) == -signal.SIGKILL
    assert len(contents(folder)) == 1
    claim(folder, MANIFEST)
    assert list(contents(folder)) == ["manifest.json"]


@pytest.mark.parametrize("length", [0, 1, 20, -1])
def test_an_image_cut_short_is_drawn_again(tmp_path, length):
    write_images(tmp_path, 3)
    path = RGB_PNG.path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:length])
    assert RGB_PNG.missing(tmp_path, 3) == [1]


def test_a_rank_draws_what_the_first_one_says(tmp_path, monkeypatch):
    """Rank 1 sees more files than rank 0 did: a process of before is on its way out."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    samples = MissingSamples(tmp_path, num_samples=6, batch_size=2)
    samples.trainer = trainer
    monkeypatch.setattr(type(trainer.strategy), "broadcast", lambda self, mine, src=0: [1, 3, 4, 5])
    monkeypatch.setattr(Trainer, "global_rank", 1)
    monkeypatch.setattr(Trainer, "world_size", 2)
    assert [batch.tolist() for batch in samples.predict_dataloader()] == [[3, 5]]
    assert samples.count == 4


def test_all_are_there(tmp_path):
    write_images(tmp_path, 4)
    before = contents(tmp_path)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    samples = MissingSamples(tmp_path, num_samples=4, batch_size=2)
    module = SamplingModule(LDMPipeline.from_pretrained(MODEL), tmp_path, seed=0, steps=2, eta=0.0)
    trainer.predict(module, datamodule=samples, return_predictions=False)
    assert (samples.count, contents(tmp_path)) == (0, before)


# The whole command.


class Start:
    """`sample.py ...` in processes forked from one that has imported everything, as torchrun would start them."""

    def __init__(self, folder, count, batch_size, world_size):
        words = (*TINY, f"output={folder}", f"num_samples={count}", f"batch_size={batch_size}")
        port, self.log = free_port(), folder.with_suffix(".log")
        self.ranks = []
        for rank in range(world_size):
            environment = rank_environment(rank, world_size, port) if world_size > 1 else {}
            arguments = ([*words, *(TWO if world_size > 1 else ONE)], environment, str(self.log))
            self.ranks.append(processes.Process(target=_sample, args=arguments))
            self.ranks[-1].start()

    def running(self):
        return all(process.is_alive() for process in self.ranks)

    def finish(self):
        for process in self.ranks:
            process.join(TIME_LIMIT)
        assert [process.exitcode for process in self.ranks] == [0] * len(self.ranks), self.log.read_text()

    def kill(self):
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join(TIME_LIMIT)


def _sample(words, environment, log):
    """One rank."""
    os.chdir(ROOT)
    os.environ.update(environment)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sample.job(words)


def undisturbed(folder, count, batch_size):
    Start(folder, count, batch_size, 1).finish()
    return contents(folder)


def tails(indices, batch_size, world_size):
    """Samples that are drawn in a batch which is not full."""
    shares = [indices[rank::world_size] for rank in range(world_size)]
    return {index for share in shares for index in share[len(share) // batch_size * batch_size :]}


def disturb(folder, count, batch_size, world_size, kills, chance):
    """Kill a command `kills` times, at random moments, all ranks at once or one before the other, then let it finish.

    Returns the samples that may have been drawn in a batch that was not full, and the numbers of files at each kill.
    """
    in_tails, stood = set(), []
    while True:
        left = RGB_PNG.missing(folder, count)
        in_tails |= tails(left, batch_size, world_size)
        command = Start(folder, count, batch_size, world_size)
        if len(stood) == kills:
            command.finish()
            return in_tails, stood
        threshold = count - len(left) + chance.randrange(2 * len(left) // (kills + 1 - len(stood)))
        while command.running() and count - len(RGB_PNG.missing(folder, count)) < threshold:
            time.sleep(0.01)
        assert command.running(), command.log.read_text()
        time.sleep(chance.uniform(0, 0.05))
        first = chance.choice(command.ranks)
        first.kill()
        time.sleep(chance.choice((0, 0.5)))
        command.kill()
        stood.append(count - len(RGB_PNG.missing(folder, count)))
        assert all(Image.open(path).load() for path in (folder / "images").glob("*.png"))


def assert_whole(folder, reference, in_tails, count):
    files = contents(folder)
    assert sorted(files) == sorted(reference)
    different = [index for index in range(count) if files[name(index)] != reference[name(index)]]
    assert set(different) <= in_tails
    for index in different:  # batches of another size are rounded otherwise
        images = [np.asarray(Image.open(BytesIO(f[name(index)]))).astype(int) for f in (files, reference)]
        assert np.abs(images[0] - images[1]).max() <= 1
    assert files["manifest.json"] == reference["manifest.json"]
    with np.load(folder / "samples.npz") as archive:
        array = archive["arr_0"]
    assert np.array_equal(array, [np.asarray(Image.open(RGB_PNG.path(folder, index))) for index in range(count)])
    if not different:
        assert files["grid.png"] == reference["grid.png"]
        assert files["samples.npz"] == reference["samples.npz"]
    return len(different)


def name(index):
    return f"images/{index:06d}.png"


@pytest.mark.slow
def test_a_killed_command_is_continued(tmp_path):
    reference = undisturbed(tmp_path / "reference", 60, 7)
    in_tails, _ = disturb(tmp_path / "killed", 60, 7, 1, 2, random.Random(0))
    assert_whole(tmp_path / "killed", reference, in_tails, 60)


@pytest.mark.soak
@pytest.mark.parametrize(("batch_size", "world_size"), itertools.product((7, 64), (1, 2)))
def test_a_thousand_samples_killed_and_continued(tmp_path, batch_size, world_size):
    count, kills = 1000, 10
    reference = undisturbed(tmp_path / "reference", count, batch_size)
    chance = random.Random(f"{batch_size} {world_size}")
    in_tails, stood = disturb(tmp_path / "killed", count, batch_size, world_size, kills, chance)
    different = assert_whole(tmp_path / "killed", reference, in_tails, count)
    print(f"{count} samples, killed at {stood}; {different} differ by rounding, {len(in_tails)} may")
