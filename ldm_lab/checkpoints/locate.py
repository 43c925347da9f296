"""Resolves a source to a model on disk.

runs/x        the run's result; if the run is not finished or trains on, its newest state
runs/x@2M     the run's snapshot at two million training images
FOLDER        a pipeline folder; a snapshot is one too
FILE          a training checkpoint, or a checkpoint of CompVis/latent-diffusion
OWNER/MODEL   a pipeline folder on the hub, optionally with `@revision`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_lab.checkpoints import checkpoint
from ldm_lab.utils import hub, shell
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.hub import INDEX
from ldm_lab.utils.lengths import parse_images, short
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.urls import is_url, masked

RESULTS = {"autoencoder": "config.json", "diffusion": INDEX}  # written last, so this file marks a complete result
SNAPSHOTS = "snapshots"
TOLERANCE = 0.01  # relative to the requested images: a step may end up to a global batch after the multiple


@dataclass(frozen=True)
class State:
    """A model at one point of its training.

    Attributes:
        source: the named folder or file, without `@...`.
        path: the folder of a result or a snapshot, or a training checkpoint.
        images_seen: training images of a snapshot or a checkpoint; `None` for a result or a foreign file.
    """

    source: Path
    path: Path
    images_seen: int | None = None


def find(source: str | Path, **download: Any) -> State:  # noqa: ANN401
    """Locate the pipeline that `source` names.

    Args:
        source: see above.
        download: see `hub.fetch`.

    Raises:
        LoadError: there is no such pipeline; for a missing snapshot the message lists the existing snapshots.
    """
    local = hub.local(source, **download)
    if hub.is_name(source):
        model = str(source).partition("@")[0].rpartition("/")[2]  # samples go beside that name, not into the cache
        return State(Path(model), local)
    if state := search(source, "diffusion"):
        return state
    raise LoadError(f"{source}: no pipeline ({INDEX}) and no diffusion checkpoint")


def search(source: str | Path, stage: str) -> State | None:
    """The state that `source` names (of one stage, if it is a run); `None` for a folder without any state.

    The newest state of an unfinished run is its last intact checkpoint, or a newer snapshot (after a power cut, say):
    the same command will reach exactly that state again.

    Raises:
        LoadError: there is no such file, folder or snapshot, or it is an address in a store.
    """
    if is_url(source):
        advice = "with its paths.mirror= the same train.py command brings a run here"
        raise LoadError(f"{masked(str(source))}: models are read from a folder of this machine; {advice}")
    path = shell.path(source)
    if path.is_file():
        return _checkpoint(path, path)
    if not path.exists():
        return _snapshot(str(path))
    folder = stage_folder(path, stage)
    if not trains_on(folder):
        for result in (path, folder / "final"):
            if (result / RESULTS[stage]).is_file():
                is_ours = result.parent.name == SNAPSHOTS and result.name.isdigit()  # the hub's are hashes
                return State(path, result, int(result.name) if is_ours else None)
    newest = checkpoint.newest(folder / "checkpoints", say_once)
    states = [_checkpoint(path, newest)] if newest else []
    states += [State(path, taken, images) for images, taken in snapshots(folder / SNAPSHOTS).items()]
    return max(states, key=lambda state: state.images_seen, default=None)


def trains_on(stage_folder: Path) -> bool:
    """Whether a stage has started and is not finished, perhaps after an earlier, shorter run."""
    status = stage_folder / checkpoint.STATUS
    return status.is_file() and not read_json(status).get("finished")


def snapshots(folder: Path) -> dict[int, Path]:
    """The complete snapshots in `<stage>/snapshots/`, oldest first: training images -> pipeline folder."""
    whole = {int(path.parent.name): path.parent for path in folder.glob(f"*/{INDEX}") if path.parent.name.isdigit()}
    return dict(sorted(whole.items()))


def _checkpoint(source: Path, path: Path) -> State:
    return State(source, path, checkpoint.images_seen(path))


def stage_folder(path: Path, stage: str) -> Path:
    """The folder of a stage in a run's folder, or `path` itself."""
    return path / stage if (path / stage).is_dir() else path


def _snapshot(source: str) -> State:
    """`runs/x@2M`: the snapshot at exactly that count, else the nearest within `TOLERANCE`."""
    run, _, text = source.rpartition("@")
    if not run or not Path(run).is_dir():
        raise LoadError(f"{source}: no such file or folder")
    taken = snapshots(stage_folder(Path(run), "diffusion") / SNAPSHOTS)
    if not taken:
        raise LoadError(f"{source}: {run} has no snapshots; train.py snapshots=1M takes one every million images")
    there = f"there are {', '.join(map(short, taken))}"
    try:
        images = parse_images(text, source)
    except UserError as error:
        raise LoadError(f"{source}: {text!r} is no number of images such as 2M; {there}") from error
    nearest = min(taken, key=lambda count: abs(count - images))
    if abs(nearest - images) > TOLERANCE * images:
        raise LoadError(f"{source}: there is no such snapshot; {there}")
    return State(Path(run), taken[nearest], nearest)
