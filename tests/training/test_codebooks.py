"""`model.quantizer=simvq` and `model.gradient=rotation`: choices of training, of which the result shows nothing."""

import pytest
import torch

from ldm_lab.config.compose import Recipe, build
from ldm_lab.models.vq_model import VQModel
from ldm_lab.training.autoencoder_module import trainable
from tests.helpers import assert_close_relative
from tests.trained import last_checkpoint, metrics, train
from tests.training.test_resume import assert_same_training, interrupt

STAGE = "experiment=avatars/autoencoder"
EQUIVARIANT = "model.equivariance.probability=0.6"  # so that one training tests all that is new for codebooks
BOTH = ("model.quantizer=simvq", "model.gradient=rotation")
FOLDER = "avatars/autoencoder"


def module_with(*overrides):
    (config,) = Recipe.parse([STAGE, "debug=tiny", *overrides]).compose()
    return build(config.model, "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stage trained with both, some steps on transformed latents."""
    runs = tmp_path_factory.mktemp("codebooks")
    train(runs, STAGE, *BOTH, EQUIVARIANT)
    return runs / FOLDER


def test_an_interrupted_training_ends_as_an_undisturbed_one(run, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, STAGE, *BOTH, EQUIVARIANT, *interrupt("autoencoder", 24))
    train(tmp_path, STAGE, *BOTH, EQUIVARIANT)
    assert_same_training(tmp_path / FOLDER, run)
    assert metrics(run)[64]["codebook/perplexity"] > 1


def test_the_result_is_a_plain_autoencoder(run):
    state = last_checkpoint(run)["state_dict"]
    basis, weight = state["simvq.basis"], state["simvq.weight"]
    assert not torch.equal(weight, torch.eye(3))
    final = VQModel.from_pretrained(run / "final")
    assert torch.equal(final.quantize.embedding.weight, state["autoencoder.quantize.embedding.weight"])
    assert torch.equal(final.quantize.embedding.weight, basis @ weight)
    theirs = pytest.importorskip("diffusers").VQModel.from_pretrained(run / "final")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = final.encode(images).latents
        assert_close_relative(final.decode(latents).sample, theirs.decode(latents).sample, 1e-5)
        found = final.quantize(latents).info.indices
        assert torch.equal(found, theirs.quantize(latents)[2][2])


def test_a_plain_codebook_is_gone_on_from(run):
    module = module_with(*BOTH)
    final = VQModel.from_pretrained(run / "final")
    module.autoencoder.load_weights(final.exported_state_dict(), origin="a test")
    module.keep_codes()
    assert torch.equal(module.simvq(), final.quantize.embedding.weight)
    assert module.codebook.initialised


def test_the_matrix_is_trained_in_place_of_the_codes():
    module, plain = module_with(*BOTH), module_with()
    (ours,), (theirs,) = ([group["params"] for group in m.parameter_groups()] for m in (module, plain))
    assert [p.shape for p in theirs] == [p.shape for p in trainable(plain.autoencoder)[0]["params"]]
    assert sum(p.numel() for p in theirs) - sum(p.numel() for p in ours) == 32 * 3 - 3 * 3
    assert any(parameter is module.simvq.weight for parameter in ours)
    assert plain.simvq is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantizer=fsq", r"^model.quantizer=fsq: give plain or simvq$"),
        ("model.gradient=twist", r"^model.gradient=twist: give straight_through or rotation$"),
    ],
)
def test_other_names_are_refused(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, STAGE, override)


@pytest.mark.parametrize("override", BOTH)
def test_a_frozen_codebook_is_not_trained(override):
    with pytest.raises(ValueError, match=rf"{override}: does nothing with model\.train=decoder; leave one"):
        module_with(override, "model.train=decoder")
