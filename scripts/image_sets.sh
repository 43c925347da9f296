#!/usr/bin/env bash
# Make the two image sets of docs/quality.md from packages: scripts/image_sets.sh FOLDER  (needs npm, apt-get and dpkg-deb)
#   FOLDER/emoji: 3,660 icons of 64 pixels: Twemoji (graphics CC BY 4.0, package MIT), npm's emoji-datasource-twitter 15.1.2
#   FOLDER/textures: 8,704 tiles of 64 pixels from the JPEG files of Debian's supertuxkart-data (1.4 in Debian 12).
#     Licences: CC BY-SA 3.0 and 4.0, CC BY, CC0, GPL, public domain; file by file in its `copyright`, kept beside the tiles.
set -euo pipefail

stop() { echo "error: $*" >&2; exit 1; }

[ $# -eq 1 ] || stop "name the folder that gets the sets: scripts/image_sets.sh FOLDER"
for program in npm apt-get dpkg-deb python; do
    command -v "$program" > /dev/null || stop "$program is not on PATH"
done
mkdir -p "$1"
out=$(cd "$1" && pwd)
for set in emoji textures; do
    [ ! -e "$out/$set" ] || stop "$out/$set is there already: name another folder, or remove the set"
done
work=$(mktemp -d "$out/.making.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

npm pack --silent emoji-datasource-twitter@15.1.2 > /dev/null
tar -xzf emoji-datasource-twitter-15.1.2.tgz package/img/twitter/64 package/LICENSE
apt-get download -q supertuxkart-data
dpkg-deb -x supertuxkart-data_*.deb package
python - <<'PYTHON'
from pathlib import Path

from PIL import Image

TILE, SIDE = 64, 256
Path("textures").mkdir()
for number, path in enumerate(sorted(Path("package/usr").rglob("*.jpg"), key=str)):
    image = Image.open(path).convert("RGB")
    if min(image.size) < TILE:
        continue
    scale = SIDE / min(image.size)
    image = image.resize([max(SIDE, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = [(side - SIDE) // 2 for side in image.size]
    for y in range(0, SIDE, TILE):
        for x in range(0, SIDE, TILE):
            tile = image.crop((left + x, top + y, left + x + TILE, top + y + TILE))
            tile.save(f"textures/{number:03}-{y // TILE}{x // TILE}.png")
PYTHON
cp package/usr/share/doc/supertuxkart-data/copyright textures/copyright.txt
cp package/LICENSE package/img/twitter/64/LICENSE.txt
mv package/img/twitter/64 "$out/emoji"
mv textures "$out/textures"
echo "$out/emoji and $out/textures: train on one with experiment=folder data.root=$out/emoji data.image_size=64"
