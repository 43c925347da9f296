"""State dicts as others keep them: below a key of a larger file, with the words of wrappers in the names of tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ldm_lab.utils.reading import LoadError

State = dict[str, Tensor]

# Where files keep the tensors of a network, what is averaged before what is not.
PLACES = ("state_dict", "ema", "ema_state_dict", "params_ema", "model_ema", "model", "model_state_dict", "params",
          "module", "net", "network", "weights")  # fmt: skip
WRAPPERS = ("_orig_mod", "module")  # what torch.compile, and DataParallel and its kin, put before the names inside


def tensors_in(content: Any) -> State | None:  # noqa: ANN401
    """The tensors by name that a file holds, itself or below one of `PLACES`, perhaps twice; None: there are none."""
    for _ in range(3):
        if not isinstance(content, dict) or not content:
            return None
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            return content
        content = next((content[place] for place in PLACES if isinstance(content.get(place), dict)), None)
    return None


def unwrapped(state: State, known: Collection[str] = ()) -> State:
    """The tensors under names without the words of `WRAPPERS`, wherever in a name they stand.

    Args:
        state: tensors by name.
        known: names that stay as they are.

    Raises:
        LoadError: two tensors would have one name.
    """
    renamed: State = {}
    for key, value in state.items():
        name = key if key in known else ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in renamed:
            raise LoadError(f"holds {name!r} twice, once with a prefix of torch.compile or DataParallel")
        renamed[name] = value
    return renamed
