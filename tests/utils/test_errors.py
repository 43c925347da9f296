"""How a command ends: signals wherever they come in, what the user can mend, faults of code."""

import errno
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from ldm_lab.data.loading import Loader
from ldm_lab.utils.errors import UserError, doing, reporting
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.signals import STOPPING, Interrupted, held, listen

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
    with pytest.raises(SystemExit) as end, reporting("testing"):
        fails_after_a_signal()
    assert end.value.code == 128 + TERM
    assert capsys.readouterr().err == "stopped\n"


# --- a closed terminal


def test_a_closed_terminal_is_a_signal_but_not_under_nohup():
    with pytest.raises(Interrupted) as end:
        signal.raise_signal(signal.SIGHUP)
    assert end.value.number == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` starts a process
    listen()
    signal.raise_signal(signal.SIGHUP)


# --- errors


def ended(error, what="testing"):
    """What the process would end with."""
    with pytest.raises(SystemExit) as end, reporting(what):
        raise error
    return end.value.code


def test_what_the_user_can_mend_is_one_line():
    assert ended(UserError("a wrong\nvalue")) == "error: a wrong value"
    error = UserError("three things")
    error.__notes__ = ["one", "two"]
    assert ended(error) == "error: three things\n  one\n  two"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR])
def test_what_the_system_refuses_names_the_file(number):
    line = ended(OSError(number, os.strerror(number), "/data/x"))
    assert line == f"error: /data/x: {os.strerror(number)} (while testing)"


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, OSError, ConnectionResetError])
def test_a_fault_of_code_passes_with_a_line_that_says_what_was_being_done(kind, capsys):
    error = kind("unforeseen")
    with pytest.raises(kind) as passed, reporting("running train.py"), doing("training stage diffusion of runs/x"):
        raise error
    assert passed.value is error
    said = capsys.readouterr().err
    assert said == f"unexpected {kind.__name__} while training stage diffusion of runs/x, while running train.py:\n"


class Failing(torch.utils.data.Dataset):
    """Raises what it is given, where a loader's worker reads it."""

    def __init__(self, kind, message):
        self.kind, self.message = kind, message

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.kind(self.message)


@pytest.mark.parametrize("kind", [UserError, LoadError])
def test_a_user_error_of_a_loader_s_worker_keeps_its_line(kind):
    message = "data.root=/a: b.png: cannot be read"
    with pytest.raises(kind) as end:
        list(Loader(Failing(kind, message), num_workers=1))
    assert str(end.value) == message


def test_a_fault_of_code_in_a_worker_says_where_it_happened():
    with pytest.raises(ValueError, match=r"(?s)Original Traceback.*in __getitem__.*a plug-in's"):
        list(Loader(Failing(ValueError, "a plug-in's"), num_workers=1))
