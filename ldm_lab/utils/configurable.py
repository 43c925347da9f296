"""Classes that are rebuilt from the arguments of their constructor, kept as JSON.

The files are those of diffusers (`config.json`, `scheduler_config.json`), so that they are read by both libraries.
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

# Keys that say nothing of what is computed: other libraries and versions write them beside the arguments.
BESIDE = frozenset(("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"))


class FrozenConfig(dict):
    """A config: a plain `dict` whose keys are attributes too, and which cannot be changed in place.

    As in diffusers, `get("_use_default_values")` names the arguments that were not given: what another class, of either
    library, builds from this config has its own defaults there.
    """

    def __init__(self, values: dict[str, Any], defaults: Collection[str] = ()) -> None:
        super().__init__(values)
        object.__setattr__(self, "_defaults", sorted(set(values).intersection(defaults)))

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        """The entry, or `default` where there is none."""
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
    """Decorate `__init__` so that its arguments, defaults included, are kept in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Configurable, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        values = {key: _plain(value) for key, value in list(bound.arguments.items())[1:]}
        # A subclass that calls up registers its own, complete arguments first; the base must not overwrite them.
        if "config" not in self.__dict__:
            object.__setattr__(self, "config", FrozenConfig(values, values.keys() - given))
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
            may mean another architecture, unless it is null or one of `BESIDE`, of which a line is said).
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
        defaults = set(self.config.get("_use_default_values")) - changed.keys()
        object.__setattr__(self, "config", FrozenConfig({**self.config, **changed}, defaults))

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from a config (of ours or of the namesake); keyword arguments replace its entries.

        Raises:
            LoadError: a key, or the class named in it, is not one of this class.
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
        """Raise `TypeError` where a name is not one of the constructor's arguments."""
        if unknown := sorted(set(names) - cls.arguments()):
            raise TypeError(f"{cls.__name__} has no argument {unknown}; it has {sorted(cls.arguments())}")

    @classmethod
    def _pass_over(cls, unknown: dict[str, Any]) -> None:
        """Say which unknown keys of a config are left out. Raises `LoadError` where one may change the network."""
        if telling := sorted(key for key, value in unknown.items() if value is not None and key not in BESIDE):
            raise LoadError(f"the config of this {cls.__name__} has keys that it does not know: {telling}")
        say_once(f"the config of this {cls.__name__} has keys that change nothing and are left out: {sorted(unknown)}")

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
        write_json(shell.path(folder) / self.config_name, self.to_json())

    @classmethod
    def load_config(cls, source: str | Path, subfolder: str | None = None, **download: Any) -> dict[str, Any]:  # noqa: ANN401
        """Read `config_name` of a folder, or of a name on the hub, as plain data.

        Args:
            source: the folder, or `owner/model`.
            subfolder: where in there the file lies.
            download: of a name on the hub, see `hub.local`.

        Raises:
            LoadError: the file is not there, or cannot be read.
        """
        folder = hub.local(source, subfolder or "", weights=False, **download)
        path = folder / cls.config_name
        if not path.exists() and (below := sorted(found.parent.name for found in folder.glob(f"*/{cls.config_name}"))):
            raise LoadError(f"{path}: no such file; give subfolder= one of {', '.join(below)}")
        return read_json(path)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]
