"""Which state of a model a source names.

runs/x        the result of the run; where it is not finished or trains on, its newest state
runs/x@2M     its snapshot at two million training images
FOLDER        a pipeline folder, a snapshot among them
FILE          a training checkpoint, or one of CompVis/latent-diffusion
OWNER/MODEL   a pipeline folder on the hub, `@revision` behind it if need be
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

RESULTS = {"autoencoder": "config.json", "diffusion": INDEX}  # written last: what makes a folder a stage's result
SNAPSHOTS = "snapshots"
TOLERANCE = 0.01  # of the images asked for: a step ends up to a global batch after the multiple it crosses


@dataclass(frozen=True)
class State:
    """A state of a model.

    Attributes:
        source: the folder or file that was named, without `@...`.
        path: what holds the state: the folder of a result or a snapshot, or a training checkpoint.
        images_seen: training images of a snapshot or a checkpoint; `None` for a result, or what is not of our making.
    """

    source: Path
    path: Path
    images_seen: int | None = None


def find(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **download: Any,  # noqa: ANN401
) -> State:
    """The state of a pipeline that `source` names.

    Args:
        source: see above.
        revision: branch, tag or commit of a model on the hub.
        cache_dir: where models of the hub are kept; None leaves it to `huggingface_hub`.
        local_files_only: take what was downloaded before, or fail.
        download: see `hub.fetch`.

    Raises:
        LoadError: nothing of the kind is there; where a snapshot was asked for, the message lists those there are.
    """
    if hub.is_name(source):
        model = str(source).partition("@")[0].rpartition("/")[2]  # samples of it go beside that name, not into a cache
        return State(Path(model), hub.fetch(str(source), revision, cache_dir, local_files_only, **download))
    if revision:
        raise LoadError(f"{source}: revision={revision} is for names on the hub, and this is none")
    if state := search(source, "diffusion"):
        return state
    raise LoadError(f"{source}: no pipeline ({INDEX}) and no diffusion checkpoint")


def search(source: str | Path, stage: str) -> State | None:
    """The state that `source` names, of a run that of one stage; `None` for a folder without any.

    The newest state of an unfinished run is its last whole checkpoint, or a snapshot where that is ahead of it (after a
    power cut, say): the same command will pass through that very state again.

    Raises:
        LoadError: there is no such file, folder or snapshot.
    """
    path = shell.path(source)
    if path.is_file():
        return _checkpoint(path, path)
    if not path.exists():
        return _snapshot(str(path))
    folder = _stage_folder(path, stage)
    if not trains_on(folder):
        for result in (path, folder / "final"):
            if (result / RESULTS[stage]).is_file():
                is_ours = result.parent.name == SNAPSHOTS and result.name.isdigit()  # the hub's cache has such a folder
                return State(path, result, int(result.name) if is_ours else None)
    newest = checkpoint.newest(folder / "checkpoints", say_once)
    states = [_checkpoint(path, newest)] if newest else []
    states += [State(path, taken, images) for images, taken in snapshots(folder / SNAPSHOTS).items()]
    return max(states, key=lambda state: state.images_seen, default=None)


def trains_on(stage_folder: Path) -> bool:
    """Whether a stage has begun and not ended, perhaps after a first end."""
    status = stage_folder / checkpoint.STATUS
    return status.is_file() and not read_json(status).get("finished")


def snapshots(folder: Path) -> dict[int, Path]:
    """The whole snapshots in `<stage>/snapshots/`, oldest first: training images -> pipeline folder."""
    whole = {int(path.parent.name): path.parent for path in folder.glob(f"*/{INDEX}") if path.parent.name.isdigit()}
    return dict(sorted(whole.items()))


def _checkpoint(source: Path, path: Path) -> State:
    return State(source, path, checkpoint.images_seen(path))


def _stage_folder(path: Path, stage: str) -> Path:
    return path / stage if (path / stage).is_dir() else path


def _snapshot(source: str) -> State:
    """`runs/x@2M`: the snapshot of that count, else the nearest one within `TOLERANCE`."""
    run, _, text = source.rpartition("@")
    if not run or not Path(run).is_dir():
        raise LoadError(f"{source}: no such file or folder")
    taken = snapshots(_stage_folder(Path(run), "diffusion") / SNAPSHOTS)
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
