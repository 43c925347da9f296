"""Draws the demo's images: cartoon heads and shoulders, composed as SVG and rasterised.

Imports neither torch nor Lightning, as `python -m ldm_lab.data.drawing` is the program of the parallel
drawing processes (see `avatars.render`).
"""

from __future__ import annotations

import io
import random
import signal
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TypeVar

import numpy as np
import resvg_py
from PIL import Image

# python_avatars draws from the global random generator on import; restore the importing program's state.
_state = random.getstate()
import python_avatars as pa  # noqa: E402

random.setstate(_state)

Part = TypeVar("Part", bound=Enum)

REVISION = 1  # increase it with every change of the pictures, so that cached files are drawn anew

BACKGROUND = "#E8EEF5"
WHOLE_FIGURE = 'width="264px" height="280px" viewBox="0 0 264 280"'
HEAD_AND_SHOULDERS = 'viewBox="12 3 240 240"'  # a square, centred on the face
SUPERSAMPLING = 2  # drawn larger, then averaged, so that adjacent parts show no seam


def parts(kind: type[Part], names: str) -> tuple[Part, ...]:
    """The enumeration members with these names; a repeated name is drawn more often."""
    return tuple(kind[name] for name in names.split())


# These lists omit parts that reach beyond the frame, look the same in every colour, nearly vanish against
# the background, or have strands finer than a pixel.
SHORT_HAIR = parts(
    pa.HairType,
    "NONE BUZZCUT CAESAR CAESAR_SIDE_PART FRIZZLE MOHAWK MOWGLI PIXIE POMPADOUR QUIFF SHAGGY "
    "SHORT_CURLY SHORT_DREADS_1 SHORT_FLAT SHORT_ROUND SHORT_WAVED SIDES",
)
LONG_HAIR = parts(
    pa.HairType,
    "BIG_HAIR BOB CURLY HALF_SHAVED LONG_NOT_TOO_LONG MIA_WALLACE SHAGGY_MULLET STRAIGHT_1 STRAIGHT_STRAND WILD",
)
TOPS = (*SHORT_HAIR, *LONG_HAIR, *parts(pa.HatType, "HIJAB TURBAN WINTER_HAT_1"))
HAIR_COLORS = parts(pa.HairColor, "AUBURN BLACK BLONDE BLONDE_GOLDEN BROWN BROWN_DARK PASTEL_PINK PLATINUM RED")
SKIN_COLORS = parts(pa.SkinColor, "TANNED YELLOW PALE LIGHT BROWN DARK_BROWN BLACK")
EYES = parts(pa.EyeType, "DEFAULT DEFAULT HAPPY SIDE SQUINT SURPRISED WINK CLOSED")
EYEBROWS = parts(pa.EyebrowType, "DEFAULT FLAT_NATURAL RAISED_EXCITED SAD_CONCERNED UP_DOWN ANGRY")
MOUTHS = parts(pa.MouthType, "DEFAULT SMILE SMILE BIG_SMILE TWINKLE SERIOUS SAD CONCERNED")
FACIAL_HAIR = parts(
    pa.FacialHairType, "BEARD_LIGHT BEARD_MEDIUM BEARD_MAGESTIC WICK_BEARD MOUSTACHE_FANCY MOUSTACHE_MAGNUM"
)
GLASSES = parts(pa.AccessoryType, "PRESCRIPTION_1 PRESCRIPTION_2 ROUND WAYFARERS SUNGLASSES KURT")
CLOTHING = parts(
    pa.ClothingType,
    "BLAZER_SHIRT BLAZER_SWEATER COLLAR_SWEATER HOODIE OVERALL SHIRT_CREW_NECK SHIRT_SCOOP_NECK SHIRT_V_NECK",
)
FABRIC_COLORS = parts(
    pa.ClothingColor,
    "BLACK BLUE_01 BLUE_02 BLUE_03 GRAY_02 HEATHER PASTEL_BLUE PASTEL_GREEN PASTEL_ORANGE PASTEL_YELLOW PINK RED",
)


def draw_avatar(seed: int, index: int, size: int) -> np.ndarray:
    """Avatar `index` of the data set with this seed: `(size, size, 3)`, uint8, a function of its arguments."""
    svg = compose(random.Random(f"avatar/{seed}/{index}")).render().replace(WHOLE_FIGURE, HEAD_AND_SHOULDERS, 1)
    side = size * SUPERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background=BACKGROUND, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB").reduce(SUPERSAMPLING))


def compose(numbers: random.Random) -> pa.Avatar:
    """An avatar with every part and colour drawn from `numbers`."""

    def choose(options: Sequence[Part]) -> Part:
        # Python guarantees stable numbers across versions only for random().
        return options[int(numbers.random() * len(options))]

    top, hair_color = choose(TOPS), choose(HAIR_COLORS)
    beard = choose(FACIAL_HAIR) if numbers.random() < 0.4 else pa.FacialHairType.NONE
    glasses = choose(GLASSES) if numbers.random() < 0.35 else pa.AccessoryType.NONE
    return pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        top=top,
        hat_color=choose(FABRIC_COLORS),
        hair_color=hair_color,
        facial_hair=beard if top in SHORT_HAIR else pa.FacialHairType.NONE,
        facial_hair_color=hair_color,
        accessory=glasses,
        skin_color=choose(SKIN_COLORS),
        eyes=choose(EYES),
        eyebrows=choose(EYEBROWS),
        nose=pa.NoseType.DEFAULT,
        mouth=choose(MOUTHS),
        clothing=choose(CLOTHING),
        clothing_color=choose(FABRIC_COLORS),
    )


def main(seed: int, size: int, first: int, stop: int, step: int) -> None:
    """Write the pixels of the avatars `range(first, stop, step)` to standard output, in order."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently when the reader has gone
    for index in range(first, stop, step):
        sys.stdout.buffer.write(draw_avatar(seed, index, size).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
