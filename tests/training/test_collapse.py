"""A codebook or discriminator that has collapsed is named when it happens, once; a healthy one never is."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from ldm_lab.training.callbacks.discriminator_health import DiscriminatorHealth
from ldm_lab.training.callbacks.episode import Episode
from tests.trained import metrics, train

COMMAND = ["experiment=celebahq/autoencoder", "max_images=96", "validate_every=8", "plugins=[tests]"]


class Dead(Callback):
    """Between two numbers of images, the codes but one lie far from all latents, or the discriminator is all zeros."""

    def __init__(self, part, start, end):
        self.part, self.start, self.end, self.alive = part, start, end, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.start <= module.images_seen < self.end:
            network = module.get_submodule(self.part)
            self.alive = self.alive or {name: value.clone() for name, value in network.state_dict().items()}
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.zero_() if "discriminator" in self.part else parameter[1:].fill_(1e3)
        elif self.alive:
            module.get_submodule(self.part).load_state_dict(self.alive)
            self.alive = None


def dead(part, start, end):
    settings = {"_target_": "tests.training.test_collapse.Dead", "part": part, "start": start, "end": end}
    return [f"+callbacks.dead.{key}={value}" for key, value in settings.items()]


def flags(folder, what):
    return {images: row[f"collapse/{what}"] for images, row in metrics(folder).items()}


def test_a_dead_codebook_is_named_once_an_episode(tmp_path, capsys):
    """Nothing revives the codes (`threshold`), until they are put back."""
    train(tmp_path, *COMMAND, "+model.codebook.threshold=0", *dead("autoencoder.quantize.embedding", 24, 64))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert "the codebook has collapsed: its perplexity is 1.0 of 32 codes, since 32 images" in lines[0]
    assert "model.legacy_codebook_loss=false" in lines[0]
    expected = {images: float(48 <= images <= 64) for images in range(8, 104, 8)}
    assert flags(tmp_path / "celebahq/autoencoder", "codebook") == expected


def test_a_dead_discriminator_is_named_once_an_episode_also_over_a_resume(tmp_path, capsys):
    """The run is interrupted between the second and the third of the bad validations."""
    interrupt = [f"+callbacks.signal.{key}={value}" for key, value in
                 {"_target_": "tests.callbacks.Signal", "stage": "autoencoder", "images": 40}.items()]  # fmt: skip
    command = [*COMMAND, *dead("loss.discriminator", 24, 64)]
    with pytest.raises(SystemExit):
        train(tmp_path, *command, *interrupt)
    assert "warning: " not in capsys.readouterr().out
    train(tmp_path, *command)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert "the discriminator is blind: its loss is 1, its mean logits 0 for images and 0 for" in lines[0]
    assert "since 32 images" in lines[0]
    assert "model.loss.adversarial.start_images" in lines[0]
    seen = flags(tmp_path / "celebahq/autoencoder", "discriminator")
    assert {images for images, flag in seen.items() if flag} >= {48, 56, 64}
    assert not any(seen[images] for images in seen if images < 48)


@pytest.mark.parametrize("model", ["vq_f4", "kl_f8"])
def test_healthy_runs_never_warn(tmp_path, capsys, model):
    train(tmp_path, *COMMAND, f"model={model}", "model.loss.adversarial.start_images=16")
    assert "warning: " not in capsys.readouterr().out
    rows = metrics(tmp_path / "celebahq/autoencoder")
    judged = {
        name: [images for images, row in rows.items() if row.get(f"collapse/{name}") == 0]
        for name in ("codebook", "discriminator")
    }
    everywhere = list(range(8, 104, 8))
    assert judged == {"codebook": everywhere if model == "vq_f4" else [], "discriminator": everywhere[2:]}


def test_an_episode_needs_patience_to_begin_and_a_good_value_to_end():
    episode, bad, good, neither = Episode(patience=2), (True, False), (False, True), (False, False)
    sequence = [bad, neither, bad, bad, neither, bad, good, bad, bad]
    begins = [episode.note(images, *value) for images, value in enumerate(sequence)]
    assert begins == [False, False, False, True, False, False, False, False, True]
    assert (episode.on, episode.since) == (True, 7)
    again = Episode(patience=2)
    assert again.load_state_dict(episode.state_dict())
    assert not again.note(9, *bad)  # it is said already
    assert not again.load_state_dict(episode.state_dict())  # older than what it knows


def test_a_discriminator_that_wins_is_named_and_one_that_has_not_begun_is_not(capsys):
    health = DiscriminatorHealth(patience=2)
    logged = []
    module = SimpleNamespace(
        images_seen=0, step_left_out=False, device="cpu", log=lambda name, value, **_: logged.append(value),
        loss=SimpleNamespace(
            discriminator=object(), adversarial=SimpleNamespace(discriminator_factor=lambda images: images >= 16)
        ),
    )  # fmt: skip
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(global_batch_size=8), is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    for loss in (0.0, 0.0, 0.001, 0.001, 0.015, 0.5):
        module.images_seen += 8
        terms = {"discriminator": loss, "logits_real": 5.0, "logits_fake": -5.0}
        module.terms = {name: torch.tensor(value) for name, value in terms.items()}
        health.on_train_batch_end(trainer, module)
        health.on_validation_epoch_end(trainer, module)
    assert logged == [0, 1, 1, 0]
    said = capsys.readouterr().out
    assert said.count("warning: the discriminator wins: its loss is 0.001") == 1
    assert "since 24 images" in said
