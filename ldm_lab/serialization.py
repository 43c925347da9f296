"""How models and schedulers write and read their folders: a JSON config and safetensors weights.

The layout is the one of diffusers (`config.json` or `scheduler_config.json`, and
`diffusion_pytorch_model.safetensors`), so that folders move between the two libraries unconverted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from ldm_lab import typed
from ldm_lab.saving import replacing, write_json
from ldm_lab.untrusted import LoadError, blaming, check_plain, first_line, read_json, read_torch
from ldm_lab.version import __version__

WEIGHTS = "diffusion_pytorch_model.safetensors"
LEGACY_WEIGHTS = "diffusion_pytorch_model.bin"  # folders of 2022; read with weights_only, never written
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that networks compute with
OWN_WEIGHTS = "model.safetensors"  # of what diffusers does not have: there it finds no weights, and refuses


class FrozenConfig(dict):
    """A config: a plain `dict` whose keys are attributes too, and which cannot be changed in place."""

    def __getattr__(self, key: str) -> Any:  # noqa: ANN401
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"config has no key {key!r}; it has {sorted(self)}") from None

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a config is frozen: use register_to_config(key=value) instead")

    __setattr__ = __setitem__ = __delattr__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __deepcopy__(self, memo: dict) -> FrozenConfig:
        return FrozenConfig(self)

    def __reduce__(self) -> tuple:
        return FrozenConfig, (dict(self),)


Init = TypeVar("Init", bound=Callable[..., None])


def register_to_config(init: Init) -> Init:
    """Decorate `__init__` so that its arguments, defaults included, are kept in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Configurable, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {key: _plain(value) for key, value in list(bound.arguments.items())[1:]}
        # A subclass that calls up registers its own, complete arguments first; the base must not overwrite them.
        if "config" not in self.__dict__:
            object.__setattr__(self, "config", FrozenConfig(values))
        init(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """What JSON gives back for `value`: tuples, arrays, tensors (and the lists of a config library) become lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]


class Configurable:
    """A class that is rebuilt from the arguments of its constructor, kept as JSON.

    Attributes:
        config_name: the file that holds the config.
        ignores_unknown: whether `from_config` drops keys it does not know (schedulers do, so that one
            scheduler can be built from another's config) or refuses them (models do: an unknown key
            may mean another architecture).
    """

    config_name = "config.json"
    ignores_unknown = False
    config: FrozenConfig

    def register_to_config(self, **values: Any) -> None:  # noqa: ANN401
        """Change entries of the config, e.g. `vqvae.register_to_config(scaling_factor=1.0)`.

        Raises:
            TypeError: for a key that the constructor does not have.
        """
        for key in values:
            if key not in self.config:
                raise TypeError(f"{type(self).__name__} has no argument {key!r}; it has {sorted(self.config)}")
        changed = {key: _plain(value) for key, value in values.items()}
        object.__setattr__(self, "config", FrozenConfig({**self.config, **changed}))

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from a config (of ours or of the namesake); keyword arguments replace its entries.

        Raises:
            LoadError: a key, or the class named in it, is not one of this class.
        """
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        if unknown := set(overrides) - known:
            raise TypeError(f"{cls.__name__} has no argument {sorted(unknown)}; it has {sorted(known)}")
        name = config.get("_class_name", cls.class_name())
        if name != cls.class_name() and not cls.ignores_unknown:
            raise LoadError(f"this config describes a {name!r}, not a {cls.__name__}")
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        if (unknown := set(values) - known) and not cls.ignores_unknown:
            raise LoadError(f"the config of this {cls.__name__} has keys that it does not know: {sorted(unknown)}")
        return cls(**({key: value for key, value in values.items() if key in known} | overrides))

    @classmethod
    def class_name(cls) -> str:
        """How configs name this class: with its module, unless it is one of this package."""
        return cls.__name__ if _is_ours(cls) else f"{cls.__module__}.{cls.__name__}"

    @property
    def library(self) -> str:
        """What an index names beside the class: `diffusers`, where its namesake computes the same, or the module."""
        return "diffusers" if _is_ours(type(self)) else type(self).__module__

    def to_json(self) -> dict[str, Any]:
        """The config with the class name and version, as it is written to `config_name`."""
        return {"_class_name": self.class_name(), "_ldm_lab_version": __version__, **self.config}

    def save_config(self, folder: str | Path) -> None:
        """Write `folder/config_name`."""
        write_json(typed.path(folder) / self.config_name, self.to_json())

    @classmethod
    def load_config(cls, folder: str | Path, subfolder: str | None = None) -> dict[str, Any]:
        """Read `folder[/subfolder]/config_name` as plain data."""
        return read_json(typed.path(folder) / (subfolder or "") / cls.config_name)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


class PretrainedModel(Configurable, nn.Module):
    """A network with a config: `from_pretrained`, `save_pretrained`, `device`, `dtype`.

    The order in which weights lie in memory is for the network to choose (see `models.layout`): files do not show it,
    and `load_weights` keeps it.
    """

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def exported_state_dict(self) -> dict[str, Tensor]:
        """The tensors that the namesake knows: what goes into a folder. State of training stays out."""
        return self.state_dict()

    @property
    def weights_name(self) -> str:
        """The file that holds the weights. Only where its namesake computes the same does diffusers find them."""
        return WEIGHTS if self.library == "diffusers" else OWN_WEIGHTS

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and the weights (safetensors) into `folder`, each file whole or not at all."""
        folder = typed.path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().contiguous().cpu() for key, value in self.exported_state_dict().items()}
        with replacing(folder / self.weights_name) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        self.save_config(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str | None = None, torch_dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder written by `save_pretrained`, ours or the namesake's, in evaluation mode.

        Raises:
            LoadError: the folder, its config or its weights are missing, damaged or of another
                architecture. A tensor missing or left over is an error: nothing is initialised silently.
        """
        folder = typed.path(folder) / (subfolder or "")
        model = cls.skeleton(cls.load_config(folder), origin=str(folder / cls.config_name))
        model.load_weights(read_weights(folder, model.weights_name), origin=str(folder), assign=True)
        return model.to(dtype=torch_dtype).eval()

    @classmethod
    def from_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: str) -> Self:
        """Build from a config and the weights themselves, in evaluation mode.

        Raises:
            LoadError: the config or a tensor is not of this class; the message begins with `origin`.
        """
        model = cls.skeleton(config, origin)
        model.load_weights(tensors, origin, assign=True)
        return model.eval()

    @classmethod
    def skeleton(cls, config: dict[str, Any], origin: str) -> Self:
        """The network of a config that a file holds, on the meta device. Raises `LoadError` where there is none."""
        with blaming(origin), torch.device("meta"):
            return cls.from_config(check_plain(config, origin))

    def load_weights(self, state: dict[str, Tensor], origin: str, assign: bool = False) -> None:
        """Load `state` after checking that names and shapes are exactly those of this network.

        Args:
            state: tensors by name; names of 2022 are understood where the class knows them.
            origin: where they come from, for the message.
            assign: take the tensors themselves instead of copying their values.

        Raises:
            LoadError: a tensor is missing, left over or of another shape or kind.
        """
        own, renamed = self.exported_state_dict(), self.rename_legacy_keys(state)
        name = type(self).__name__
        if len(renamed) < len(state):
            raise LoadError(f"{origin}: holds a tensor of this {name} twice, under its name of 2022 and that of today")
        state = renamed
        if missing := sorted(set(own) - set(state)):
            raise LoadError(f"{origin}: no tensor {missing[0]!r} for this {name} ({len(missing)} missing)")
        if unexpected := sorted(set(state) - set(own)):
            raise LoadError(f"{origin}: {name} has no place for {unexpected[0]!r} ({len(unexpected)} left over)")
        for key, value in own.items():
            if value.shape != state[key].shape:
                found, wanted = tuple(state[key].shape), tuple(value.shape)
                raise LoadError(f"{origin}: {key} has shape {found}, this {name} needs {wanted}")
            if (value.dtype in FLOATS) != (state[key].dtype in FLOATS):
                raise LoadError(f"{origin}: {key} holds {state[key].dtype}, this {name} needs {value.dtype}")
            if not state[key].isfinite().all():
                raise LoadError(f"{origin}: {key} holds values that are not finite (NaN or infinity)")
        state = _alike(state)
        if assign:  # they come as their file has them
            state = {key: _laid_out(value, own[key].stride()) for key, value in state.items()}
        self.load_state_dict(state, strict=False, assign=assign)

    @classmethod
    def rename_legacy_keys(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Attention names of 2022 (`query`, `key`, `value`, `proj_attn`) -> today's."""
        names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state.items()}


def _alike(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All numbers with a point in the largest type among them: layers cannot multiply different ones."""
    types = [value.dtype for value in state.values() if value.dtype in FLOATS]
    largest = functools.reduce(torch.promote_types, types, types[0]) if types else None
    return {key: value.to(largest) if value.dtype in FLOATS else value for key, value in state.items()}


def _laid_out(value: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor with `stride`: itself, or a copy."""
    if value.stride() == stride:
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def read_weights(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """The tensors of a model folder, on the CPU. Raises `LoadError` where there are none to be had safely."""
    path, legacy = folder / name, folder / LEGACY_WEIGHTS
    if path.is_file():
        try:
            # Copies: mapped tensors lie unaligned, for which kernels may round otherwise.
            return {key: value.clone() for key, value in load_file(path).items()}
        except Exception as error:  # a damaged file makes the reader fail in several ways
            raise LoadError(f"{path}: cannot be read: {first_line(error)}") from error
    if legacy.is_file():
        state = read_torch(legacy)
        if not isinstance(state, dict) or not all(_is_named_tensor(item) for item in state.items()):
            raise LoadError(f"{legacy}: does not hold tensors by name")
        return state
    raise LoadError(f"{folder}: neither {name} nor {LEGACY_WEIGHTS} is there")


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
