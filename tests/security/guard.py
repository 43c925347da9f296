"""Doing something dangerous: in a copy of this process that may take neither memory nor time, and is watched."""

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

MEMORY = 2**30  # bytes of address space beyond what the process has
SECONDS = 20
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.putenv")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")


@dataclass(frozen=True)
class Outcome:
    """How it ended: "done", "refused" (a ValueError, which ends a command in one line), or "broken"."""

    kind: str
    text: str
    trespasses: list[str]


def guarded(act, folder):
    """Call `act()` under guard; it may change files in `folder` alone."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writer, "w") as pipe:
            json.dump(_attempt(act, Path(folder)), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status), f"ended by signal {os.WTERMSIG(status)}, after {SECONDS} s if it is {signal.SIGALRM}"
    return Outcome(*json.loads(text))


def refusal(act, folder):
    """The one line that `act()` is refused with, nothing having run and nothing outside of `folder` been touched."""
    outcome = guarded(act, folder)
    assert outcome.trespasses == [], outcome.trespasses
    assert outcome.kind == "refused", f"{outcome.kind}: {outcome.text}"
    assert outcome.text.isprintable(), "more than one line"
    assert len(outcome.text) < 2000
    return outcome.text


def _attempt(act, folder):
    trespasses = []
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    torch.set_num_threads(1)  # threads do not survive the fork
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.addaudithook(_watch(trespasses, folder.resolve()))
    try:
        kind, text = "done", str(act())
    except ValueError as error:
        kind, text = "refused", str(error)
    except BaseException:
        kind, text = "broken", traceback.format_exc()
    return kind, text, trespasses


def _watch(trespasses, folder):
    watching = True

    def hook(event, arguments):
        nonlocal watching
        if not watching:
            return
        watching = False  # looking at it must not be looked at
        path = arguments[0] if arguments else None
        if event in FORBIDDEN:
            trespasses.append(f"{event} {arguments}")
        elif event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            inside = isinstance(path, (str, bytes, os.PathLike)) and Path(os.fsdecode(path)).resolve()
            if inside and inside != Path(os.devnull) and not inside.is_relative_to(folder):
                trespasses.append(f"{event} {path}")
        watching = True

    return hook
