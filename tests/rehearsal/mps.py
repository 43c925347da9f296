"""Which operations of torch Apple's device has, by the table that torch's kernels are generated from."""

from __future__ import annotations

import functools
from pathlib import Path

import torchgen
import yaml

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
ANY_DEVICE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


@functools.cache
def kernels() -> dict[str, dict[str, str]]:
    """Operation (`add.Tensor`) -> its kernels, by dispatch key; a structured one has those it delegates to."""
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(TABLE.read_text(encoding="utf-8"))}
    found = {}
    for name, entry in entries.items():
        own = entry.get("dispatch")
        if "structured_delegate" in entry:
            own = entries[entry["structured_delegate"]].get("dispatch")
        keys = own if own is not None else {"CompositeImplicitAutograd": name}
        found[name] = {key: kernel for joined, kernel in keys.items() for key in joined.replace(" ", "").split(",")}
    return found


def without(operations: set[str]) -> set[str]:
    """Those of `aten.<name>.<overload>` that Apple's device cannot do."""
    return {name for name in operations if not has(name.removeprefix("aten.").removesuffix(".default"))}


def has(name: str) -> bool:
    """Whether an operation has a kernel there, or one for any device; functional twins are made of those in place."""
    table = kernels()
    if name in table:
        return bool({"MPS", *ANY_DEVICE} & table[name].keys())
    base, _, overload = name.partition(".")
    in_place = f"{base}_" + (f".{overload}" if overload else "")
    return in_place in table and has(in_place)
