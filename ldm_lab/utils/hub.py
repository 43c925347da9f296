"""Downloads models from the Hugging Face hub: `owner/model`, or `owner/model@revision`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ldm_lab.utils import shell
from ldm_lab.utils.errors import first_line
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.weights import OWN_STEM, STEM, choose, shards, variants

log = logging.getLogger(__name__)

NAME = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<model>\w[\w.-]*)(@\w[\w.-]*)?", re.ASCII)
FILES = (".ckpt", ".pt", ".safetensors", ".yaml")  # such a name means a file, even if the file is missing

INDEX, CONFIG = "model_index.json", "config.json"
DOWNLOAD = ("revision", "cache_dir", "token", "local_files_only", "force_download")  # arguments of every download
PIPELINES = ("LDMPipeline", "LatentDiffusionUncondPipeline")  # class names in `model_index.json`, today and in 2022

# Seconds to wait for the hub's first response, unless HF_HUB_ETAG_TIMEOUT is set, as a mistyped path must not hang
# on a machine without network.
PATIENCE = "5"


def is_name(source: str | Path) -> bool:
    """Whether `source` may name a model on the hub.

    Not if its first part is a local folder: a mistyped `runs/x` causes no network request.
    """
    found = NAME.fullmatch(str(source))
    return bool(found) and not found["model"].endswith(FILES) and not Path(found["owner"]).is_dir()


def local(source: str | Path, subfolder: str | None = None, **download: Any) -> Path:  # noqa: ANN401
    """The local path of a source; a model on the hub is downloaded first.

    Args:
        source: a path, or a name on the hub.
        subfolder: folder of a single network, "" for the top folder; None: the whole model.
        download: see `fetch`.

    Raises:
        LoadError: as `fetch`; or a local path comes with a revision.
    """
    if is_name(source):
        return fetch(str(source), subfolder=subfolder, **download) / (subfolder or "")
    if revision := download.get("revision"):
        raise LoadError(f"{source}: revision={revision} is for names on the hub, and this is none")
    return shell.path(source) / (subfolder or "")


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a download among some keyword arguments, and the others."""
    download = {key: value for key, value in options.items() if key in DOWNLOAD}
    return download, {key: value for key, value in options.items() if key not in DOWNLOAD}


def fetch(
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    *,
    force_download: bool = False,
    token: str | bool | None = None,
    weights: bool = True,
    **selected: Any,  # noqa: ANN401
) -> Path:
    """Download the missing files of a model on the hub into the cache; returns its local folder.

    It downloads only loadable files: the configs, and for each network the weights that `weights.choose` takes. The
    environment variables and login of `huggingface_hub` apply (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` ...). If the hub
    does not respond, the copy in the cache is used, with a warning.

    Args:
        name: `owner/model` or `owner/model@revision`.
        revision: a branch, tag or commit; None: the revision in `name`, else the main branch.
        cache_dir: the cache; None: the cache of `huggingface_hub`.
        local_files_only: use only the cache.
        force_download: download files again that are in the cache.
        token: access token instead of the login; False: no token.
        weights: False fetches only the configs.
        selected: see `Selection`.

    Raises:
        LoadError: `huggingface_hub` is not installed; the model, its revision or the variant does not exist or is
            not accessible; the hub is unreachable and the cache has no copy; or this is another kind of pipeline.
    """
    snapshot_download, OfflineModeIsEnabled = _library(name)  # noqa: N806
    repository, revision = _repository(name, revision)
    trouble = OfflineModeIsEnabled("local_files_only") if local_files_only else _trouble(repository, revision, token)
    options = {"force_download": force_download, "token": token, "local_files_only": trouble is not None}
    download = functools.partial(snapshot_download, repository, cache_dir=cache_dir, **options)
    selection = Selection(**selected)
    try:
        folder = _configs(download, name, revision, selection)
        files = selection.weights(folder, _listing(repository, folder, cache_dir)) if weights else []
        if files:
            download(revision=folder.name, allow_patterns=files)  # this commit, whatever is pushed meanwhile
    except LoadError as error:
        raise error if name in str(error) else LoadError(f"{name}: {error}") from error
    except Exception as error:  # errors of huggingface_hub, its HTTP library and the disk
        raise LoadError(f"{name}: {_explain(trouble or error, repository, revision)}") from error
    if trouble and not isinstance(trouble, OfflineModeIsEnabled):
        log.warning(f"{name}: the hub was of no help ({_reason(trouble)}): the copy in the cache is used")
    return folder


def _library(name: str) -> tuple[Callable[..., str], type[Exception]]:
    """The library's download function, and its error if the hub may not be asked."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled
    except ImportError:
        advice = 'a model on the Hugging Face hub needs huggingface_hub: pip install "ldm_lab[hub]"'
        raise LoadError(f"{name}: nothing local has this name, and {advice}") from None
    return snapshot_download, OfflineModeIsEnabled


def _repository(name: str, revision: str | None) -> tuple[str, str | None]:
    repository, _, named = name.partition("@")
    if named and revision not in (None, named):
        raise LoadError(f"{name}: names the revision {named!r}, but revision={revision!r}: give one of them")
    return repository, revision or named or None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _trouble(repository: str, revision: str | None, token: str | bool | None) -> Exception | None:
    """The error that keeps the hub from serving this model, in seconds; a download may retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", PATIENCE))
        HfApi(token=token).model_info(repository, revision=revision, timeout=timeout)
    except Exception as error:  # depends on the HTTP library
        return error
    return None


@dataclass(frozen=True)
class Selection:
    """The files of a model to fetch.

    Attributes:
        subfolder: only this folder, "" for the top folder; None: the top folder and its direct subfolders.
        without: subfolders to leave out.
        variant: variant of the weights; a network without it uses its plain weights, but some network must have it.
        use_safetensors: see `weights.choose`.
    """

    subfolder: str | None = None
    without: Collection[str] = ()
    variant: str | None = None
    use_safetensors: bool | None = None

    def configs(self) -> dict[str, list[str]]:
        """Patterns of the configs to allow and to ignore; in the hub's patterns, * matches slashes too."""
        place = f"{self.subfolder}/" if self.subfolder else ""
        deeper = "*/*/*" if self.subfolder is None else f"{place}*/*"
        left_out = [deeper, *(f"{folder}/*" for folder in self.without)]
        return {"allow_patterns": [f"{place}*.json"], "ignore_patterns": left_out}

    def weights(self, folder: Path, listing: Collection[str]) -> list[str]:
        """The weight files to fetch, out of the model's `listing`; the configs are in `folder`."""
        places: dict[str, set[str]] = {}
        for path in listing:
            place, _, name = path.rpartition("/")
            places.setdefault(place, set()).add(name)
        networks = {place: names for place, names in places.items() if CONFIG in names and self._takes(place)}
        there = {place: variants(names) for place, names in networks.items()}
        if self.variant is not None and not any(self.variant in found for found in there.values()):
            known = ", ".join(sorted({str(name) for found in there.values() for name in found if name})) or "none"
            raise LoadError(f"variant={self.variant!r}: there are no such weights; variants that are there: {known}")
        files: list[Path] = []
        for place, names in networks.items():
            files += self._of(folder / place, names, self.variant if self.variant in there[place] else None)
        return [path.relative_to(folder).as_posix() for path in files]

    def _takes(self, place: str) -> bool:
        if self.subfolder is not None:
            return place == self.subfolder
        return "/" not in place and place not in self.without

    def _of(self, folder: Path, names: set[str], variant: str | None) -> list[Path]:
        """The weight files of a network; empty if there are none, as loading then raises a better message."""
        kinds = (True, False) if self.use_safetensors is None else (self.use_safetensors,)
        for safe, stem in product(kinds, (STEM, OWN_STEM)):
            with contextlib.suppress(LoadError):
                chosen = folder / choose(names, stem, variant, safe)
                return [folder / name for name in shards(chosen)] if chosen.suffix == ".json" else [chosen]
        return []


def _configs(download: Callable[..., str], name: str, revision: str | None, selection: Selection) -> Path:
    """Download the configs first, to reject another kind of pipeline before fetching gigabytes of weights."""
    folder = Path(download(revision=revision, **selection.configs()))
    if not folder.is_dir():
        raise LoadError(f"{name}: holds no configs, so it is no folder of a model; give a checkpoint file by its path")
    index = folder / INDEX
    whole = selection.subfolder is None and index.is_file()
    if whole and (kind := read_json(index).get("_class_name")) not in PIPELINES:
        raise LoadError(f"{name}: is a {kind!r}, not an LDMPipeline; its weights were not downloaded")
    return folder


def _listing(repository: str, folder: Path, cache_dir: str | Path | None) -> list[str]:
    """The paths of all files of the model, downloaded or not."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        return [file.path for file in get_cached_repo_tree(repository, revision=folder.name, cache_dir=cache_dir)]
    except errors.CachedRepoTreeNotFoundError:  # the cache of an older version of the library
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    hub, log_in = constants.ENDPOINT, 'log in with "hf auth login" or set HF_TOKEN'
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has this model, but no revision {revision!r}"
    if isinstance(error, errors.GatedRepoError):
        return f"access is granted on request: ask for it on {hub}/{repository}, then {log_in}"
    refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401
    if refused or isinstance(error, errors.RepositoryNotFoundError):
        return f"nothing local has this name, nor has a model on {hub} that you may see; if it is private, {log_in}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "not whole in the cache, and the hub may not be asked (HF_HUB_OFFLINE or local_files_only)"
    return f"nothing local has this name, nor is it whole in the cache, and {hub} is of no help ({_reason(error)})"
