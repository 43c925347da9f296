"""docs/extending.md: its files, as they stand there, are trained with its commands; what is refused is said so."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm_lab.config.compose
import sample
from ldm_lab.config import files
from ldm_lab.config.compose import Recipe, build
from ldm_lab.config.files import CONFIGS
from ldm_lab.models.vq_model import VQModel
from ldm_lab.utils.reading import read_json
from tests.config.test_configs import uncommented
from tests.trained import last_checkpoint, snapshot, train, undisturbed
from train import job

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\S+\.\w+)`[^`]*:\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S))
LOCAL = FILES.pop("configs/local/default.yaml")
COMMANDS = re.findall(r"^```\npython (.*?)^```", PAGE.replace("\\\n", ""), re.M | re.S)
TABLE, NETWORK, CALLBACK, SAMPLE = (shlex.split(command)[1:] for command in COMMANDS)
REFUSALS = re.findall(r"^\$ python (\w+)\.py (.*)\nerror: (.*)$", PAGE, re.M)
PYTHON = PAGE.rpartition("```python\n")[2].partition("```")[0]
SHORT = ["max_images=16", "checkpoint_every=16", "validate_every=16"]
FIRST_STAGE = "autoencoder=first_stage"


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    """A folder, in which the user is, with the files of the page, the pictures it speaks of, and a first stage."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(CONFIGS, folder / "configs", ignore=shutil.ignore_patterns("local"))
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "photos").mkdir()
    rows = []
    for split, color, count in (("train", "red", 12), ("val", "blue", 4)):
        for number in range(count):
            Image.new("RGB", (40, 32), color).save(folder / f"photos/{split}{number}.png")
            rows.append(f"photos/{split}{number}.png,{split}\n")
    (folder / "birds.csv").write_text("file,split\n" + "".join(rows))
    small = {"block_out_channels": [8, 8], "norm_num_groups": 8, "latent_channels": 4, "num_vq_embeddings": 16}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    VQModel(**small, **blocks).save_pretrained(folder / "first_stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(files, "CONFIGS", folder / "configs")
        yield folder
        forget()


@pytest.fixture(scope="module")
def photos(workplace):
    """The run of the page's network."""
    train("runs", *NETWORK, *SHORT, FIRST_STAGE, "callbacks=none")
    return Path("runs/photos")


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_what_the_page_shows_is_what_is_tried_here(workplace):
    assert sorted(name for name in FILES if name.startswith("my_pkg/")) == [
        "my_pkg/gradients.py", "my_pkg/network.py", "my_pkg/table.py"
    ]  # fmt: skip
    assert [command.split()[0] for command in COMMANDS] == ["train.py", "train.py", "train.py", "sample.py"]
    assert len(REFUSALS) == PAGE.count("\nerror: ") == 4
    assert uncommented(workplace / "configs/data/table.yaml") == []


def test_an_own_data_set_is_what_is_trained_on():
    data = build(Recipe.parse([*TABLE, "debug=tiny"]).compose()[0].data.module, "data")
    images = next(iter(data.train_dataloader()))["image"]
    assert (data.num_train, data.num_val, images.shape) == (12, 4, (8, 3, 32, 32))
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    assert torch.equal(images, red.expand_as(images))

    train("runs", *TABLE, *SHORT)
    (grid,) = Path("runs/birds/autoencoder/samples").glob("reconstructions_*")  # each held-out image above its own
    assert np.array_equal(np.asarray(Image.open(grid))[16, 16], [0, 0, 255])
    assert Path("runs/birds/model_index.json").is_file()
    assert "my_pkg.table.TableImages" in Path("runs/birds/diffusion/config.yaml").read_text()


def test_an_own_network_is_trained_saved_and_drawn_from(photos):
    assert read_json(photos / "model_index.json")["unet"] == ["my_pkg.network", "SmallUNet"]
    config = read_json(photos / "unet/config.json")
    assert [config[key] for key in ("in_channels", "out_channels", "width", "sample_size")] == [4, 4, 64, 16]
    state = last_checkpoint(photos / "diffusion")["state_dict"]
    assert state["unet.conv_out.weight"].abs().max() > 0, "it began at zero, and learned"

    with undisturbed():
        sample.job([*SAMPLE, "trainer=cpu", "num_samples=1", "sampler.steps=2", "output=drawn"])
    assert Path("drawn/images/000000.png").is_file()
    names = {}
    exec(PYTHON, names)
    assert type(names["pipe"].unet).__name__ == "SmallUNet"
    assert torch.equal(names["pipe"].unet.conv_out.weight, state["ema.model.conv_out.weight"])


def test_an_own_network_that_refuses_a_size_is_heard():
    Path("my_pkg/choosy.py").write_text(
        "from my_pkg.network import SmallUNet\n"
        "class Choosy(SmallUNet):\n"
        "    def forward(self, sample, timestep):\n"
        "        raise ValueError('not this one')\n"
    )
    choosy = [override.replace("network.SmallUNet", "choosy.Choosy") for override in NETWORK]
    with pytest.raises(ValueError, match=r"^data\.image_size=32 does not fit the networks: not this one"):
        train("runs", *choosy, FIRST_STAGE, "name=choosy")


def test_an_own_callback_from_local_settings_leaves_its_file(workplace):
    local = workplace / "configs/local/default.yaml"
    local.parent.mkdir(exist_ok=True)
    local.write_text(LOCAL, encoding="utf-8")
    try:
        assert uncommented(local) == []
        train("runs", *CALLBACK, *SHORT, FIRST_STAGE, "name=watched", "callbacks.gradients.every_images=8")
        assert ldm_lab.config.compose.compose_sample(["ckpt=runs/watched"]).plugins == ["my_pkg"]
    finally:
        local.unlink()
    rows = [line.split(",") for line in Path("runs/watched/diffusion/gradients.csv").read_text().splitlines()]
    assert {int(images) for images, _, _ in rows} == {8, 16}
    trained = {name for name in last_checkpoint("runs/watched/diffusion")["state_dict"] if name.startswith("unet.")}
    assert {name for _, name, _ in rows} == trained
    assert any(float(norm) > 0 for _, _, norm in rows)


@pytest.mark.parametrize(("script", "line", "message"), REFUSALS)
def test_a_missing_plugin_is_named_as_the_page_says(photos, monkeypatch, script, line, message):
    forget()
    if "plugins=" in line:  # of a package that is not there
        monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(Path.cwd())])
    before = snapshot("runs")
    with pytest.raises(ValueError) as error:
        {"train": job, "sample": sample.job}[script](shlex.split(line))
    assert str(error.value) == message
    assert "my_pkg" not in sys.modules
    assert snapshot("runs") == before


def test_a_run_does_not_go_on_without_its_plugin(photos):
    forget()
    without = [override for override in NETWORK if not override.startswith("plugins=")]
    with pytest.raises(ValueError, match=r"^model\.unet\._target_=my_pkg\.network.*add plugins=\[my_pkg\]$"):
        train("runs", *without, *SHORT, FIRST_STAGE, "callbacks=none")
    assert "my_pkg" not in sys.modules


@pytest.mark.parametrize("length", ["max_images=1ep", "trainer.max_epochs=1"])
def test_nothing_is_imported_to_count_an_epoch(length):
    forget()
    without = [override for override in TABLE if not override.startswith("plugins=")]
    with pytest.raises(ValueError, match=r"^data\.module\.train_set\._target_=.*add plugins=\[my_pkg\]$"):
        Recipe.parse([*without, length]).compose()
    assert "my_pkg" not in sys.modules
