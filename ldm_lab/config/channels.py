"""Stage 1 follows the channels of the images: `data.channels` sets those of its networks and the terms of its loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import find
from ldm_lab.utils.terminal import is_first_process, say_once

RGB = 3
AUTOENCODER = ("model.autoencoder.in_channels", "model.autoencoder.out_channels")
DISCRIMINATOR = "model.loss.discriminator"
PERCEPTUAL, PIXEL, START = "model.loss.perceptual", "model.loss.pixel", "model.start"
WEIGHTLESS = "ldm_lab.losses.perceptual.MultiScaleL1"


def of_images(config: dict[str, Any]) -> int:
    """Channels of the images of a config; data sets without the key `data.channels` hold RGB."""
    channels = find(config, "data.channels")
    return channels if type(channels) is int and channels > 0 else RGB  # `kinds.check` refuses all else


def follow(config: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The changes to a checked config that its images need, dotted key -> value; says which terms they replace.

    Images of three channels need none.

    Args:
        config: the config of a stage, as plain data.
        typed: keys that the user has set: a value that does not fit is refused, not replaced.

    Raises:
        UserError: a setting does not fit the channels of the images.
    """
    if config["stage"] != "autoencoder":
        return {}
    channels = of_images(config)
    changes = dict(_widths(config, channels, typed))
    if channels != RGB:
        changes |= {key: value for key, value, line in _terms(config, channels, typed) if _said(line)}
    return changes


def _widths(config: dict[str, Any], channels: int, typed: Collection[str]) -> Iterator[tuple[str, int]]:
    """The channels of the networks. A value in the YAML of a recipe's discriminator is no wish."""
    keys = (*AUTOENCODER, f"{DISCRIMINATOR}.in_channels") if find(config, DISCRIMINATOR) else AUTOENCODER
    for key in keys:
        value = find(config, key)
        wish = value is not None and (key in AUTOENCODER or key in typed or value != RGB)
        if wish and value != channels:
            raise UserError(f"{key}={value}: the images have {channels} channel(s) (data.channels); leave {key} out")
        if channels not in (RGB, value):
            yield key, channels


def _terms(config: dict[str, Any], channels: int, typed: Collection[str]) -> Iterator[tuple[str, Any, str]]:
    """Yields what takes the place of a recipe's terms that know RGB alone: key, value, and a line on it."""
    if channels != 1 and _names(config, PERCEPTUAL, "LPIPS"):
        _refuse_typed(PERCEPTUAL, typed, "LPIPS sees one channel or three", channels)
        line = "the perceptual term is MultiScaleL1, which needs no weights; LPIPS sees one channel or three"
        yield PERCEPTUAL, {"_target_": WEIGHTLESS}, f"data.channels={channels}: {line}"
    if _names(config, PIXEL, "ColourMSE"):
        _refuse_typed(PIXEL, typed, "ColourMSE knows the colours of RGB", channels)
        line = "the pixel term is MSELoss; ColourMSE knows the colours of RGB"
        yield PIXEL, {"_target_": "torch.nn.MSELoss"}, f"data.channels={channels}: {line}"
    wished = find(config, START) == "thumbnail" and START not in typed
    if wished and not _has_room(find(config, "model.autoencoder"), channels):
        line = "the networks are too narrow for a thumbnail of so many"
        yield START, "random", f"data.channels={channels}: model.start=random; {line}"


def _names(config: dict[str, Any], node: str, name: str) -> bool:
    return str(find(config, f"{node}._target_")).endswith(f".{name}")


def _refuse_typed(node: str, typed: Collection[str], reason: str, channels: int) -> None:
    for key in typed:
        if key == node or key.startswith(f"{node}."):
            raise UserError(f"{key}: {reason}, and the images have {channels} (data.channels): leave {key} out")


def _has_room(autoencoder: dict[str, Any], channels: int) -> bool:
    """Whether a thumbnail fits; True if the config leaves that to the class, whose error then says why not."""
    from ldm_lab.models.thumbnail import WIDTHS, fits  # imports torch, which RGB need not wait for

    return not autoencoder.keys() >= WIDTHS or fits(autoencoder, channels)


def _said(line: str) -> bool:
    if is_first_process():
        say_once(line)
    return True
