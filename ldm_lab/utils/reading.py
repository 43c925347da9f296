"""Reads untrusted files safely: returns plain data and tensors, or raises a one-line error.

No file can make this package execute or import code, wait forever, or use much more memory than the file has bytes.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ldm_lab.utils.errors import UserError, first_line, own_line
from ldm_lab.utils.version import FORMAT, FORMAT_KEY

# Limits for configs in files, far above any trained model, as networks are built before their weights are compared.
MAX_WIDTH = 2**16  # channels of a layer, groups, heads
MAX_CODES = 2**18  # codes of a codebook
MAX_LAYERS = 64  # residual blocks per resolution
MAX_LEVELS = 16  # resolutions of a network
MAX_SIDE = 2**12  # of images and latents
MAX_TIMESTEPS = 10**5

MAX_TEXT = 2**20  # bytes of a JSON file; a thousand betas are 2**14
MAX_YAML = 2**17  # ... and of a YAML file, whose parser takes a second for this size
MAX_ENTRIES, MAX_DEPTH = 2**18, 24  # entries and nesting of plain data
MAX_REPEATED = 4  # maximum ratio of a file's tensors, which may share memory, to its bytes
MAX_LINE = 800  # characters of a message

# Names in a pickle of tensors and plain data. torch allows more, such as functions that build gigabytes from few bytes.
PICKLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|(builtins|__builtin__) set"
    r"|torch ([A-Z]\w*Storage|Size|device|bfloat16|float\d+|u?int\d+|bool)"
    r"|pytorch_lightning\.callbacks\.[\w.]+ \w+"  # read as an empty class, see `checkpoints.compvis`
)
LEGACY_PICKLES = 5  # consecutive pickles in files older than torch 1.6

# Intact files of other kinds, recognised by their first bytes.
KINDS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer in the place of the file itself: run git lfs pull",
    b"\x93NUMPY": "an array of NumPy (.npy)",
    b"\x89HDF": "a file of HDF5 (Keras, h5py)",
    b"\x1f\x8b": "a file compressed with gzip: unpack it first",
    b"7z\xbc\xaf": "an archive of 7-Zip: unpack it first",
    b"Rar!": "an archive of RAR: unpack it first",
    b"<": "a page of HTML or XML, perhaps what a download was answered with",
    b"{": "text (JSON)",
    b"%PDF": "a PDF",
}
START = 64  # bytes needed to recognise a kind
ZIP = b"PK\x03\x04"

Scalar = (str, int, float, type(None))


class LoadError(UserError):
    """A file cannot be used; the one-line message says why.

    The message shows line breaks and other unprintable characters as spaces, and is cut to a maximum length.
    """

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else " " for letter in own_line(message))
        half = MAX_LINE // 2
        super().__init__(line if len(line) <= MAX_LINE else f"{line[:half]} ... {line[-half:]}")


@contextmanager
def blaming(origin: object) -> Iterator[None]:
    """Turn any failure in this block into a `LoadError` that names the file."""
    try:
        yield
    except LoadError as error:
        if str(origin) in str(error):
            raise
        raise LoadError(f"{origin}: {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise LoadError(f"{origin}: {first_line(error)}") from error


def kind_of(start: bytes) -> str | None:
    """The kind of a file with these first bytes, if it is one of `KINDS`."""
    return next((kind for magic, kind in KINDS.items() if start.startswith(magic)), None)


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(START)
    except OSError:
        return b""


def reason(path: Path, error: BaseException) -> str:
    """Why a file cannot be used: it is of another kind, else its reader's message."""
    kind = kind_of(first_bytes(path))
    return f"this is {kind}" if kind else first_line(error)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises `LoadError` if the file is missing or holds anything else."""
    text = _read_text(path, MAX_TEXT)
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not readable as JSON: {first_line(error)}") from error
    return check_plain(value, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from `path`; empty for an empty file. Raises `LoadError` for anything else."""
    text = _read_text(path, MAX_YAML)
    try:
        value = yaml.load(text, _WithoutAliases)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise LoadError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    return check_plain({} if value is None else value, path)


def _read_text(path: Path, limit: int) -> str:
    path = Path(path)
    try:
        if not path.is_file():  # a pipe blocks, and a device has no end
            raise LoadError(f"{path}: no such file")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise LoadError(f"{path}: is larger than any config ({limit:,} bytes)")
        is_yaml = path.suffix in (".yaml", ".yml")  # a YAML key may begin with `<`, and JSON is YAML
        is_text = content.startswith((b"<", b"{") if is_yaml else b"{")
        if not is_text and (kind := kind_of(content)):
            raise LoadError(f"{path}: this is {kind}")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: not readable as {path.suffix[1:].upper()}: {first_line(error)}") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {first_line(error)}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value


class _WithoutAliases(yaml.SafeLoader):
    """A YAML loader that rejects aliases, as a few lines of nested aliases can mean billions of entries."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"has the alias *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)


def check_plain(value: Any, origin: object) -> dict[str, Any]:  # noqa: ANN401
    """Check that `value` is a dict of only dicts, lists, strings, numbers, booleans and None; returns it.

    Raises:
        LoadError: it is no dict, holds other values, too many values or itself, or is of a newer version of this
            package; the message begins with `origin`.
    """
    if not isinstance(value, dict):
        raise LoadError(f"{origin}: holds a {type(value).__name__}, not an object")
    if not isinstance(written := value.get(FORMAT_KEY, 1), int) or written > FORMAT:
        raise LoadError(f"{origin}: is of format {written}, this ldm_lab reads up to {FORMAT}: update it")
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list, tuple)):
                count += len(item)
                below += [*item, *item.values()] if isinstance(item, dict) else item
            elif not isinstance(item, Scalar):
                raise LoadError(f"{origin}: holds a {type(item).__name__}, which is no plain data")
            if count > MAX_ENTRIES:  # counts shared values at every place, though the file holds them once
                raise LoadError(f"{origin}: holds more than {MAX_ENTRIES:,} entries")
        level = below
        if not level:
            return value
    raise LoadError(f"{origin}: is nested more than {MAX_DEPTH} deep")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file: the length of a header, and JSON."""
    start = first_bytes(path)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27


def read_safetensors(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises `LoadError` if the file is corrupt or of another kind."""
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises various errors on corrupt files
        raise LoadError(f"{path}: cannot be read: {reason(path, error)}") from error
    # Copies, as mapped tensors are unaligned, and kernels may round differently for them.
    return tensors if mmap else {key: value.clone() for key, value in tensors.items()}


def read_torch(path: Path, mmap: bool = False) -> Any:  # noqa: ANN401
    """Content of a `torch.save` or safetensors file, on the CPU, without executing code from the file.

    Args:
        path: the file.
        mmap: leave the tensors on disk until they are used, if the file's format allows it.

    Raises:
        LoadError: the file is corrupt, of another kind, or holds anything but tensors and plain data.
    """
    if is_safetensors(path):
        return read_safetensors(path, mmap)
    code = "holds more than tensors and plain data, which could run code and is not loaded"
    if names := sorted(name for name in pickled_names(path) if not PICKLED.fullmatch(name)):
        first = ".".join(names[0].split())
        raise LoadError(f"{path}: {code} ({first}; {len(names)} such): save its state_dict alone, where you trust it")
    try:
        mmap = mmap and first_bytes(path).startswith(ZIP)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # torch's own message advises to load the file unsafely
        raise LoadError(f"{path}: damaged, or {code}") from error
    except Exception as error:  # unpicklers raise almost anything on corrupt files
        raise LoadError(f"{path}: cannot be read: {first_line(error)}") from error
    if sum(tensor.nbytes for tensor in _tensors(content)) > MAX_REPEATED * path.stat().st_size:
        raise LoadError(f"{path}: its tensors repeat the same bytes, and would be far larger than the file")
    return content


def pickled_names(path: Path) -> set[str]:
    """Every `module name` in the pickles of a torch file; empty for a safetensors file.

    Raises:
        LoadError: the file is of another kind, or corrupt.
    """
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    if is_safetensors(path):
        return set()
    try:
        if kind := kind_of(first_bytes(path)):
            raise LoadError(f"this is {kind}, not a file of torch or safetensors")
        with open(path, "rb") as file:
            if file.read(4) == ZIP:
                return _names(_pickle_of_archive(file))
            file.seek(0)
            return set().union(*(_names(file) for _ in range(LEGACY_PICKLES)))
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error
    except Exception as error:
        raise LoadError(f"{path}: damaged, or no file of torch: {first_line(error)}") from error


def _pickle_of_archive(file: IO[bytes]) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > file.seek(0, 2):
        raise LoadError("the parts of this archive are larger than the whole: compressed, or laid over each other")
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        if entries and all(entry.filename.endswith(".npy") for entry in entries):
            raise LoadError("this is an archive of NumPy's arrays (.npz), not a file of torch or safetensors")
        raise LoadError("damaged, or no file of torch: it has not one data.pkl")
    return archive.open(pickles[0])


def _names(file: IO[bytes]) -> set[str]:
    return {str(argument) for opcode, argument, _ in pickletools.genops(file) if opcode.name in ("GLOBAL", "INST")}


def _tensors(content: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Every tensor of nested data; visits a shared container once."""
    seen: set[int] = set()
    stack = [content]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple, set)):
            stack += item
