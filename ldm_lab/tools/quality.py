"""Train variants of the demo at one budget and compare them with intervals: the table of docs/quality.md.

Every row is commands that a user could type, `train.py` and `python -m ldm_lab evaluate`, so that the same command
again goes on where it stopped, and a row that is there is not made twice. One first stage serves all rows that do not
ask for another. With two jobs on two cores, each computes with one thread. The same rows on other images:
`--experiment folder data.root=/data/emoji data.image_size=64`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_lab.runs.record import Evaluation, read_evaluation
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.lengths import parse_images
from ldm_lab.utils.urls import is_url
from ldm_lab.utils.writing import replacing

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
FIRST_STAGES = {
    "vq": (),
    "vq_left_alone": ("model.codebook.init_step=null", "+model.codebook.until_step=0"),
    "kl": ("model=kl_avatars",),
    "vq_random": ("model.start=random", "model.autoencoder.norm_num_groups=8"),
    "vq_adam": ("model.optimizer._target_=torch.optim.Adam", "model.optimizer.lr=2e-3"),
    "vq_2022": (
        "model.start=random", "model.autoencoder.norm_num_groups=8", "model.optimizer._target_=torch.optim.Adam",
        "model.optimizer.lr=1e-3", "model.optimizer.betas=[0.5,0.9]",
        "model.schedule._target_=ldm_lab.training.schedules.CosineWithWarmup", "model.schedule.warmup_images=640",
    ),
    "vq_simvq": ("model.quantizer=simvq",),
    "vq_simvq_gaussian": ("model.quantizer=simvq", "model.codebook.init_step=null", "+model.codebook.until_step=0"),
    "vq_rotation": ("model.gradient=rotation",),
    "vq_equivariant": ("model.equivariance.probability=0.5",),
    "kl_equivariant": ("model=kl_avatars", "model.equivariance.probability=0.5"),
}  # fmt: skip
OBJECTIVE = "ldm_lab.diffusion.objective"
ADAMW = (
    "model.optimizer._target_=torch.optim.AdamW", "model.optimizer.lr=1e-3",
    "model.schedule._target_=ldm_lab.training.schedules.CosineWithWarmup", "model.schedule.warmup_images=2000",
)  # fmt: skip
STANDARD = ("dpm_solver", 20, 0)  # sampler, evaluations and eta of most rows: the best quality per minute
FLOW = ("flow_heun", 20, 0)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a question, the tested answer, and its settings.

    Attributes:
        name: name of its runs.
        question: the question of the row.
        answer: the tested answer.
        settings: overrides of stage 2.
        first_stage: one of `FIRST_STAGES`.
        flags: flags of the evaluation.
        guidance: scale of autoguidance by the run's own snapshot at a quarter of its training; 1: none.
        sampling: sampler, evaluations and eta.
    """

    name: str
    question: str
    answer: str
    settings: tuple[str, ...] = ()
    first_stage: str = "vq"
    flags: tuple[str, ...] = ()
    guidance: float = 1.0
    sampling: tuple[str, int, int] = STANDARD


DEMO = Variant("demo", "the demo as it is", "VQ, velocity, min-SNR, low-discrepancy timesteps, EMA 0.999")
VARIANTS = (
    DEMO,
    Variant("kl", "first stage", "KL", first_stage="kl"),
    Variant("random", "start of the first stage", "random weights, 8 groups", first_stage="vq_random"),
    Variant("adam", "optimizer of the first stage", "Adam, a rate of 2e-3", first_stage="vq_adam"),
    Variant("left_alone", "codebook", "neither drawn from latents nor re-used", first_stage="vq_left_alone"),
    Variant("simvq", "codebook", "SimVQ, drawn from latents", first_stage="vq_simvq"),
    Variant("simvq_gaussian", "codebook", "SimVQ, Gaussian", first_stage="vq_simvq_gaussian"),
    Variant("rotation", "gradient of the quantizer", "rotation trick", first_stage="vq_rotation"),
    Variant("equivariant", "latents", "equivariant, p = 0.5", first_stage="vq_equivariant"),
    Variant("kl_equivariant", "latents", "KL, equivariant, p = 0.5", first_stage="kl_equivariant"),
    Variant("epsilon", "prediction", "epsilon", ("model.scheduler.prediction_type=epsilon",)),
    Variant(
        "uniform", "timesteps", "uniform",
        ("model.objective.timesteps._target_=ldm_lab.diffusion.timesteps.UniformTimesteps",),
    ),
    Variant(
        "plain", "weighting", "plain",
        (f"model.objective.weighting._target_={OBJECTIVE}.PlainWeighting", "~model.objective.weighting.gamma"),
    ),
    Variant("gamma_5", "weighting", "min-SNR, gamma 5", ("model.objective.weighting.gamma=5",)),
    Variant("flow", "process", "flow matching, times by the latents' size", ("process=flow",), sampling=FLOW),
    Variant(
        "flow_unshifted", "process", "flow matching, times not shifted", ("process=flow", "model.scheduler.shift=1"),
        sampling=FLOW,
    ),
    Variant("adamw", "optimizer", "AdamW, a rate of 1e-3", ADAMW),
    Variant(
        "all_2022", "both stages", "random start, Adam and AdamW at 1e-3, half a cosine, gamma 5",
        (*ADAMW, "model.objective.weighting.gamma=5"), first_stage="vq_2022",
    ),
    # A longer average than the demo's would be equal, as the decay's warm-up does not reach it in so short a training.
    Variant("raw", "moving average", "none", ("model.ema.decay=0",)),
    Variant("ema_9", "moving average", "0.9", ("model.ema.decay=0.9",)),
    # Trains like the demo. Other lengths: python -m ldm_lab ema runs/quality/post_hoc_0 --length ... --evaluate.
    Variant(
        "post_hoc", "moving average", "post hoc, length 0.03",
        ("model.power_ema=[0.05,0.1]", "snapshots=700"), flags=("--ema", "0.03"),
    ),
    Variant("autoguidance", "guidance", "by its snapshot at a quarter of the training, w = 1.5", guidance=1.5),
)  # fmt: skip
SAMPLERS = (("ddim", 10, 0), ("ddim", 20, 0), ("ddim", 50, 0), ("ddim", 200, 0), ("ddim", 50, 1),
            ("dpm_solver", 10, 0), ("dpm_solver", 20, 0))  # fmt: skip
EXPERIMENTS = ("avatars", "folder")
CHOICES = [*(variant.name for variant in VARIANTS), "samplers"]
OF_SAMPLES, OF_FIRST_STAGES = ("precision", "recall"), ("psnr", "ssim")  # besides the Frechet distance


def main(argv: list[str]) -> None:
    """Make the missing rows, print the table and write `quality.md`. Raises `UserError` if a command fails."""
    options = parser().parse_args(argv)
    for flag in ("seeds", "samples", "jobs"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)}: must be at least 1")
    text = Workshop(options).table()
    print(text)
    with replacing(options.runs / "quality.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def parser() -> argparse.ArgumentParser:
    """The tool's argument parser."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab quality", description=__doc__, formatter_class=text)
    add = parser.add_argument
    add("settings", nargs="*", metavar="KEY=VALUE", help="of all trainings, e.g. trainer=gpu")
    add("--experiment", choices=EXPERIMENTS, default=EXPERIMENTS[0], help="that is varied (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs (default: %(default)s)")
    add("--cache", type=_absolute, help="paths.cache: images, latents, extractors (default: that of train.py)")
    add("--budget", default="22400", help="training images of stage 2 (default: %(default)s)")
    add("--first-stage", default="11200", help="training images of stage 1 (default: %(default)s)")
    add("--seeds", type=int, default=2, help="of every row (default: %(default)s)")
    add("--samples", type=int, default=1000, help="of an evaluation (default: %(default)s)")
    add("--jobs", type=int, default=2, help="commands at a time (default: %(default)s)")
    add("--only", nargs="+", choices=CHOICES, default=CHOICES, help="these rows (default: all)")
    return parser


def _absolute(place: str) -> str:
    return place if is_url(place) else str(Path(place).absolute())


class Workshop:
    """Makes the rows by running commands, each in its own process.

    Args:
        options: the flags.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.runs = options, options.runs.absolute()
        asked = {DEMO.name, *options.only} if "samplers" in options.only else set(options.only)  # on the demo's runs
        self.variants = [variant for variant in VARIANTS if variant.name in asked]
        self.seeds = range(options.seeds)

    def table(self) -> str:
        """Train and evaluate the missing rows; returns all rows in Markdown."""
        first_stages = list(dict.fromkeys(variant.first_stage for variant in self.variants))
        of_first_stages = [(name, seed) for name in first_stages for seed in self.seeds]
        of_variants = [(variant, seed) for variant in self.variants for seed in self.seeds]
        self.each(self.train_first_stage, of_first_stages)
        reconstructions = self.each(self.evaluate_first_stage, of_first_stages)
        self.each(self.train, of_variants)
        samples = self.each(self.evaluate, [(*pair, pair[0].sampling) for pair in of_variants])
        lines = [*self.head("first stage", reconstructions[0], OF_FIRST_STAGES)]
        lines += self.rows(first_stages, reconstructions, OF_FIRST_STAGES)
        lines += ["", *self.head("question", samples[0], OF_SAMPLES)]
        lines += self.rows([f"{one.question}: {one.answer}" for one in self.variants], samples, OF_SAMPLES)
        if "samplers" in self.options.only:
            found = self.each(self.evaluate, [(DEMO, seed, how) for how in SAMPLERS for seed in self.seeds])
            lines += ["", *self.head("sampler, of the demo", found[0], OF_SAMPLES)]
            lines += self.rows(
                [f"{name}, {steps} steps, eta {eta}" for name, steps, eta in SAMPLERS], found, OF_SAMPLES
            )
        return "\n".join(lines)

    def each(self, act: Callable[..., Any], items: Sequence[tuple]) -> list[Any]:
        """Apply `act` to all items, `--jobs` at a time. Raises the first failure once running jobs have ended."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            return list(pool.map(lambda item: act(*item), items))

    def train_first_stage(self, name: str, seed: int) -> None:
        """Train the run `first_<name>_<seed>`."""
        settings = [
            f"experiment={self.options.experiment}/autoencoder",
            f"max_images={self.options.first_stage}",
            *FIRST_STAGES[name],
        ]
        self.run_training(f"first_{name}_{seed}", seed, settings)

    def train(self, variant: Variant, seed: int) -> None:
        """Train the run `<variant>_<seed>` on the first stage of seed 0, which all runs share."""
        first = self.runs / f"first_{variant.first_stage}_0" / "autoencoder" / "final"
        experiment = f"experiment={self.options.experiment}/diffusion"
        settings = [experiment, f"max_images={self.options.budget}", f"autoencoder={first}"]
        self.run_training(f"{variant.name}_{seed}", seed, [*settings, *variant.settings])

    def run_training(self, name: str, seed: int, settings: list[str]) -> None:
        """Run `train.py`, which does nothing for a finished run."""
        cache = [f"paths.cache={self.options.cache}"] if self.options.cache else []
        common = [f"name={name}", f"seed={seed}", f"paths.runs={self.runs}", "logger=csv", *cache]
        self.command(str(TRAIN), *settings, *common, *self.options.settings)

    def evaluate_first_stage(self, name: str, seed: int) -> Evaluation:
        """Evaluate reconstructions of held-out images."""
        return self.evaluation(f"first_{name}_{seed}", "--autoencoder")

    def evaluate(self, variant: Variant, seed: int, how: tuple[str, int, int]) -> Evaluation:
        """Evaluate samples, which are drawn once."""
        sampler, steps, eta = how
        flags = {"--num-samples": self.options.samples, "--sampler": sampler, "--steps": steps, "--eta": eta}
        name, guide = f"{variant.name}_{seed}", ()
        if variant.guidance != 1:
            flags["--guidance"], guide = variant.guidance, ("--guide", f"{self.runs / name}@{self.quarter}")
        words = [str(word) for flag in flags.items() for word in flag]
        return self.evaluation(name, *words, *variant.flags, guide=guide)

    @property
    def quarter(self) -> int:
        """Training images of the snapshot that guides; the recipes keep one at each quarter."""
        return parse_images(self.options.budget, "--budget") // 4

    def evaluation(self, name: str, *flags: str, guide: Sequence[str] = ()) -> Evaluation:
        """Run `evaluate` into a folder for exactly these flags."""
        folder = self.runs / name / "tables" / "_".join(flag.strip("-") for flag in flags)
        if not list(folder.glob("*.json")):
            cache = ["--cache", self.options.cache] if self.options.cache else []
            words = [*flags, *guide, *cache, "--output", str(folder), "--batch-size", "32"]
            self.command("-m", "ldm_lab", "evaluate", str(self.runs / name), *words)
        return read_evaluation(next(iter(sorted(folder.glob("*.json")))))

    def command(self, *words: str) -> None:
        """Run a command on its share of the cores. Raises `UserError` with the command's last line if it fails."""
        threads = max(1, (os.cpu_count() or 1) // self.options.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        print(" ".join(words), flush=True)
        done = subprocess.run(
            [sys.executable, *words], cwd=TRAIN.parent, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            output = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
            raise UserError(f"{' '.join(words)} failed: {output[-1]}")

    def head(self, first: str, evaluation: Evaluation, names: Sequence[str]) -> list[str]:
        """The first two lines of a table, with the evaluation's name of the distance."""
        return [f"| {first} | {' | '.join((distance(evaluation), *names))} |", f"|{'---|' * (2 + len(names))}"]

    def rows(self, labels: Sequence[str], found: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
        """A line for each label, with the values of all seeds."""
        count = len(self.seeds)
        lines = []
        for place, label in enumerate(labels):
            seeds = found[place * count : (place + 1) * count]
            cells = [" / ".join(cell(one, name) for one in seeds) for name in (distance(seeds[0]), *names)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return lines


def distance(evaluation: Evaluation) -> str:
    """The name of the Frechet distance among the metrics."""
    return next(name for name in evaluation.metrics if name.startswith(("fd_", "rfd_", "fid", "rfid")))


def cell(evaluation: Evaluation, name: str) -> str:
    """A value with its interval, if it has one."""
    found = evaluation.metrics.get(name)
    if found is None:
        return "-"
    value = f"{found['value']:.3g}"
    return f"{value} ({found['low']:.3g}, {found['high']:.3g})" if {"low", "high"} <= found.keys() else value
