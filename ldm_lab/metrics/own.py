"""A feature extractor trained on the data set itself, for use without pretrained weights.

A small convolutional network, trained with a fixed seed and cached. It learns the labels of data sets that have them
(`LABELS`); otherwise it learns to match two crops of an image (Chen et al. 2020, "A Simple Framework for Contrastive
Learning of Visual Representations", Eq. 1). The distance has the extractor's name: its values are only comparable
between models of the same data set, measured by the same extractor.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ldm_lab.data.avatars import AvatarImages
from ldm_lab.data.dataset import ImageDataset, digest, spread
from ldm_lab.metrics.extractors import Extractor
from ldm_lab.metrics.images import DataPixels, Pixels, to_networks
from ldm_lab.utils import cache_folder
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.pixels import RGB_8_BIT
from ldm_lab.utils.randomness import generator
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.transfer import to_device
from ldm_lab.utils.writing import replacing, require_writable

REVISION = 1  # increase it with every change of the trained network
SIDE = 64  # maximum side of its input in pixels: larger images are averaged down
WIDTHS = (16, 32, 64, 96)  # channels of each level; each level halves the resolution
MOST_IMAGES, BATCH, STEPS, RATE = 8192, 128, 400, 3e-3
TEMPERATURE = 0.2
SMALLEST_CROP = 0.7  # relative to a side

Targets = Tensor | None  # (N, attributes), int64


class Own(Extractor):
    """Spatial means of a convolutional network's activations at every level, each scaled to unit variance.

    Low levels detect noise and blur, the last level the learned content.

    Args:
        name: name of its training set; the distance is `fd_<name>`.
        outputs: number of outputs in training.
        channels: channels of the images.
    """

    dimension = sum(WIDTHS)

    def __init__(self, name: str, outputs: int, channels: int = 3) -> None:
        super().__init__()
        self.name, self.distance = name, f"fd_{name}"
        widths = (channels, *WIDTHS)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.SiLU())
            for before, after in zip(widths, WIDTHS, strict=False)
        )
        self.head = nn.Linear(WIDTHS[-1], outputs)
        self.register_buffer("mean", torch.zeros(self.dimension))
        self.register_buffer("std", torch.ones(self.dimension))

    def activations(self, images: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` in [-1, 1] -> spatial means of each level, `(B, width)`."""
        means = []
        for level in self.levels:
            images = level(images)  # (B, width, H/2, W/2)
            means.append(images.mean((2, 3)))
        return means

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)`, uint8 or float32 in [-1, 1] -> `(B, D)`, float32."""
        return (torch.cat(self.activations(seen(images)), dim=1) - self.mean) / self.std


def seen(images: Tensor) -> Tensor:
    """Images, uint8 or in [-1, 1] -> network input `(B, C, h, w)` in [-1, 1], sides of at most `SIDE`."""
    images = to_networks(images)
    size = tuple(min(side, SIDE) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, size)


def avatar_labels(images: DataPixels, places: list[int]) -> Tensor:
    """Attributes of drawn avatars: hair, its colour, beard, glasses, skin ... `(N, attributes)`, int64."""
    from ldm_lab.data import drawing

    attributes = {
        "top": drawing.TOPS, "hair_color": drawing.HAIR_COLORS, "skin_color": drawing.SKIN_COLORS,
        "facial_hair": (drawing.pa.FacialHairType.NONE, *drawing.FACIAL_HAIR),
        "accessory": (drawing.pa.AccessoryType.NONE, *drawing.GLASSES),
        "eyes": drawing.EYES, "eyebrows": drawing.EYEBROWS, "mouth": drawing.MOUTHS,
        "clothing": drawing.CLOTHING, "clothing_color": drawing.FABRIC_COLORS,
    }  # fmt: skip
    rows = []
    for place in places:
        number = images.data.first + images.index(place)
        avatar = drawing.compose(random.Random(f"avatar/{images.data.drawing_seed}/{number}"))
        rows.append([options.index(getattr(avatar, name)) for name, options in attributes.items()])
    return torch.tensor(rows)


LABELS: dict[type[ImageDataset], tuple[str, Callable[..., Tensor]]] = {AvatarImages: ("avatars", avatar_labels)}


def own(images: Pixels, cache_dir: str | Path, device: torch.device, seed: int = 0) -> Own:
    """The extractor of some images, from the cache, or trained now and cached.

    Args:
        images: training images of the extractor.
        cache_dir: `paths.cache`; extractors are in `extractors/`.
        device: device of the training.
        seed: seed of the training.

    Raises:
        UserError: there are fewer than two images.
    """
    name, labels = LABELS.get(type(getattr(images, "data", None)), ("own", None))
    identity = [REVISION, seed, images.fingerprint(), images.transform(), SIDE, WIDTHS, MOST_IMAGES, BATCH, STEPS]
    if images.pixels != RGB_8_BIT:
        identity.append([images.pixels.channels, *images.pixels.value_range])
    path = folder(cache_dir) / f"{name}-{digest(identity)}.safetensors"
    if path.is_file():
        return read(path)
    require_writable(path.parent, "paths.cache=")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):  # one process trains, and the others load its result
        if not path.is_file():
            if len(images) < 2:
                raise UserError(f"{len(images)} image(s): an extractor cannot be trained on them; give more")
            places = spread(min(MOST_IMAGES, len(images)), len(images))
            pixels = torch.stack([images[place] for place in tqdm(places, desc="reading", unit="image")])
            targets = None if labels is None else labels(images, places)
            write(trained(name, pixels.to(device), targets, seed), path)
    return read(path)


def folder(cache_dir: str | Path) -> Path:
    """Folder of cached extractors."""
    return cache_folder.local(cache_dir) / "extractors"


def kept(cache_dir: str | Path, fingerprint: str) -> Own | None:
    """The cached extractor with this fingerprint, or None."""
    found = (read(path) for path in sorted(folder(cache_dir).glob("*.safetensors")))
    return next((extractor for extractor in found if extractor.fingerprint() == fingerprint), None)


def write(extractor: Own, path: Path) -> None:
    """Write an extractor into the cache."""
    channels = extractor.levels[0][0].in_channels
    notes = {"name": extractor.name, "outputs": str(extractor.head.out_features), "channels": str(channels)}
    with replacing(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in extractor.state_dict().items()}, temporary, notes)


def read(path: Path) -> Own:
    """Read a cached extractor, on the CPU. Raises `LoadError` if the file holds anything else."""
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            with torch.device("meta"):  # draws no random numbers
                extractor = Own(notes["name"], int(notes["outputs"]), int(notes.get("channels", 3)))
            extractor.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)  # noqa: SIM118
    except Exception as error:  # safetensors raises various errors on corrupt files
        raise LoadError(f"{path}: no extractor: {first_line(error)}; remove it, and another one is trained") from error
    return extractor.eval().requires_grad_(False)


def trained(name: str, images: Tensor, targets: Targets, seed: int) -> Own:
    """Train on `(N, C, H, W)` of `Pixels`, on their device, without changing the global random generator."""
    classes = [] if targets is None else (targets.max(0).values + 1).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "extractor").initial_seed())
        network = Own(name, sum(classes) or WIDTHS[-1], images.shape[1]).to(images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    with torch.enable_grad():
        for step in tqdm(range(STEPS), desc=f"learning features of {name}", unit="step"):
            rng = generator(seed, "extractor", step)
            chosen = torch.randperm(len(images), generator=rng)[:BATCH]
            batch = seen(images[to_device(chosen, images.device)])
            if targets is None:
                loss = instance_loss(network, batch, rng)
            else:
                loss = label_loss(network, cropped(batch, rng), to_device(targets[chosen], images.device), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return standardized(network.eval().requires_grad_(False), images)


@torch.no_grad()
def standardized(network: Own, images: Tensor) -> Own:
    """Standardise the features to mean 0 and variance 1 on `images`, so that all features have equal weight."""
    features = torch.cat([network(part) for part in images.split(BATCH)]).cpu().double()
    network.mean.copy_(features.mean(0))
    network.std.copy_(features.std(0).clamp(min=1e-6))
    return network


def label_loss(network: Own, images: Tensor, targets: Tensor, classes: list[int]) -> Tensor:
    """Mean cross-entropy over all attributes, 0-dim."""
    scores = network.head(network.activations(images)[-1]).split(classes, dim=1)
    return torch.stack([F.cross_entropy(s, t) for s, t in zip(scores, targets.unbind(1), strict=True)]).mean()


def instance_loss(network: Own, images: Tensor, rng: torch.Generator) -> Tensor:
    """Contrastive loss between two crops of each image in a batch: Chen et al. 2020, Eq. 1, 0-dim."""
    views = torch.cat([cropped(images, rng), cropped(images, rng)])  # (2B, C, h, w)
    codes = F.normalize(network.head(network.activations(views)[-1]), dim=1)
    likeness = codes @ codes.T / TEMPERATURE  # (2B, 2B)
    likeness.fill_diagonal_(-torch.inf)
    partners = torch.arange(len(views), device=views.device).roll(len(images))
    return F.cross_entropy(likeness, partners)


def cropped(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random crops of each image, enlarged to its size: `(B, C, h, w)`."""
    scale, down, right = torch.rand(3, len(images), generator=rng)
    scale = SMALLEST_CROP + (1 - SMALLEST_CROP) * scale
    room = 1 - scale
    zero = torch.zeros_like(scale)
    rows = [torch.stack([scale, zero, room * (2 * right - 1)], 1), torch.stack([zero, scale, room * (2 * down - 1)], 1)]
    grid = F.affine_grid(to_device(torch.stack(rows, 1), images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
