"""What people type arrives as typed: paths and names, through a sweep too; commands that are printed can be typed."""

import os
import shlex

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ldm_lab.__main__ as tools
from ldm_lab.checkpoints import compvis
from ldm_lab.checkpoints.locate import find
from ldm_lab.config import stages
from ldm_lab.config.compose import Recipe, compose_sample, parse_overrides, stem
from ldm_lab.config.sweep import job_name, pack, unpack
from ldm_lab.models.vq_model import VQModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError
from train import job

ORDINARY = (
    "epoch=000012.ckpt", "/data/photos (1)", "/data/фото", "anna's", "a,b", "/data/[2024] #1; 50% & more!", 'so "so"',
    "C:\\pictures\\new\\", "ends\\'", " spaces ", "`x`<y>^{z}", "=", "🐈/cats", "20241129", "2024_11_29", "1e3", "true",
    "NULL", "nan", ".5", "-1", "choice(a,b)", "'anna's", "~", "$HOME", "@", "a:b",
)  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("key", ["name", "ckpt", "data.root", "+data.module.train_set.root", "paths.runs", "init"])
def test_paths_and_names_are_text_as_typed(key, text):
    (override,) = parse_overrides([f"{key}={text}"])
    assert (override.value(), override.key_or_group) == (text, key.lstrip("+"))


def travelled(*lines):
    """The values of each job of a sweep, on their way through Hydra's sweeper."""
    parsed = OverridesParser.create().parse_overrides(pack([shell.as_text(line, several=True) for line in lines]))
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [[override.value() for override in parse_overrides(unpack(one))] for one in jobs]


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_any_printable_text_arrives_and_travels(text):
    assume("${" not in text and text != "null" and not (text[0] == text[-1] in "'\""))
    (override,) = parse_overrides([f"data.root={text}"])
    assert override.value() == text
    assert travelled(f"data.root={shell.quoted(text)}") == [[text]]
    assert shlex.quote(shell.word(text)) == shell.word(text)
    assert "/" not in shell.word(text)


def test_what_is_quoted_for_hydra_is_what_it_was():
    values = [o.value() for o in parse_overrides(["name='a b'", 'ckpt="c\\"d"', "init=null", "output=", "name='null'"])]
    assert values == ["a b", 'c"d', None, "", "null"]
    config = compose_sample(["ckpt=x", "output=${ckpt}/(samples)"])
    assert config.output == "x/(samples)"


def test_a_sweep_parts_at_commas_and_at_no_other():
    assert travelled("data.root=/a (1),'/b, c',null", "seed=1,2") == [
        ["/a (1)", 1], ["/a (1)", 2], ["/b, c", 1], ["/b, c", 2], [None, 1], [None, 2],
    ]  # fmt: skip
    assert travelled("ckpt=choice(a=1.ckpt, b's)") == [["a=1.ckpt"], ["b's"]]
    assert travelled("name=${oc.env:HOME,.}/x") == [["${oc.env:HOME,.}/x"]]


@pytest.mark.parametrize("line", ["seed", "seed=(1", "logger.wandb.tags=[anna's]", "model.x={"])
def test_other_keys_keep_hydras_grammar_and_say_so_in_one_line(line):
    with pytest.raises(UserError) as error:
        Recipe.parse([line])
    assert str(error.value).startswith(f"{line}: not of the form key=value")
    assert "Exception" not in str(error.value)
    assert "\n" not in str(error.value)


def test_several_values_without_m_are_answered_with_both_ways():
    with pytest.raises(UserError, match=r"^interpolate=3,17: a list is interpolate=\[3,17\]; a job for each .* -m"):
        compose_sample(["ckpt=x", "interpolate=3,17"])


def test_a_name_stays_text_in_everything_that_is_made_of_it():
    (config,) = Recipe.parse(["experiment=avatars/autoencoder", "name=2024_11_29", "paths.runs=1e3"]).compose()
    assert (config.name, config.paths.stage) == ("2024_11_29", "1e3/2024_11_29/autoencoder")
    assert config.logger.wandb.group == "2024_11_29"
    (config,) = Recipe.parse(["experiment=folder/autoencoder", "data.root=/data/2024"]).compose()
    assert (config.name, config.logger.wandb.group, config.data.module.train_set.root) == ("2024", "2024", "/data/2024")


# --- flags


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed=3", "--data.root=/a b", "x=--y"], (set(), ["seed=3", "data.root=/a b", "x=--y"])),
        (["--cfg", "job", "seed=1"], ({"--cfg"}, ["seed=1"])),
        (["seed=1", "--cfg=job"], ({"--cfg"}, ["seed=1"])),
        (["--multirun", "name=job"], ({"-m"}, ["name=job"])),
        (["-h"], ({"--help"}, [])),
    ],
)
def test_flags_are_told_from_settings(arguments, expected):
    assert shell.parted(arguments) == expected


@pytest.mark.parametrize("argument", ["--seed", "-v", "--cfg=all", "--"])
def test_an_unknown_flag_is_named(argument):
    with pytest.raises(UserError, match=rf"^{argument}: unknown flag; .*key=value$"):
        shell.parted([argument, "1"])


# --- commands that are printed


@pytest.mark.parametrize("name", ["avatars", "anna's фото=1 (x)", "20241129"])
def test_the_next_command_can_be_typed(monkeypatch, capsys, name):
    for part in ("preflight", "train"):
        monkeypatch.setattr(stages, part, lambda *_: {})
    job(["experiment=avatars/diffusion", f"name={name}", "paths.runs=/runs of mine"])
    *_, line = capsys.readouterr().out.splitlines()
    python, script, *overrides = shlex.split(line.removeprefix("Done. Next: "))
    assert (python, script) == ("python", "sample.py")
    assert compose_sample(overrides).ckpt == f"/runs of mine/{name}"


def test_the_command_for_an_autoencoder_can_be_typed_and_makes_the_same():
    typed_by_user = ["data.root=/data/photos (1)", "name=anna's", "model=base", "debug=tiny", "max_images=8"]
    recipe = Recipe.parse(["experiment=folder/diffusion", *typed_by_user])
    python, script, *overrides = shlex.split(recipe.command("autoencoder"))
    assert (python, script) == ("python", "train.py")
    assert "name=anna's" in overrides
    again = Recipe.parse(overrides)
    assert again.stages == ("folder/autoencoder",)
    assert {o.key_or_group: o.value() for o in again.overrides} == {
        "data.root": "/data/photos (1)", "name": "anna's", "model": "base", "debug": "tiny",
    }  # fmt: skip


@pytest.mark.parametrize("value", ["1", "0.0001", "[64,32]", "'/data/photos (1)'", "x" * 300, "'фото'", "-1", "null"])
def test_a_jobs_name_needs_no_quotes_and_is_its_own(value):
    name = job_name("avatars", ["seed"], [f"seed={value}", "max_images=8"])
    assert shlex.quote(name) == name
    assert "=" not in name
    assert len(name) < 80
    (override,) = parse_overrides([f"name={name}"])
    assert override.input_line == f"name={name}"
    assert job_name("avatars", ["seed"], [f"seed={value} "]) != name


def test_a_folder_gives_a_name_that_needs_no_quotes():
    names = {"/x/photos (1)": "photos_1", "/x/anna's.zip": "anna_s", "/x/фото": "фото", "/x/#": "folder"}
    assert {root: stem(root) for root in names} == names


# --- home


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of the user's, and another place to be in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


def test_home_is_found_wherever_a_path_is_typed(home):
    paths = ["data.root=~/photos", "paths.runs=~/runs", "init=~/model", "model.loss.perceptual.weights=~/vgg.pth"]
    (config,) = Recipe.parse(["experiment=celebahq/autoencoder", "name=~n", *paths]).compose()
    assert config.data.module.train_set.root == f"{home}/photos"
    assert config.callbacks.health.folder == config.paths.stage == f"{home}/runs/~n/autoencoder"
    assert (config.init, config.model.loss.perceptual.weights) == (f"{home}/model", f"{home}/vgg.pth")
    sampled = compose_sample(["ckpt=~/runs/x@2M", "output=~nobody-of-this-name/x", "reconstruct=~"])
    assert (sampled.ckpt, sampled.output, sampled.reconstruct) == (
        f"{home}/runs/x@2M", "~nobody-of-this-name/x", str(home),
    )  # fmt: skip


def test_home_is_found_in_python_and_by_the_tools(home, monkeypatch):
    widths = {"block_out_channels": [8], "norm_num_groups": 8, "num_vq_embeddings": 8}
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    VQModel(**widths, **blocks).save_pretrained("~/model")
    assert (home / "model/config.json").is_file()
    assert VQModel.from_pretrained("~/model").config.num_vq_embeddings == 8
    for call in (LDMPipeline.from_pretrained, LDMPipeline.from_single_file, VQModel.from_single_file, find):
        with pytest.raises(UserError, match=str(home / "nothing")):
            call("~/nothing")
    with pytest.raises(UserError, match=str(home / "config.yaml")):
        compvis.original_config.OriginalConfig.read("~/config.yaml")
    got = []
    monkeypatch.setattr(tools.importlib, "import_module", lambda name: type("Tool", (), {"main": got.append}))
    tools.main(["report", "~/runs/x", "--output=~/page.html", "--steps", "a~b"])
    assert got == [[f"{home}/runs/x", f"--output={home}/page.html", "--steps", "a~b"]]
    assert os.listdir(home) == ["model"]
