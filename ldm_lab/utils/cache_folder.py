"""The folder of what runs share, `paths.cache`. A store holds the latents of all machines, a folder here all else."""

from __future__ import annotations

import os
from pathlib import Path

from ldm_lab.utils import shell, writing
from ldm_lab.utils.stores import Store
from ldm_lab.utils.urls import URL, is_url


def default_folder() -> Path:
    """`paths.cache` of configs/paths/default.yaml."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "."), ".cache"))
    return Path(os.environ.get("LDM_LAB_CACHE") or home / "ldm_lab")


def local(cache_dir: str | Path) -> Path:
    """The folder of `paths.cache` on this machine: the default folder if `paths.cache` is a store."""
    return default_folder() if is_url(cache_dir) else shell.path(cache_dir)


def require_writable(cache_dir: str | Path) -> None:
    """Check before any work whether `paths.cache` can be written. Raises `SaveError` or `StoreError`."""
    writing.require_writable(local(cache_dir), "paths.cache=")
    if is_url(cache_dir):
        Store(URL(str(cache_dir)), "paths.cache").require_writable()
