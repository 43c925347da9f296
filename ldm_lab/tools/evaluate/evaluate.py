"""Runs `python -m ldm_lab evaluate` for samples, images, snapshots and first stages."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_lab.checkpoints import averages, locate
from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.checkpoints.locate import State
from ldm_lab.metrics import features
from ldm_lab.metrics.images import Pixels
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs import card, tracking
from ldm_lab.sampling import averaged
from ldm_lab.sampling.generate import image_size
from ldm_lab.tools.evaluate import autoencoder, drawn, results, sources
from ldm_lab.tools.evaluate.drawn import Sampling
from ldm_lab.tools.evaluate.evaluator import Evaluator
from ldm_lab.tools.evaluate.scores import Scores
from ldm_lab.tools.evaluate.sources import Target
from ldm_lab.training import device
from ldm_lab.training.quiet import quiet
from ldm_lab.training.trainer import Trainer
from ldm_lab.training.watch import watched
from ldm_lab.utils import hub
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.terminal import is_first_process
from ldm_lab.utils.writing import SaveError, require_writable


@dataclass(frozen=True)
class Request:
    """The user's request: flags of `python -m ldm_lab evaluate` (see `command.parser`), those that are not given None.

    Attributes:
        sampling: settings of sampling.
        cache_dir: folder of cached extractors and features.
        data_cache: folder of drawn images; None: as in the run's config.
    """

    source: str
    data: str | None
    sampling: Sampling
    features: str
    weights: str | None
    lpips_weights: str | None
    image_size: Sequence[int] | None
    num_reference: int
    bootstrap: int
    cache_dir: Path
    data_cache: str | None
    output: Path | None
    save_reference: Path | None
    accelerator: str
    devices: int
    num_workers: int
    plugins: Sequence[str]
    max_pixels: int | None = None
    nodes: int = 1
    channels: int = 3
    value_range: tuple[float, float] = RGB_8_BIT.value_range

    def trainer(self) -> Trainer:
        """A Lightning trainer that distributes the work over devices."""
        quiet()
        return Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.nodes,
            strategy="auto" if self.devices * self.nodes == 1 else "ddp",
            precision=device.resolve_precision("auto", self.accelerator),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def evaluator(self, target: Target, trainer: Trainer) -> Evaluator:
        """The evaluator of this request."""
        return Evaluator(target, trainer, self.features, self.weights, self.cache_dir, self.bootstrap, self.num_workers)

    def target(self, size: Sequence[int], pixels: PixelFormat, run: Path | None = None) -> Target:
        """The target for images of `size` and `pixels`: `data`, or by default the training images of the run.

        Raises:
            UserError: there is no target, its images have another size or other channels, or the features see no
                images of so many channels.
        """
        features.check(self.features, self.weights, pixels.channels)
        if self.data:
            more = (self.num_reference, self.max_pixels, pixels, self.cache_dir)
            found = sources.named_data(self.data, size, self.said_of(run), *more)
        else:
            found = self.run_data(run)
        if found is None:
            raise UserError(f"{self.source}: no run that says what it was trained on: add --data FOLDER or stats.npz")
        if self.save_reference and found.images is None:
            raise UserError(f"--save-reference: --data {self.data} is statistics already, and the images are not here")
        if found.images is not None and found.images.size != tuple(size):
            there, here = (" x ".join(map(str, sides)) for sides in (found.images.size, size))
            raise UserError(f"{found.images.source} has {there} pixels and {self.source} {here}: sizes must be equal")
        if found.images is not None and found.images.pixels.channels != pixels.channels:
            there, here = found.images.pixels.channels, pixels.channels
            raise UserError(f"{found.images.source} has {there} channel(s) and {self.source} {here}: name equal images")
        return found

    def said_of(self, run: Path | None) -> Target | None:
        """The data of a run if they still exist; `--data` works without them."""
        with contextlib.suppress(UserError):
            return self.run_data(run)
        return None

    def run_data(self, run: Path | None) -> Target | None:
        """The data that a run was trained on; `None` without a run. Raises `UserError` if the data are gone."""
        return run and sources.run_data(run, self.plugins, self.data_cache, self.num_reference)


def evaluate(request: Request) -> Scores:
    """Evaluate samples of a model, or images; returns the metrics.

    Raises:
        UserError: something is missing or does not fit; the one-line message names it.
    """
    trainer, state = request.trainer(), sources.state_of(request.source)
    with watched():
        if state is not None:
            return evaluate_state(request, state, trainer)[0]
        if request.sampling.ema is not None:
            raise UserError(f"--ema {request.sampling.ema}: {request.source} is images, not a run: leave --ema out")
        pixels = PixelFormat(request.channels, request.value_range)
        images = sources.images_of(request.source, request.image_size, request.max_pixels, pixels)
        evaluator = request.evaluator(request.target(images.size, images.pixels), trainer)
        evaluator.check(len(images), images.jpeg())
        return finish(request, evaluator, images, "images")


def evaluate_state(
    request: Request, state: State, trainer: Trainer, evaluator: Evaluator | None = None
) -> tuple[Scores, Evaluator]:
    """Sample a model state and evaluate the samples; the returned evaluator serves other states of the run too."""
    if (length := request.sampling.ema) is not None:
        state = averages.snapshot_of(state, f"--ema={length}")
    given = averaged.given(state, length, "--ema", request.plugins)
    pipe = LDMPipeline.from_file_or_folder(state.path, given=given, plugins=request.plugins)
    if evaluator is None:
        evaluator = request.evaluator(request.target(image_size(pipe), pipe.vqvae.pixels, state.source), trainer)
        prepare(evaluator.target)
        # Before sampling. By default JPEG compression matches, as the reference is the model's training images.
        evaluator.check(request.sampling.num_samples, jpeg=0.0 if request.data else None)
    more = {"output": request.output, "plugins": request.plugins}
    samples = drawn.draw(pipe, state, request.source, request.sampling, trainer, is_first_process(), **more)
    how = {"images_seen": drawn.images_seen(state), "sampling": request.sampling.settings()}
    return finish(request, evaluator, samples, "samples", state, **how), evaluator


def prepare(target: Target) -> None:
    """Let data sets write their files, on the first process, before the other processes start."""
    for images in (target.images, target.held_out):
        if hasattr(images, "data") and is_first_process():
            images.data.prepare()


def finish(
    request: Request,
    evaluator: Evaluator,
    images: Pixels,
    kind: str,
    state: State | None = None,
    **how: Any,  # noqa: ANN401
) -> Scores:
    """Compute the metrics, write and print them."""
    folder = request.output or sources.home(request.source, state)
    if is_first_process():
        require_writable(folder, "--output")
    found = evaluator.features(images)  # first, as it starts the other processes
    real = evaluator.reference
    content = results.describe(request.source, kind, images.fingerprint(), len(images), real, request.bootstrap, **how)
    name = results.file_name(content)
    scores, beside = evaluator.measure(found, images, folder / f"{name}_neighbours.png")
    if not evaluator.trainer.is_global_zero:
        return scores
    path = results.write(folder, content, scores, held_out=beside or None)
    report(request, content, scores, beside)
    print(f"  {path}", flush=True)
    if state is not None:
        with contextlib.suppress(SaveError):  # the model's folder may not be writable
            card.refresh(state.source)
        values = {f"eval/{name}": score.value for name, score in scores.items()}
        used, made = ("samples", images.fingerprint()), ("evaluation", name.rpartition("_")[2])
        tracking.log_to_run(state.source / "diffusion", folder, used, made, content, values, how["images_seen"])
    if request.save_reference:
        evaluator.reference.save(request.save_reference)
    return scores


def report(request: Request, content: dict[str, Any], scores: Scores, beside: dict[str, Any]) -> None:
    """Print the table."""
    reference = content["reference"]
    count = "" if reference["count"] is None else f" ({reference['count']:,} images)"
    print(f"{request.source}: {content['num_samples']:,} {content['kind']} against {reference['source']}{count}")
    print(results.table(scores, beside))


def evaluate_snapshots(request: Request, export: Path | None = None) -> dict[int, Scores]:
    """Evaluate all snapshots of a run and its newest state; print, and on request export, the best by Fréchet distance.

    Raises:
        UserError: the run has no snapshots, or the folder `export` is not empty.
    """
    if export and export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise UserError(f"--export-best {export}: must not exist, or be an empty folder")
    run = Path(request.source)
    stage = run / "diffusion" if (run / "diffusion").is_dir() else run
    found = [State(run, path, seen) for seen, path in locate.snapshots(stage / locate.SNAPSHOTS).items()]
    if not found:
        raise UserError(f"{run}: has no snapshots; train.py snapshots=1M takes one every million images")
    newest = locate.find(run)
    if drawn.images_seen(newest) != found[-1].images_seen:
        found.append(newest)
    trainer, evaluator, curve = request.trainer(), None, []
    with watched():
        for state in found:
            scores, evaluator = evaluate_state(request, state, trainer, evaluator)
            curve.append((state, drawn.images_seen(state), scores))
    if not is_first_process():
        return {}
    distance = evaluator.extractor.distance
    best = min(curve, key=lambda point: point[2][distance].value)[0]
    print(f"{'images':>12}  {distance}")
    for state, seen, scores in curve:
        count = "unknown" if seen is None else f"{seen:,}"
        print(f"{count:>12}  {scores[distance].value:.4g}{'  best' if state is best else ''}")
    if export:
        LDMPipeline.from_pretrained(best.path, plugins=request.plugins).save_pretrained(export)
        print(f"{best.path} -> {export}")
    return {seen: scores for _, seen, scores in curve}


def evaluate_autoencoder(request: Request) -> Scores:
    """Evaluate a first stage on the held-out images of its run, or on the images of `--data`."""
    path = hub.local(request.source)
    model = load_autoencoder(path, request.plugins)
    if request.data and Path(request.data).suffix == ".npz":
        raise UserError(f"--data {request.data}: reconstructions need the images themselves: name a folder")
    of_run = request.said_of(path) if request.data else request.run_data(path)
    size = request.image_size or (of_run and of_run.images.size)
    if size is None:
        raise UserError(f"{request.source} does not say of which images it is: add --data FOLDER and --image-size")
    target = request.target(size, model.pixels, path)
    images = target.images if request.data else target.held_out
    folder = request.output or sources.home(request.source, State(Path(request.source), path))
    if is_first_process():
        require_writable(folder, "--output")
    channels = model.config.in_channels
    trainer, lpips = request.trainer(), autoencoder.perceptual(request.lpips_weights, channels)
    prepare(target)
    evaluator = request.evaluator(target, trainer)
    evaluator.check(len(images))
    with watched():
        scores, real = autoencoder.reconstructions(
            model, evaluator.extractor, lpips, images, trainer, request.bootstrap
        )
    identity = f"{fingerprint(model)}-{images.fingerprint()}"
    content = results.describe(request.source, "reconstructions", identity, len(images), real, request.bootstrap)
    if not trainer.is_global_zero:
        return scores
    written = results.write(folder, content, scores)
    report(request, content, scores, {})
    print(f"  {written}", flush=True)
    return scores
