"""Return type of networks, schedulers and pipelines: a dataclass that is also a dict of its values."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields
from typing import Any, NoReturn

from torch.utils import _pytree as pytree


class BaseOutput(OrderedDict):
    """Base of the result dataclasses; behaves as diffusers' `BaseOutput`.

    `out.sample`, `out["sample"]` and `out[0]` are the same value. A value that is None has neither key nor index. Like
    any dict it iterates over its names; unpack `out.to_tuple()`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        # pytree, which DistributedDataParallel uses, does not recognise subclasses of dict by itself.
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        return tuple(self.values())

    def __getitem__(self, key: int | slice | str) -> Any:  # noqa: ANN401
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:  # noqa: ANN401
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        super().__setattr__(name, value)
        if name in self and value is not None:
            super().__setitem__(name, value)

    def __reduce__(self) -> tuple:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"the values of a {type(self).__name__} can be replaced, not taken out or added to")

    __delitem__ = setdefault = pop = popitem = update = _refuse  # type: ignore[assignment]
