"""Whether values are of the kinds that classes declare: those of a config against the annotations of constructors."""

from __future__ import annotations

from typing import Any

from ldm_lab.utils import signatures
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.moved import HOME
from ldm_lab.utils.nested import find, shown, targets

# Arguments of this package that count something: 1 at least. Its other whole numbers are not negative.
COUNTS = (
    "every_images", "images", "steps", "frames", "samples", "nearest", "among", "side", "bars", "patience", "num_train",
    "num_val", "num_codes", "num_samples", "num_reference", "max_images", "levels",
)  # fmt: skip
OPEN = ("model.unet.in_channels", "model.unet.out_channels")  # null: those of the latents


def check(config: dict[str, Any]) -> None:
    """Refuse arguments of another kind than declared, and counts out of range, before anything is built.

    Args:
        config: resolved, as plain data; its classes are imported, so they must be allowed (see `settings.check_code`).

    Raises:
        UserError: an argument is of another kind; the message names the shortest key that it has.
    """
    for place, target in targets(config):
        node = place.removesuffix("._target_")
        hints, ours = _declared(target), target.startswith(HOME) and not node.startswith("trainer")
        for name, value in (find(config, node) or {}).items():
            key = f"{node}.{name}"
            if name not in hints or isinstance(value, (dict, list)) or (value is None and key in OPEN):
                continue
            if not signatures.fits(value, hints[name]):
                raise UserError(f"{_shortest(config, key)}={shown(value)}: must be {signatures.words(hints[name])}")
            if ours and type(value) is int and value < (low := int(name in COUNTS)):
                raise UserError(f"{_shortest(config, key)}={value}: must be at least {low}")


def _shortest(config: dict[str, Any], key: str) -> str:
    """What a user types: `data.module.train_set.flip` takes its value from `data.flip`, every seed from `seed`."""
    name = key.rpartition(".")[2]
    short = name if name == "seed" else f"{key.split('.')[0]}.{name}"
    return short if repr(find(config, short, ...)) == repr(find(config, key)) else key


def _declared(target: str) -> dict[str, Any]:
    """Argument -> its type, of what a `_target_` names; arguments without an annotation are left out."""
    try:
        _, hints = signatures.declared(signatures.named(target))
    except (TypeError, ValueError):  # there is no such thing, or it has no signature
        return {}
    return hints
