"""A stage's folder: what it holds, whether it is finished, and whether a command may go on in it."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm_lab.checkpoints import checkpoint
from ldm_lab.runs.changes import compare
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import flatten
from ldm_lab.utils.reading import LoadError, read_json, read_yaml
from ldm_lab.utils.version import FORMAT, FORMAT_KEY
from ldm_lab.utils.writing import replacing, write_json

KEY = re.compile(r"[\w-]+([./][\w-]+)*", re.ASCII)  # of a config, flattened

MARKS = "data.npz"
SHOWN_IN_LINE = 3  # changed settings; more have a line each


@dataclass(frozen=True)
class RunFolder:
    """`<runs>/<name>/<stage>/`: config.yaml, data.npz, checkpoints/, metrics.csv, samples/, final/, status.json."""

    folder: Path

    @property
    def final(self) -> Path:
        """The result."""
        return self.folder / "final"

    @property
    def last(self) -> Path:
        """The newest state, unless it is damaged."""
        return self.folder / "checkpoints" / checkpoint.LAST

    def newest(self, report: Callable[[str], Any]) -> Path | None:
        """The newest whole state (see `checkpoint.newest`)."""
        return checkpoint.newest(self.last.parent, report)

    def images_seen(self) -> int | None:
        """Training images up to the newest whole state; `None` where there is none."""
        try:
            newest = self.newest(lambda damages: None)
            return newest and checkpoint.describe(newest)["images_seen"]
        except LoadError:
            return None

    def status(self) -> dict[str, Any]:
        """What `status.json` says; nothing where there is none."""
        path = self.folder / checkpoint.STATUS
        return read_json(path) if path.is_file() else {}

    def write_status(self, **values: Any) -> None:  # noqa: ANN401
        """Write `status.json`."""
        write_json(self.folder / checkpoint.STATUS, {FORMAT_KEY: FORMAT, **values})

    def has_state(self) -> bool:
        """Whether anything was trained here; a start that failed before its first checkpoint binds nobody."""
        states = (self.last, self.last.with_name(checkpoint.PREVIOUS))
        return any(path.is_file() for path in states) or self.final.is_dir()

    def started_with(self) -> dict[str, Any] | None:
        """The config of what was trained here; `None` where nothing was. Raises `LoadError` for what is none."""
        path = self.folder / "config.yaml"
        if not self.has_state() or not path.is_file():
            return None
        config = read_yaml(path)
        config.pop(FORMAT_KEY, None)
        if not isinstance(config.get("max_images"), int):
            raise LoadError(f"{path}: max_images={config.get('max_images')!r}: is no config of a run")
        for key, value in flatten(config).items():
            # What was resolved before it was written would be resolved again: ${oc.env:...} tells secrets.
            if not KEY.fullmatch(key) or "${" in str(value):
                raise LoadError(f"{path}: {key}={value!r}: is no config of a run")
        return config

    def clear_leftovers(self) -> None:
        """Remove what a killed process was writing (see `writing.replacing`)."""
        for path in [path for path in self.folder.rglob(".*.tmp") if path.is_file()]:
            path.unlink()

    def check(self, config: dict[str, Any], typed: Collection[str] = ()) -> list[str]:
        """Compare the folder with the config of a stage that would go on in it; nothing is touched.

        `resume=auto` continues what is there, `never` wants an empty folder, `force` takes changed settings.

        Args:
            config: the stage's config, resolved, as plain data.
            typed: keys that the user has given a value.

        Returns:
            What to say of settings that only one of two versions of this package knows, a line each.

        Raises:
            UserError: the folder holds something else.
        """
        resume, max_images = config["resume"], config["max_images"]
        if resume not in ("auto", "never", "force"):
            raise UserError(f"resume={resume}: must be auto, never or force")
        if resume == "never" and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"resume=never, but {self.folder} is not empty: choose another name=")
        old = self.started_with()
        if old is None:
            return []
        if max_images < old["max_images"] and max_images != (seen := self.images_seen()):
            here = f" or finished where it stands (max_images={seen})," if seen and seen < old["max_images"] else ""
            raise UserError(
                f"max_images={max_images}, but {self.folder} is made for {old['max_images']}:"
                f" a run can be continued,{here} not shortened; choose another name="
            )
        changes = compare(old, config, typed)
        if resume == "auto" and (changed := changes.changed):
            many = len(changed) > SHOWN_IN_LINE
            what = f"{len(changed)} other settings, listed below" if many else f"other settings: {'; '.join(changed)}"
            error = UserError(
                f"{self.folder} was started with {what}. Choose another name=, or resume=force to go on with the new"
                " ones"
            )
            error.__notes__ = changed if many else []
            raise error
        said = {"did not know, with their defaults now": changes.added, "had, and nothing knows now": changes.dropped}
        start = f"{self.folder} is of another version: settings that it"
        return [f"{start} {what}: {', '.join(keys)}" for what, keys in said.items() if keys]

    def write_marks(self, marks: dict[str, np.ndarray]) -> None:
        """Write `data.npz`: which images are trained on (see `ImageDataModule.marks`), four bytes for each."""
        with replacing(self.folder / MARKS) as temporary, open(temporary, "wb") as file:
            np.savez(file, **marks)

    def check_marks(self, marks: dict[str, np.ndarray], resume: str) -> None:
        """Compare the images with those that were trained on, wherever they lie now; nothing is touched.

        Args:
            marks: see `ImageDataModule.marks`.
            resume: `force` takes others.

        Raises:
            UserError: they are others.
            LoadError: `data.npz` is damaged.
        """
        path = self.folder / MARKS
        if resume == "force" or not self.has_state() or not path.is_file():
            return
        try:
            with np.load(path, allow_pickle=False) as file:
                before = {name: file[name].ravel() for name in marks}
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise LoadError(f"{path}: not readable ({error}); resume=force takes the images as they are") from error
        if all(np.array_equal(before[name], now) for name, now in marks.items()):
            return
        old, new = (Counter((name, mark) for name in marks for mark in some[name].tolist()) for some in (before, marks))
        raise UserError(
            f"{self.folder} was started with other images: {(new - old).total():,} added and"
            f" {(old - new).total():,} missing of {old.total():,} (one that has changed counts as both)."
            " Choose another name=, or resume=force to go on with these"
        )

    def finished(self, max_images: int, autoencoder: str | None) -> dict[str, Any] | None:
        """The status, if this stage is done at that length and with that first stage (its fingerprint).

        Raises:
            UserError: it was trained on another first stage.
        """
        status = self.status()
        if self.has_state() and status.get("autoencoder", autoencoder) != autoencoder:
            raise UserError(
                f"{self.folder} was trained on another autoencoder ({status['autoencoder']}, now {autoencoder}):"
                f" choose another name=, or go on with its own, autoencoder={self.last}"
            )
        done = status.get("finished") and status.get("max_images") == max_images and self.final.is_dir()
        return status if done else None

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.yaml`, making the folder where there is none."""
        with replacing(self.folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump({FORMAT_KEY: FORMAT, **config}, sort_keys=False), encoding="utf-8")
