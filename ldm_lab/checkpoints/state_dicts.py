"""Reads foreign state dicts: nested below a key, or with wrapper prefixes in the names of tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.weights import are_named_tensors

State = dict[str, Tensor]

# Keys below which files keep a network's tensors; averaged weights come before raw weights.
PLACES = ("state_dict", "ema", "ema_state_dict", "params_ema", "model_ema", "model", "model_state_dict", "params",
          "module", "net", "network", "weights")  # fmt: skip
WRAPPERS = ("_orig_mod", "module")  # prefixes of torch.compile and of (Distributed)DataParallel


def tensors_in(content: Any) -> State | None:  # noqa: ANN401
    """The tensors of a file by name, at the top or up to two levels below `PLACES`; None if there are none."""
    for _ in range(3):
        if not isinstance(content, dict) or not content:
            return None
        if are_named_tensors(content):
            return content
        content = next((content[place] for place in PLACES if isinstance(content.get(place), dict)), None)
    return None


def unwrapped(state: State, known: Collection[str] = ()) -> State:
    """Remove the prefixes of `WRAPPERS` from the names of tensors, at any depth of a name.

    Args:
        state: tensors by name.
        known: names that stay unchanged.

    Raises:
        LoadError: two tensors would have the same name.
    """
    renamed: State = {}
    for key, value in state.items():
        name = key if key in known else ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in renamed:
            raise LoadError(f"holds {name!r} twice, once with a prefix of torch.compile or DataParallel")
        renamed[name] = value
    return renamed
