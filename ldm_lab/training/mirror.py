"""Keeps a copy of each stage's folder in a store, from which an empty machine continues: `paths.mirror=s3://...`.

    <paths.mirror>/<name>/<stage>/mirror.json      the files of the folder: size and hash
    <paths.mirror>/<name>/<stage>/files/<hash>     their contents

`mirror.json` is written last and as a whole, so the copy is always that of one moment, whenever a process is killed.
The newest checkpoint is verified before it is copied; `previous.ckpt` and hidden files are not copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from ldm_lab.checkpoints import checkpoint
from ldm_lab.runs.folder import RunFolder
from ldm_lab.training.callbacks.export import publish
from ldm_lab.training.checkpoint_io import place
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.hub import INDEX
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.stores import MissingError, Store
from ldm_lab.utils.terminal import is_first_process, say
from ldm_lab.utils.urls import URL
from ldm_lab.utils.version import FORMAT, FORMAT_KEY

MANIFEST, SNAPSHOT = "mirror.json", ".mirror"
REPLACED = (".ckpt", ".safetensors")  # written under other names and renamed: a link keeps the content of a moment
LEFT_OUT = (checkpoint.PREVIOUS, "wandb")
HASH = re.compile(r"[0-9a-f]{64}")


class Mirror:
    """The copy of one stage's folder.

    Args:
        root: `paths.mirror`.
        run: the stage's folder, `<runs>/<name>/<stage>`.

    Raises:
        UserError: no store has this scheme.
    """

    def __init__(self, root: str, run: RunFolder) -> None:
        name, stage = run.folder.parent.name, run.folder.name
        self.run, self.store = run, Store(URL(str(root)) / name / stage, "paths.mirror")
        self._hashes: dict[str, tuple[object, dict[str, Any]]] = {}  # name -> state of the file, its entry
        self._kept: set[str] | None = None  # hashes in the store
        self._saving = threading.Lock()

    def begin(self, _: Path | None = None) -> None:
        """Copy in the background what is new, unless the copy before is still on its way."""
        if self._saving.acquire(blocking=False):
            threading.Thread(target=self._save_and_go_on, daemon=True).start()

    def _save_and_go_on(self) -> None:
        try:
            self._save()
        except UserError as error:
            say(f"{error}; training goes on, and the next checkpoint is tried")
        finally:
            self._saving.release()

    def save(self) -> None:
        """Copy what is new. Raises `StoreError` if the store cannot be written."""
        with self._saving:
            self._save()

    def _save(self) -> None:
        with self._snapshot() as folder:
            last = folder / "checkpoints" / checkpoint.LAST
            if not last.is_file():
                return
            checkpoint.verify(last)
            seen = checkpoint.describe(last)["images_seen"]
            entries = {name: self._entry(name, folder / name) for name in _files(folder)}
            if self._kept is None:
                self._kept = {PurePosixPath(found.name).name for found in self._objects()}
            for name, entry in entries.items():
                if entry["hash"] not in self._kept:
                    self.store.upload(folder / name, f"files/{entry['hash']}")
                    self._kept.add(entry["hash"])
            manifest = folder / MANIFEST
            finished = bool(self.run.status().get("finished"))
            content = {FORMAT_KEY: FORMAT, "images_seen": seen, "finished": finished, "files": entries}
            manifest.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
            self.store.upload(manifest, MANIFEST)
        for old in self._kept - {entry["hash"] for entry in entries.values()}:
            self.store.remove(f"files/{old}")
            self._kept.discard(old)

    def _objects(self) -> Iterator[Any]:
        with contextlib.suppress(MissingError):  # nothing is there yet
            yield from (found for found in self.store.objects() if found.name.startswith("files/"))

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Path]:
        """A folder with the files of this moment, by links where possible."""
        folder = self.run.folder / SNAPSHOT
        shutil.rmtree(folder, ignore_errors=True)  # of a killed process
        try:
            for name in _files(self.run.folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # replaced at this moment
                    (place if name.endswith(REPLACED) else shutil.copy2)(self.run.folder / name, folder / name)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ino if name.endswith(REPLACED) else 0)
        if self._hashes.get(name, (None, {}))[0] != state:
            self._hashes[name] = state, {"size": status.st_size, "hash": _hash(path)}
        return self._hashes[name][1]

    def manifest(self) -> dict[str, Any] | None:
        """Content of `mirror.json`, checked; `None` without this object.

        Raises:
            StoreError: the store cannot be read.
            LoadError: the object is not what `save` writes.
        """
        with tempfile.TemporaryDirectory() as folder:  # several ranks may ask at the same time
            try:
                self.store.download(MANIFEST, Path(folder, MANIFEST), self.store.find(MANIFEST).size)
                found = read_json(Path(folder, MANIFEST))
            except MissingError:
                return None
        files = found.get("files")
        if not isinstance(found.get("images_seen"), int) or not isinstance(files, dict):
            raise LoadError(f"{self.store.root / MANIFEST}: does not describe a stage's files")
        for name, entry in files.items():
            parts = PurePosixPath(name).parts
            sound = isinstance(entry, dict) and isinstance(entry.get("size"), int) and parts
            if not sound or not HASH.fullmatch(str(entry.get("hash"))) or any(p[0] in "./\\" for p in parts):
                raise LoadError(f"{self.store.root / MANIFEST}: {name!r} is no file of a stage")
        return found

    def restore(self) -> bool:
        """Copy the stage's files from the store if these are newer than the folder; returns whether they were.

        Raises:
            LoadError: an object is not the one that `mirror.json` describes.
        """
        found = self.manifest()
        here = self.run.images_seen()
        if found is None or (found["images_seen"], bool(found.get("finished"))) <= (
            -1 if here is None else here,
            bool(self.run.status().get("finished")),
        ):
            return False
        folder = self.run.folder / SNAPSHOT
        try:
            for name, entry in found["files"].items():
                self.store.download(f"files/{entry['hash']}", folder / name, entry["size"])
                if _hash(folder / name) != entry["hash"]:
                    raise LoadError(f"{self.store.root / 'files' / entry['hash']}: damaged; remove it and {MANIFEST}")
            last = f"checkpoints/{checkpoint.LAST}"
            for name in sorted(found["files"], key=lambda name: name == last):  # with it the folder holds a run
                (self.run.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, self.run.folder / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if (self.run.final / INDEX).is_file():
            publish(self.run.final, self.run.folder.parent)
        return True


def of(paths: dict[str, Any], run: RunFolder) -> Mirror | None:
    """The mirror of a stage; `None` without `paths.mirror`."""
    return Mirror(paths["mirror"], run) if paths.get("mirror") else None


def restore(configs: Sequence[dict[str, Any]]) -> None:
    """Let the stages of a command continue from their mirrors, where these are newer than the run's folder.

    Every process may call this: the first one on a disk copies, the others wait.

    Raises:
        UserError: `resume=never`, but the mirror holds the run; or the store cannot be read or written.
    """
    for config in configs:
        run = RunFolder(Path(config["paths"]["stage"]))
        mirror = of(config["paths"], run)
        if mirror is None:
            continue
        if is_first_process():
            mirror.store.require_writable()
        if config["resume"] == "never":
            if mirror.manifest() is not None:
                raise UserError(f"resume=never, but {mirror.store.root} holds this run: choose another name=")
            continue
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(run.folder.parent / ".mirror.lock"):
            if mirror.restore():
                say(f"{run.folder} comes from {mirror.store.root}, at {run.images_seen():,} images")


def _files(folder: Path) -> list[str]:
    """Relative paths of a stage's files that are mirrored."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    kept = [path for path in found if not any(p.startswith(".") or p in LEFT_OUT for p in path.parts)]
    return sorted(path.as_posix() for path in kept if path.name != MANIFEST)


def _hash(path: Path) -> str:
    """BLAKE2 of a file's content."""
    found = blake2b(digest_size=32)
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            found.update(piece)
    return found.hexdigest()
