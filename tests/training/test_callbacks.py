"""When callbacks act, and what they leave on disk."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer

from ldm_lab.runs.folder import RunFolder
from ldm_lab.training.callbacks.checkpoint import Checkpoint
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.callbacks.export import publish
from ldm_lab.training.callbacks.interrupt import BrokenOff, Interrupt
from ldm_lab.training.callbacks.validate import NEVER, Validate
from ldm_lab.training.checkpoint_io import BackgroundCheckpointIO, place
from ldm_lab.training.loggers.csv import MetricsCSV
from ldm_lab.utils.signals import STOPPING, Interrupted


def saving(folder, every):
    """A `Checkpoint` where no validation is due but the last one."""
    return Checkpoint(folder, every, Validate(NEVER))


class FakeTrainer(SimpleNamespace):
    """As much of a trainer as callbacks look at; `train` calls them batch by batch."""

    def __init__(self, steps, global_batch_size=8, accumulation=1, world_size=1, start=0):
        super().__init__(
            max_steps=steps, global_step=start // global_batch_size, world_size=world_size, is_global_zero=True,
            should_stop=False, val_check_batch=None, limit_val_batches=1.0, loggers=[], callbacks=[], saves=[],
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(min_steps=None)), state=SimpleNamespace(fn="fit"),
            datamodule=SimpleNamespace(global_batch_size=global_batch_size),
            _logger_connector=SimpleNamespace(update_train_step_metrics=lambda: None),
            strategy=SimpleNamespace(
                reduce=lambda value, reduce_op: value, checkpoint_io=BackgroundCheckpointIO(), root_device="cpu"
            ),
        )  # fmt: skip
        self.accumulation = accumulation
        self.module = SimpleNamespace(images_seen=start, device="cpu", stage="diffusion")

    def save_checkpoint(self, path):
        self.saves.append(self.module.images_seen)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("new")
        temporary.write_text(str(self.module.images_seen))
        os.replace(temporary, path)

    def is_stopped(self):
        return self.should_stop and self.global_step >= (self.fit_loop.epoch_loop.min_steps or 0)

    def train(self, *callbacks, each_batch=lambda images_seen: None):
        self.callbacks = list(callbacks)
        for callback in callbacks:
            callback.setup(self, self.module, "fit")
            callback.on_train_start(self, self.module)
        batch = self.datamodule.global_batch_size // self.accumulation
        while self.global_step < self.max_steps and not self.is_stopped():
            self.module.images_seen += batch
            self.global_step = self.module.images_seen // self.datamodule.global_batch_size
            each_batch(self.module.images_seen)
            for callback in callbacks:
                callback.on_train_batch_end(self, self.module, {}, {}, 0)
        for callback in callbacks:
            callback.on_train_end(self, self.module)
            callback.teardown(self, self.module, "fit")


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize(
    ("interval", "expected"),
    [(16, [16, 32, 48, 64, 72]), (20, [24, 40, 64, 72]), (1, [*range(8, 80, 8)]), (1000, [72])],
)
def test_checkpoints_are_counted_in_images_and_never_inside_a_step(tmp_path, accumulation, interval, expected):
    trainer = FakeTrainer(steps=9, accumulation=accumulation)
    trainer.train(saving(tmp_path, interval))
    assert trainer.saves == expected


def test_counting_goes_on_where_a_resumed_run_stands(tmp_path):
    trainer = FakeTrainer(steps=9, start=40)
    trainer.train(saving(tmp_path, 16))
    assert trainer.saves == [48, 64, 72]


def test_every_is_due_once_for_each_multiple():
    every, module = Every(20), SimpleNamespace(images_seen=0)
    trainer = FakeTrainer(steps=1)
    due = []
    for module.images_seen in (8, 16, 20, 24, 24, 32, 80, 88):
        due.append(every.due(trainer, module))
    assert due == [False, False, False, True, False, False, True, False]


def test_metrics_are_on_disk_before_the_state_that_will_not_repeat_them(tmp_path):
    trainer, order = FakeTrainer(steps=1), []
    trainer.loggers = [MetricsCSV(tmp_path), SimpleNamespace()]
    trainer.loggers[0].flush = lambda: order.append("metrics")
    trainer.save_checkpoint = lambda path: order.append("state")
    trainer._logger_connector.update_train_step_metrics = lambda: order.append("this step's")
    saving(tmp_path, 8).save(trainer)
    assert order == ["this step's", "metrics", "state"]


def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path):
    for name in ("checkpoints/.last.ckpt.99.tmp", ".status.json.99.tmp", "final/.config.json.99.tmp", ".mine", "a.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    RunFolder(tmp_path).clear_leftovers()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".mine", "a.tmp"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_with_and_without_hard_links(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "this disk has no links")

        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "source", tmp_path / "new/target"
    for content in ("one", "two"):
        source.unlink(missing_ok=True)
        source.write_text(content)
        for _ in range(2):
            place(source, target)
            assert target.read_text() == content
        assert target.samefile(source) is links
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_the_index_is_published_last(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("ldm_lab.training.callbacks.export.place", lambda source, target: order.append(target))
    for name in ("model_index.json", "unet/config.json", "vqvae/config.json"):
        (tmp_path / "final" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "final" / name).touch()
    publish(tmp_path / "final", tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in order[:-1]} == {"unet/config.json", "vqvae/config.json"}
    assert order[-1] == tmp_path / "model_index.json"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_validation_is_counted_in_images_and_comes_at_the_end(accumulation):
    trainer, validated = FakeTrainer(steps=5, accumulation=accumulation), []
    validate = Validate(16)

    class Look(Validate):
        def on_train_batch_end(self, trainer, module, *_):
            assert trainer.val_check_batch in (1, NEVER)
            if trainer.val_check_batch == 1:
                validated.append(module.images_seen)

    trainer.train(validate, Look(1))
    assert validated == [16, 32, 40]


# --- Ctrl-C, and what schedulers send


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, number, accumulation):
    before = [signal.getsignal(one) for one in STOPPING]
    trainer = FakeTrainer(steps=9, accumulation=accumulation)
    checkpoint, interrupt = saving(tmp_path, 1000), Interrupt()
    first_batch_of_step_3 = 16 + 8 // accumulation
    trainer.train(
        checkpoint, interrupt, each_batch=lambda n: n == first_batch_of_step_3 and signal.raise_signal(number)
    )
    assert (trainer.module.images_seen, trainer.saves) == (24, [24])
    assert trainer.limit_val_batches == 0, "Lightning would validate before it stops"
    assert interrupt.received == number
    assert [signal.getsignal(one) for one in STOPPING] == before


@pytest.fixture
def training():
    """An `Interrupt` that has taken over the signals."""
    interrupt, trainer = Interrupt(), FakeTrainer(steps=9)
    interrupt.on_train_start(trainer, trainer.module)
    yield interrupt
    interrupt.teardown(trainer, trainer.module, "fit")


@pytest.mark.parametrize("first", STOPPING)
def test_a_second_ctrl_c_stops_at_once(training, first):
    signal.raise_signal(first)
    with pytest.raises(Interrupted) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.value.number == signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_counts_again_only_after_a_while(training, number, monkeypatch):
    """Launchers pass on what the whole group has got."""
    signal.raise_signal(number)
    signal.raise_signal(number)
    assert training.received == number
    monkeypatch.setattr(Interrupt, "ONE_REQUEST", -1.0)
    with pytest.raises(Interrupted) as stop:
        signal.raise_signal(number)
    assert stop.value.number == number


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE])
def test_whoever_is_gone_does_not_grow_impatient(training, number, monkeypatch):
    """A terminal sends SIGHUP, and so may its shell; standard output and error are two pipes."""
    monkeypatch.setattr(Interrupt, "ONE_REQUEST", -1.0)
    for _ in range(3):
        signal.getsignal(signal.SIGTERM)(number, None)
    assert training.received == number


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt, trainer = Interrupt(), FakeTrainer(steps=9)
        interrupt.on_train_start(trainer, trainer.module)
        signal.raise_signal(signal.SIGHUP)
        assert interrupt.received is None
        interrupt.teardown(trainer, trainer.module, "fit")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_of_a_rank_that_knows_already_is_no_second_one(training):
    training.received = signal.SIGTERM  # of another rank
    signal.raise_signal(signal.SIGINT)
    assert training.received == signal.SIGTERM


def test_a_validation_is_broken_off_where_the_step_is_not(training):
    trainer = FakeTrainer(steps=9)
    training.on_validation_batch_start(trainer, trainer.module, {}, 0)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(BrokenOff):
        training.on_validation_batch_start(trainer, trainer.module, {}, 1)


@pytest.mark.parametrize("order", [1, -1])
def test_the_state_is_saved_before_a_validation_whichever_callback_comes_first(tmp_path, order):
    trainer, validate = FakeTrainer(steps=9), Validate(32)
    trainer.train(*[validate, Checkpoint(tmp_path, 24, validate)][::order])
    assert trainer.saves == [24, 32, 48, 64, 72]


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_ranks_agree_every_few_steps_whatever_is_accumulated(tmp_path, accumulation):
    """Another rank has received the signal: this one hears of it when they compare notes."""
    trainer, interrupt, asked = FakeTrainer(steps=99, accumulation=accumulation, world_size=2), Interrupt(), []

    def reduce(flag, reduce_op):
        asked.append(trainer.global_step)
        return flag.fill_(signal.SIGINT) if trainer.global_step >= 10 else flag

    trainer.strategy.reduce = reduce
    trainer.train(saving(tmp_path, 10**6), interrupt)
    assert asked == [Interrupt.EVERY, 2 * Interrupt.EVERY]
    assert trainer.saves == [2 * Interrupt.EVERY * 8]


# --- a callback that asks for an end


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("least", [None, 2, 5])
def test_a_callback_ends_the_training_after_a_whole_step(tmp_path, accumulation, least):
    """Whenever it asks: with the first batch of step 3. `trainer.min_steps` are trained before."""
    trainer, interrupt = FakeTrainer(steps=9, accumulation=accumulation), Interrupt()
    trainer.fit_loop.epoch_loop.min_steps = least

    def ask(images_seen):
        trainer.should_stop |= images_seen == 16 + 8 // accumulation

    trainer.train(saving(tmp_path, 1000), interrupt, each_batch=ask)
    assert trainer.saves == [8 * max(3, least or 0)] == [trainer.module.images_seen]
    assert trainer.limit_val_batches == 0
    assert interrupt.received is None


def test_a_wish_of_the_last_step_is_fulfilled_anyway(tmp_path):
    trainer, interrupt = FakeTrainer(steps=3), Interrupt()
    trainer.train(saving(tmp_path, 1000), interrupt, each_batch=lambda n: setattr(trainer, "should_stop", n == 24))
    assert trainer.saves == [24]
    assert trainer.limit_val_batches == 1.0, "its validation is wanted"


def test_what_a_callback_of_another_rank_asks_for_stops_all(tmp_path):
    trainer, interrupt = FakeTrainer(steps=99, world_size=2), Interrupt()
    other = [0.0, Interrupt.NO_SIGNAL]
    trainer.strategy.reduce = lambda wish, reduce_op: max(wish, torch.tensor(other.pop(0)))
    trainer.train(saving(tmp_path, 10**6), interrupt)
    assert trainer.saves == [2 * Interrupt.EVERY * 8]
    assert interrupt.received is None


@pytest.mark.parametrize("fn", ["fit", "validate"])
def test_a_wish_of_a_validation_is_fulfilled_at_its_end(training, fn):
    trainer = FakeTrainer(steps=9)
    training.setup(trainer, trainer.module, "fit")
    trainer.should_stop, trainer.state.fn = True, fn
    training.on_validation_batch_start(trainer, trainer.module, {}, 1)  # it is not broken off
    assert not trainer.is_stopped()
    training.on_validation_end(trainer, trainer.module)
    assert trainer.is_stopped() is (fn == "fit")


def test_the_reason_is_said():
    stopping = EarlyStopping("val/loss", stopping_threshold=0.5)
    trainer = SimpleNamespace(callbacks=[Timer("00:00:01:00"), stopping])
    assert Interrupt().reason(trainer) == "a callback has set trainer.should_stop"
    _, stopping.stopping_reason_message = stopping._evaluate_stopping_criteria(torch.tensor(0.25))
    assert Interrupt().reason(trainer) == "EarlyStopping: Stopping threshold reached: val/loss = 0.25 < 0.5"
    trainer.callbacks = [Timer("00:00:00:00")]
    assert Interrupt().reason(trainer) == "the time of trainer.max_time is over"
