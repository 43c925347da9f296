"""Models by their name on the Hugging Face hub: `owner/model`, or `owner/model@revision`."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from ldm_lab import typed
from ldm_lab.serialization import LEGACY_WEIGHTS, OWN_WEIGHTS, WEIGHTS
from ldm_lab.untrusted import LoadError, read_json

log = logging.getLogger(__name__)

NAME = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<model>\w[\w.-]*)(@\w[\w.-]*)?", re.ASCII)
FILES = (".ckpt", ".pt", ".safetensors", ".yaml")  # a file was meant, though it is not there

# Patterns of the hub, in which * matches slashes too: hence what lies deeper is left out explicitly.
CONFIGS = ["*.json"]
SAFE_WEIGHTS = [folder + name for folder in ("", "*/") for name in (WEIGHTS, OWN_WEIGHTS)]
DEEPER = ["*/*/*"]

# Seconds to wait for the hub's first word, unless HF_HUB_ETAG_TIMEOUT says otherwise: a mistyped path must not hang
# on a machine without network.
PATIENCE = "5"


def is_name(source: str | Path) -> bool:
    """Whether `source` may name a model on the hub.

    It may not where its first part is a local folder: the mistyped `runs/x` is never asked for on the network.
    """
    found = NAME.fullmatch(str(source))
    return bool(found) and not found["model"].endswith(FILES) and not Path(found["owner"]).is_dir()


def local(source: str | Path) -> Path:
    """A path as it is; of a name on the hub, where the model was downloaded to. Raises `LoadError` as `fetch`."""
    return fetch(str(source)) if is_name(source) else typed.path(source)


def fetch(
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a model on the hub; what the cache lacks of it is downloaded.

    Only what can be loaded is fetched: the configs, safetensors weights, and the pickled ones of 2022 for the
    networks that have no others. The variables and the login of `huggingface_hub` apply (`HF_HOME`, `HF_TOKEN`,
    `HF_HUB_OFFLINE` ...). Where the hub does not answer, what the cache holds is used, and a warning says so.

    Args:
        name: `owner/model` or `owner/model@revision`.
        revision: a branch, tag or commit; None is that of the name, else the main branch.
        cache_dir: the cache; None is that of `huggingface_hub`.
        local_files_only: use the cache alone.

    Raises:
        LoadError: `huggingface_hub` is not installed; the model or the revision does not exist, or is not for
            everybody; the hub cannot be reached and the cache has no copy; or this is another kind of pipeline.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled
    except ImportError:
        advice = 'a model on the Hugging Face hub needs huggingface_hub: pip install "ldm_lab[hub]"'
        raise LoadError(f"{name}: nothing local has this name, and {advice}") from None
    repository, _, named = name.partition("@")
    if named and revision not in (None, named):
        raise LoadError(f"{name}: names the revision {named!r}, but revision={revision!r}: give one of them")
    revision = revision or named or None
    trouble = OfflineModeIsEnabled("local_files_only=True") if local_files_only else _trouble(repository, revision)
    download = functools.partial(
        snapshot_download, repository, cache_dir=cache_dir, local_files_only=trouble is not None, ignore_patterns=DEEPER
    )
    try:
        folder = _download(download, name, revision)
    except LoadError:
        raise
    except Exception as error:  # those of the library, of the one that carries its requests, and of the disk
        raise LoadError(f"{name}: {_explain(trouble or error, repository, revision)}") from error
    if trouble and not isinstance(trouble, OfflineModeIsEnabled):
        log.warning(f"{name}: the hub was of no help ({_line(trouble)}): the copy in the cache is used")
    return folder


def _trouble(repository: str, revision: str | None) -> Exception | None:
    """What keeps the hub from serving this model, found in seconds: the download itself may retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", PATIENCE))
        HfApi().model_info(repository, revision=revision, timeout=timeout)
    except Exception as error:  # which ones depends on the library that carries the requests
        return error
    return None


def _download(download: Callable[..., str], name: str, revision: str | None) -> Path:
    """Configs, then weights: so that gigabytes of another kind of pipeline are not fetched to be refused."""
    folder = Path(download(revision=revision, allow_patterns=CONFIGS))
    if not folder.is_dir():
        raise LoadError(f"{name}: holds no configs, so it is no folder of a model; give a checkpoint file by its path")
    index = folder / "model_index.json"
    if index.is_file() and (kind := read_json(index).get("_class_name")) != "LDMPipeline":
        raise LoadError(f"{name}: is a {kind!r}, not an LDMPipeline; its weights were not downloaded")
    download = functools.partial(download, revision=folder.name)  # this commit, whatever is pushed meanwhile
    download(allow_patterns=CONFIGS + SAFE_WEIGHTS)
    networks = [path.parent for pattern in ("config.json", "*/config.json") for path in folder.glob(pattern)]
    bare = [path for path in networks if not ((path / WEIGHTS).exists() or (path / OWN_WEIGHTS).exists())]
    if bare:
        download(allow_patterns=[(path / LEGACY_WEIGHTS).relative_to(folder).as_posix() for path in bare])
    return folder


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
    return f"nothing local has this name, nor is it whole in the cache, and {hub} is of no help ({_line(error)})"


def _line(error: Exception) -> str:
    """The kind of an error and the first line of its message, which may go on with advice."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
