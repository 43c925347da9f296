"""Reads and writes a stage's folder; checks whether the stage is finished and whether a command may continue it."""

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

KEY = re.compile(r"[\w-]+([./][\w-]+)*", re.ASCII)  # a dotted key of a config

MARKS = "data.npz"
SHOWN_IN_LINE = 3  # changed settings; if there are more, each has its own line


@dataclass(frozen=True)
class RunFolder:
    """A stage's folder: config.yaml, data.npz, checkpoints/, metrics.csv, samples/, final/, status.json."""

    folder: Path  # <runs>/<name>/<stage>/

    @property
    def final(self) -> Path:
        """Folder of the stage's result."""
        return self.folder / "final"

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint, which may be corrupt."""
        return self.folder / "checkpoints" / checkpoint.LAST

    def newest(self, report: Callable[[str], Any]) -> Path | None:
        """The newest intact checkpoint (see `checkpoint.newest`)."""
        return checkpoint.newest(self.last.parent, report)

    def images_seen(self) -> int | None:
        """Training images up to the newest intact checkpoint; `None` without one."""
        try:
            newest = self.newest(lambda damages: None)
            return newest and checkpoint.describe(newest)["images_seen"]
        except LoadError:
            return None

    def status(self) -> dict[str, Any]:
        """Content of `status.json`; empty without this file."""
        path = self.folder / checkpoint.STATUS
        return read_json(path) if path.is_file() else {}

    def write_status(self, **values: Any) -> None:  # noqa: ANN401
        """Write `status.json`."""
        write_json(self.folder / checkpoint.STATUS, {FORMAT_KEY: FORMAT, **values})

    def has_state(self) -> bool:
        """Whether the folder holds a trained state; a start that failed before its first checkpoint leaves none."""
        states = (self.last, self.last.with_name(checkpoint.PREVIOUS))
        return any(path.is_file() for path in states) or self.final.is_dir()

    def started_with(self) -> dict[str, Any] | None:
        """The config that the run began with; `None` without a state. Raises `LoadError` for an invalid config."""
        path = self.folder / "config.yaml"
        if not self.has_state() or not path.is_file():
            return None
        config = read_yaml(path)
        config.pop(FORMAT_KEY, None)
        if not isinstance(config.get("max_images"), int):
            raise LoadError(f"{path}: max_images={config.get('max_images')!r}: is no config of a run")
        for key, value in flatten(config).items():
            # OmegaConf would resolve an interpolation in the file: ${oc.env:...} reveals secrets.
            if not KEY.fullmatch(key) or "${" in str(value):
                raise LoadError(f"{path}: {key}={value!r}: is no config of a run")
        return config

    def clear_leftovers(self) -> None:
        """Remove the temporary files of a killed process (see `writing.replacing`)."""
        for path in [path for path in self.folder.rglob(".*.tmp") if path.is_file()]:
            path.unlink()

    def check(self, config: dict[str, Any], typed: Collection[str] = ()) -> list[str]:
        """Check whether a stage with this config may continue in the folder; changes no file.

        `resume=auto` continues a run, `never` requires an empty folder, `force` accepts changed settings.

        Args:
            config: the stage's resolved config, as plain data.
            typed: keys that the user has set.

        Returns:
            Lines for the user on settings that the run's version or this version of the package does not know.

        Raises:
            UserError: the folder holds a run with other settings, or `resume` forbids to continue.
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
        messages = {"are new, and have their defaults": changes.added, "no longer exist": changes.dropped}
        start = f"{self.folder} was written by another version: these settings"
        return [f"{start} {message}: {', '.join(settings)}" for message, settings in messages.items() if settings]

    def write_marks(self, marks: dict[str, np.ndarray]) -> None:
        """Write `data.npz`: a four-byte hash of each image (see `ImageDataModule.marks`)."""
        with replacing(self.folder / MARKS) as temporary, open(temporary, "wb") as file:
            np.savez(file, **marks)

    def check_marks(self, marks: dict[str, np.ndarray], resume: str) -> None:
        """Compare the current images with the run's, by content and not by path; changes no file.

        Args:
            marks: hashes of the current images, see `ImageDataModule.marks`.
            resume: `force` accepts other images.

        Raises:
            UserError: the images differ.
            LoadError: `data.npz` is corrupt.
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
        old, new = (Counter((name, mark) for name in marks for mark in sets[name].tolist()) for sets in (before, marks))
        raise UserError(
            f"{self.folder} was started with other images: {(new - old).total():,} added and"
            f" {(old - new).total():,} missing of {old.total():,} (a changed image counts as both)."
            " Choose another name=, or resume=force to go on with these"
        )

    def finished(self, max_images: int, autoencoder: str | None) -> dict[str, Any] | None:
        """The status, if the stage is finished at this length and with this autoencoder (a fingerprint); else `None`.

        Raises:
            UserError: the stage was trained on another autoencoder.
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
        """Write `config.yaml`; creates the folder if there is none."""
        with replacing(self.folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump({FORMAT_KEY: FORMAT, **config}, sort_keys=False), encoding="utf-8")
