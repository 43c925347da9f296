"""Configs from strangers: names of code, impossible values, files that grow when they are read."""

import json

import pytest
import yaml

from ldm_lab import LDMPipeline
from ldm_lab.config.compose import Recipe
from ldm_lab.utils.reading import LoadError, read_json, read_yaml
from tests.security import sources
from tests.security.guard import guarded, refusal

NAN, INFINITY = float("nan"), float("inf")
CODE = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "functools.partial",
    "hydra.utils.get_method",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load_inline",
    "ldm_lab.utils.images.os.system",
    "ldm_lab.models.pretrained.os.system",
    "ldm_lab.runs.folder.RunFolder",
    "diffusers.DiffusionPipeline",
    "..evil",
    "../../evil/Model",
    "/etc/passwd",
    "a/b.Model",
    "tests..security.Model",
    "__main__.Model",
    "VQModel\nerror: everything is fine",
    "x" * 100_000,
]


@pytest.fixture
def folder(tmp_path):
    return sources.pipeline(tmp_path)


@pytest.fixture
def load(folder, tmp_path):
    """Loads the folder and draws an image; returns the line that this is refused with."""

    def load(**options):
        def draw():
            pipe = LDMPipeline.from_pretrained(folder, **options)
            pipe.set_progress_bar_config(disable=True)
            return pipe(num_inference_steps=2).images

        return refusal(draw, tmp_path)

    return load


def test_the_guard_sees_what_it_must_see(tmp_path):
    """Else everything below proves nothing."""
    import os
    import subprocess

    assert guarded(lambda: os.system("true"), tmp_path).trespasses
    assert guarded(lambda: subprocess.run(["true"], check=True), tmp_path).trespasses
    assert guarded(lambda: (tmp_path.parent / "outside").write_text(""), tmp_path).trespasses
    assert not guarded(lambda: (tmp_path / "inside").write_text(""), tmp_path).trespasses
    assert "MemoryError" in guarded(lambda: bytearray(2**31), tmp_path).text
    assert guarded(lambda: 1 / 0, tmp_path).kind == "broken"


@pytest.mark.parametrize("plugins", [(), ("os", "builtins", "subprocess", "functools", "hydra", "torch", "tests")])
@pytest.mark.parametrize("name", CODE)
def test_an_index_names_no_code(folder, load, name, plugins):
    module, _, kind = name.rpartition(".")
    sources.edit(folder / "model_index.json", unet=[module, kind])
    assert "model_index.json: unet is " in load(plugins=plugins)


@pytest.mark.parametrize("name", CODE)
def test_a_config_names_no_code(folder, load, name):
    sources.edit(folder / sources.CONFIGS["unet"], _class_name=name)
    assert "unet/config.json: this config describes a " in load()


@pytest.mark.parametrize("name", CODE)
def test_a_setting_is_no_code(folder, load, name):
    """`_target_` is Hydra's word: nothing that loads a model knows it, and nothing hands a folder's config to Hydra."""
    call = {"_target_": name, "_args_": [f"touch {folder.parent}/ran"]}
    sources.edit(folder / sources.CONFIGS["unet"], **call, dropout=call)
    assert "unet/config.json: dropout=" in load()
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("key", ["model.unet._target_", "callbacks.a.b._target_"])
@pytest.mark.parametrize("name", CODE[:10])
def test_settings_that_a_run_hands_to_hydra_name_no_code(name, key):
    """`init=` takes settings over from the `config.yaml` of a run: they are checked like typed ones."""
    with pytest.raises(ValueError, match=r"a config may name classes of ldm_lab|is no module of ldm_lab"):
        Recipe.parse(["experiment=avatars/diffusion", "debug=tiny"]).compose({"diffusion": {key: name}})


UNET = {
    "norm_eps": [-1, 0, NAN, INFINITY, "1e-5", True, 10],
    "dropout": [2, -0.1, NAN, "0", True, None, [0.1]],
    "sample_size": [10**9, 0, -1, True, 1.5, "16", [16], [16, 16, 16], [16, 10**9], {"a": 1}],
    "block_out_channels": [[10**12, 48], [-32, 48], [], "32", 32, [32] * 10**5, [True, 48], [32.0, 48], [0, 48], None],
    "layers_per_block": [10**9, 0, -1, True, "1", 1.0, None],
    "in_channels": [10**9, 0, -3, "3", True, 3.0],
    "out_channels": [10**18, 10**400, None],
    "down_block_types": [[1, 2], [{}, {}], "DownBlock2D", ["os.system", "DownBlock2D"], [["DownBlock2D"]], None],
    "up_block_types": [["../UpBlock2D", "UpBlock2D"], ["UpBlock2D"] * 10**4],
    "attention_head_dim": [0, -1, "8", True, 10**12, 49],
    "num_attention_heads": [0, -1, "2", 10**12],
    "time_embedding_dim": [10**12, -1, "128"],
    "freq_shift": [NAN, INFINITY, -INFINITY, 16, "0", True],
    "norm_num_groups": [0, -8, 10**12, "8", 5],
    "attn_norm_num_groups": [-1, 7, 10**12],
    "add_attention": ["no", 1, None],
    "flip_sin_to_cos": ["false", 0],
    "mid_block_scale_factor": [NAN, 2, "1"],
    "act_fn": ["os.system", None, 3],
    "../../unet": [1],
    "self": [1],
    "": [1],
}
VQVAE = {
    "scaling_factor": [NAN, 0, -1, INFINITY, 1e-320, 1e300, "1.0", True, None, [1.0]],
    "num_vq_embeddings": [10**12, 0, -64, "64", True],
    "vq_embed_dim": [10**12, -3, "3"],
    "latent_channels": [10**12, 0, "3"],
    "block_out_channels": [[16] * 20, [2**40, 2**40]],
    "layers_per_block": [10**9],
    "mid_block_add_attention": ["yes", 1],
    "lookup_from_codebook": ["no"],
    "sample_size": [10**9, "32"],
    "norm_type": ["spatial"],
}
SCHEDULER = {
    "num_train_timesteps": [10**12, 0, -1, 1.5, "1000", True, None, NAN],
    "trained_betas": [[0.1] * 50_000, ["0.1"] * 1000, [True] * 1000, [NAN] * 1000, "0.1", 7, {"a": 1}, [[0.1]] * 1000],
    "beta_start": [NAN, INFINITY, -1, 0, "0.1", True, None, 1e-300],
    "beta_end": [2, NAN, "0.02", [0.02]],
    "beta_schedule": ["os.system", ["linear"], None, 3, {}],
    "prediction_type": ["eval", None, []],
    "steps_offset": [10**20, -1, 0.5, "1", True],
    "clip_sample": ["false", 1],
    "clip_sample_range": [NAN, INFINITY, -1, "1"],
    "sample_max_value": [NAN, 0, INFINITY],
    "thresholding": ["no"],
    "dynamic_thresholding_ratio": [NAN, 2, "0.9"],
    "set_alpha_to_one": ["no", 1],
    "timestep_spacing": ["../leading", None],
    "rescale_betas_zero_snr": ["yes"],
}
VALUES = [
    (part, key, value)
    for part, keys in {"unet": UNET, "vqvae": VQVAE, "scheduler": SCHEDULER}.items()
    for key, values in keys.items()
    for value in values
]


@pytest.mark.parametrize(("part", "key", "value"), VALUES, ids=[f"{p}-{k}-{v!r:.20}" for p, k, v in VALUES])
def test_a_value_that_cannot_be(folder, load, part, key, value):
    sources.edit(folder / sources.CONFIGS[part], **{key: value})
    line = load()
    assert f"/{sources.CONFIGS[part]}: " in line or key == "steps_offset"
    assert key.rpartition(".")[2] in line


def test_a_channel_that_does_not_fit(folder, load):
    """What is wrong is not in one file, but between two."""
    sources.edit(folder / sources.CONFIGS["vqvae"], vq_embed_dim=4)
    assert "vqvae" in load()


TEXTS = {
    "nothing": b"",
    "NUL": b"\0" * 64,
    "NUL in a text": b'{"norm_eps": 1e-5}\0',
    "UTF-16": json.dumps({"a": 1}).encode("utf-16"),
    "Latin-1": b'{"a": "\xe9"}',
    "BOM": b"\xef\xbb\xbf{}",
    "deep list": b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep object": b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    "deep, within the reader's limit": b'{"a": ' * 400 + b"1" + b"}" * 400,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "same key twice": b'{"_class_name": "UNet2DModel", "dropout": 0, "dropout": 0.5}',
    "two megabytes": b'{"block_out_channels": [' + b"1," * 10**6 + b"1]}",
    "many entries": b'{"block_out_channels": [' + b"1," * 500_000 + b"1]}",
    "a list": b"[]",
    "no JSON": b"import os; os.system('true')",
    "a pickle": b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("path", ["model_index.json", *sources.CONFIGS.values()])
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_what_is_no_json(folder, load, content, path):
    (folder / path).write_bytes(content)
    assert f"/{path}: " in load()


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
YAMLS = {
    "billion laughs": LAUGHS,
    "billion merges": MERGES,
    "itself": "&a [*a]",
    "itself as a key": "&a {? *a : 1}",
    "deep": "[" * 5000,
    "object": "!!python/object/apply:os.system ['true']",
    "name": "!!python/name:os.system",
    "module": "a: !!python/module:antigravity",
    "tag": "!evil {a: 1}",
    "set": "a: !!set {b}",
    "bytes": "a: !!binary aGVsbG8=",
    "key that is a list": "? [a]\n: 1",
    "large": "a: [" + "1," * 10**5 + "]",
    "NUL": "a: \0",
    "a list": "[1]",
    "a number": "1",
}


@pytest.mark.parametrize("content", YAMLS.values(), ids=YAMLS)
def test_yaml_that_is_more_than_plain_data(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert refusal(lambda: read_yaml(path), tmp_path).startswith(f"{path}: ")


def test_what_is_plain_is_read(tmp_path):
    """The limits are far from what there is."""
    path = tmp_path / "config"
    value = {"trained_betas": [0.1] * 20_000, "a": {"b": [None, True, "ü", -1e-3, {"c": []}]}}
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    path.write_text(yaml.safe_dump(value | {"trained_betas": [1] * 1000}))
    assert read_yaml(path) == value | {"trained_betas": [1] * 1000}


def test_a_message_is_one_line_whatever_it_quotes():
    line = str(LoadError("a.json: \x1b[31mred\r\n\0 \u2028" + "x" * 10**6 + " at the end"))
    assert line.isprintable()
    assert line.startswith("a.json: ")
    assert line.endswith(" at the end")
    assert len(line) < 1000
