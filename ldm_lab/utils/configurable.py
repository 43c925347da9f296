"""Classes that can be rebuilt from their constructor arguments, stored as JSON.

The files are those of diffusers (`config.json`, `scheduler_config.json`), so both libraries can read them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from typing_extensions import Self

from ldm_lab.utils import hub, shell
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.version import __version__
from ldm_lab.utils.writing import write_json

# Keys without effect on the computation, which other libraries and versions write beside the arguments.
BESIDE = frozenset(("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"))


class FrozenConfig(dict):
    """A config: an immutable `dict` whose keys are also attributes.

    As in diffusers, `get("_use_default_values")` lists the arguments that were not given: another class, of either
    library, that is built from this config uses its own defaults for them.
    """

    def __init__(self, values: dict[str, Any], defaults: Collection[str] = ()) -> None:
        super().__init__(values)
        object.__setattr__(self, "_defaults", sorted(set(values).intersection(defaults)))

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        """The entry, or `default` if it is missing."""
        return list(self._defaults) if key == "_use_default_values" else super().get(key, default)

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
        return FrozenConfig(self, self._defaults)

    def __reduce__(self) -> tuple:
        return FrozenConfig, (dict(self), self._defaults)


Init = TypeVar("Init", bound=Callable[..., None])


def register_to_config(init: Init) -> Init:
    """Decorate `__init__` to store its arguments, defaults included, in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Configurable, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        values = {key: _plain(value) for key, value in list(bound.arguments.items())[1:]}
        # A subclass registers its own, complete arguments before it calls the base, which must not overwrite them.
        if "config" not in self.__dict__:
            object.__setattr__(self, "config", FrozenConfig(values, values.keys() - given))
        init(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """`value` after a round trip through JSON: tuples, arrays, tensors (and OmegaConf lists) become lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]


class Configurable:
    """A class that can be rebuilt from its constructor arguments, stored as JSON.

    Attributes:
        config_name: the file that holds the config.
        ignores_unknown: whether `from_config` drops unknown keys (schedulers do, so that a scheduler can
            be built from another scheduler's config) or rejects them (models do, as an unknown key may
            mean another architecture, unless it is null or one of `BESIDE`: then a line says so).
    """

    config_name = "config.json"
    ignores_unknown = False
    config: FrozenConfig

    def register_to_config(self, **values: Any) -> None:  # noqa: ANN401
        """Change entries of the config, e.g. `vqvae.register_to_config(scaling_factor=1.0)`.

        Raises:
            TypeError: the constructor has no such argument.
        """
        for key in values:
            if key not in self.config:
                raise TypeError(f"{type(self).__name__} has no argument {key!r}; it has {sorted(self.config)}")
        changed = {key: _plain(value) for key, value in values.items()}
        defaults = set(self.config.get("_use_default_values")) - changed.keys()
        object.__setattr__(self, "config", FrozenConfig({**self.config, **changed}, defaults))

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from a config of this package or of diffusers; keyword arguments replace its entries.

        Raises:
            LoadError: the config has an unknown key, or names another class.
        """
        cls.check_arguments(overrides)
        name = config.get("_class_name", cls.class_name())
        if name != cls.class_name() and not cls.ignores_unknown:
            raise LoadError(f"this config describes a {name!r}, not a {cls.__name__}")
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = {key: value for key, value in values.items() if key not in cls.arguments()}
        if unknown and not cls.ignores_unknown:
            cls._pass_over(unknown)
        return cls(**({key: value for key, value in values.items() if key not in unknown} | overrides))

    @classmethod
    def arguments(cls) -> set[str]:
        """Names of the constructor's arguments."""
        return set(inspect.signature(cls.__init__).parameters) - {"self"}

    @classmethod
    def check_arguments(cls, names: Iterable[str]) -> None:
        """Raise `TypeError` if a name is not one of the constructor's arguments."""
        if unknown := sorted(set(names) - cls.arguments()):
            raise TypeError(f"{cls.__name__} has no argument {unknown}; it has {sorted(cls.arguments())}")

    @classmethod
    def _pass_over(cls, unknown: dict[str, Any]) -> None:
        """Print which unknown keys of a config are dropped. Raises `LoadError` if a key may change the network."""
        if telling := sorted(key for key, value in unknown.items() if value is not None and key not in BESIDE):
            raise LoadError(f"the config of this {cls.__name__} has keys that it does not know: {telling}")
        say_once(f"the config of this {cls.__name__} has keys that change nothing and are left out: {sorted(unknown)}")

    @classmethod
    def class_name(cls) -> str:
        """This class's name in configs: with its module, unless the class belongs to this package."""
        return cls.__name__ if _is_ours(cls) else f"{cls.__module__}.{cls.__name__}"

    @property
    def library(self) -> str:
        """Library of this class in `model_index.json`: `diffusers` if its namesake is equivalent, else the module."""
        return "diffusers" if _is_ours(type(self)) else type(self).__module__

    def beside_config(self) -> dict[str, Any]:
        """Entries that files hold beside the config; diffusers keeps, and does not read, names that begin with `_`."""
        return {}

    def described(self) -> dict[str, Any]:
        """The config with the class name, as plain data."""
        return {"_class_name": self.class_name(), **self.beside_config(), **self.config}

    def to_json(self) -> dict[str, Any]:
        """The config with class name and version, as in the file `config_name`."""
        return {"_class_name": self.class_name(), "_ldm_lab_version": __version__, **self.described()}

    def save_config(self, folder: str | Path) -> None:
        """Write `folder/config_name`."""
        write_json(shell.path(folder) / self.config_name, self.to_json())

    @classmethod
    def load_config(cls, source: str | Path, subfolder: str | None = None, **download: Any) -> dict[str, Any]:  # noqa: ANN401
        """Read `config_name` of a folder, or of a model on the hub, as plain data.

        Args:
            source: the folder, or `owner/model`.
            subfolder: subfolder of the file.
            download: for a model on the hub, see `hub.local`.

        Raises:
            LoadError: the file is missing, or cannot be read.
        """
        folder = hub.local(source, subfolder or "", weights=False, **download)
        path = folder / cls.config_name
        if not path.exists() and (below := sorted(found.parent.name for found in folder.glob(f"*/{cls.config_name}"))):
            raise LoadError(f"{path}: no such file; give subfolder= one of {', '.join(below)}")
        return read_json(path)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]
