"""How a command ends: a signal is heeded wherever it comes in."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from ldm_lab.data.datamodule import Loader
from ldm_lab.errors import STOPPING, Interrupted, ended_by, held, listen

TERM = signal.SIGTERM


@pytest.fixture(autouse=True)
def listening():
    """What `train.py` does with signals, for one test."""
    before = [signal.getsignal(number) for number in STOPPING]
    listen()
    yield
    for number, handler in zip(STOPPING, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_is_held_back_to_the_end_of_the_block():
    done = []

    def block():
        with held():
            with held():
                os.kill(os.getpid(), TERM)
                done.append("inside")
            done.append("past the inner block")
        done.append("past the outer block")

    with pytest.raises(Interrupted) as end:
        block()
    assert end.value.number == TERM
    assert done == ["inside", "past the inner block"]
    with pytest.raises(Interrupted):  # and not any longer
        os.kill(os.getpid(), TERM)


ARMED: list[int] = []  # hooks of a fork stay: they act where this has something
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=lambda: ARMED and os.kill(os.getpid(), ARMED.pop()))


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_while_a_loader_forks_is_not_lost(capfd):
    """What is raised in a hook of `os.fork` Python prints and forgets: training would go on."""
    images = torch.zeros(8, 1)
    for kind in (DataLoader, Loader):
        ARMED.append(TERM)
        try:
            assert len(list(kind(images, num_workers=1, multiprocessing_context="fork"))) == 8
            heeded = False
        except Interrupted:
            heeded = True
        assert heeded == (kind is Loader)


def fails_after_a_signal():
    try:
        os.kill(os.getpid(), TERM)
    finally:
        raise RuntimeError("Please call `iter(combined_loader)` first.")


def test_a_clean_up_that_fails_after_a_signal_is_no_error(capsys):
    """Lightning asks for the length of a loader that was never there."""
    with pytest.raises(SystemExit) as end, ended_by(RuntimeError):
        fails_after_a_signal()
    assert end.value.code == 128 + TERM
    assert capsys.readouterr().err == "stopped\n"


def test_other_errors_pass(capsys):
    with pytest.raises(RuntimeError, match="unforeseen"), ended_by(ValueError):
        raise RuntimeError("unforeseen")
    with pytest.raises(SystemExit, match="error: a wrong value"), ended_by(ValueError):
        raise ValueError("a wrong\nvalue")
