"""Images a second from a store against a local folder, and a start with many objects: the figures of docs/stores.md.

python scripts/measure_stores.py        # from the repository's root, with the extras [test]; nothing else running

The store is moto's S3 server in a process of its own on this machine, so it shares the cores with what it serves.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tests`
from ldm_lab.data.images import FolderImages
from ldm_lab.data.loading import Loader
from ldm_lab.data.sampler import StreamBatchSampler
from tests.stores import S3, Pages

BATCH, WORKERS, ARCHIVES = 16, 2, 6


def serve(kind: type, arguments: tuple, folders: dict[str, Path], pipe: multiprocessing.connection.Connection) -> None:
    """A server in this process, until the pipe closes."""
    server = kind(*arguments)
    for prefix, folder in folders.items():
        server.put_folder(folder, prefix)
    pipe.send(server.endpoint)
    pipe.recv()


def started(kind: type, *arguments: object, folders: dict[str, Path] | None = None) -> multiprocessing.Process:
    """A server in a process of its own; from now on s3fs asks this server."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(kind, arguments, folders or {}, there), daemon=True
    )
    process.start()
    os.environ["AWS_ENDPOINT_URL"] = here.recv()
    process.pipe = here
    return process


def make(root: Path, count: int) -> tuple[Path, Path]:
    """Smooth pictures as JPEG files of 256 x 256, and the same in archives."""
    generator, folder, sets = np.random.default_rng(0), root / "photos", root / "sets"
    folder.mkdir(), sets.mkdir()
    for number in range(count):
        small = generator.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(
            folder / f"{number:05}.jpg", quality=95
        )
    paths = sorted(folder.iterdir())
    for number in range(ARCHIVES):
        with tarfile.open(sets / f"s-{number}.tar", "w") as archive:
            for path in paths[number::ARCHIVES]:
                archive.add(path, path.name)
    return folder, sets


def epochs(root: str, cache: Path) -> list[float]:
    """Images a second of two epochs."""
    images = FolderImages(root, "train", 256, val_fraction=0.02, cache_dir=cache)
    whole = len(images) // BATCH * BATCH
    speeds = []
    for epoch in range(2):
        sampler = StreamBatchSampler(len(images), BATCH, BATCH, seed=epoch, stop=whole)
        loader = Loader(images, batch_sampler=sampler, num_workers=WORKERS)
        begun = time.perf_counter()
        count = sum(len(batch["image"]) for batch in loader)
        speeds.append(count / (time.perf_counter() - begun))
    return speeds


def listing(cache: Path, pipe: multiprocessing.connection.Connection) -> None:
    """Seconds of the names and of the fingerprint, and the memory that they take in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    images = FolderImages("s3://photos/many", "train", 8, val_fraction=0.05, cache_dir=cache)
    len(images)
    named = time.perf_counter()
    images.fingerprint()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((named - begun, time.perf_counter() - named, (after - before) / 1024))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--objects", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as place:
        folder, sets = make(Path(place), options.images)
        server = started(S3, folders={"photos": folder, "sets": sets})
        pattern = f"s3://photos/sets/s-{{0..{ARCHIVES - 1}}}.tar"
        roots = {"folder": str(folder), "objects": "s3://photos/photos", "archives": pattern}
        found: dict[str, list[list[float]]] = {name: [] for name in roots}
        for number in range(options.rounds):
            for name, root in roots.items():
                found[name].append(epochs(root, Path(place, f"cache{number}")))
                print(name, number, [f"{speed:.0f}" for speed in found[name][-1]], flush=True)
        server.terminate()
        for name, rounds in found.items():
            for epoch in (0, 1):
                speed = statistics.median(speeds[epoch] for speeds in rounds)
                pairs = zip(rounds, found["folder"], strict=True)
                ratio = statistics.median(speeds[epoch] / here[epoch] for speeds, here in pairs)
                print(f"{name}, epoch {epoch + 1}: {speed:.0f} images/s, {ratio:.2f} of the folder's")
        server = started(Pages, options.objects)
        for start in ("first", "second"):
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=listing, args=(Path(place, "many"), there))
            process.start()
            seconds = here.recv()
            process.join()
            print(f"{start} start: names {seconds[0]:.1f} s, fingerprint {seconds[1]:.1f} s, {seconds[2]:.0f} MB")
        size = sum(path.stat().st_size for path in Path(place, "many").rglob("index.npz"))
        print(f"{options.objects:,} objects: the list has {size / 1e6:.0f} MB")
        server.terminate()


if __name__ == "__main__":
    main()
