"""`python -m ldm_lab benchmark` on tiny networks: what it counts, compares and refuses."""

import json

import pytest
import torch
from torch import nn

from ldm_lab.data.latents import LatentCache
from ldm_lab.tools.benchmark import contest, growth, subjects
from ldm_lab.tools.benchmark.command import LAYOUTS, contestants, main, parse, show
from ldm_lab.tools.benchmark.contest import Contestant, Timing, compare, measure, row

CPU = torch.device("cpu")
ROW = row(Contestant("", lambda: None), Timing(seconds=[1.0], cpu_seconds=[1.0]), 1.0)
TINY = ["--experiment", "avatars", "debug=tiny", "--rounds", "2", "--batch-size", "2", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["encode", "forward", "decode", "sample", "train"])
def test_both_sides_compute_the_same(tmp_path, kind, capsys):
    pytest.importorskip("diffusers")
    main([kind, *TINY, "--against", "diffusers", "--steps", "2", "--output", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())
    own, peer = found["rows"]
    assert own["gflops"] > 0
    assert len(own["seconds"]) == len(peer["seconds"]) == 2
    (ratio,) = found["ratios"].values()
    assert ratio["ratio"] == pytest.approx(peer["ms"] / own["ms"])
    if kind == "train":  # nothing comes out of it that is alike: the weights move
        assert own["overhead"] > 0
    else:
        assert ratio["relative"] < 1e-4
    assert "x as fast as diffusers" in capsys.readouterr().out


def test_operations_are_counted_two_to_a_multiply_add_and_attention_on_a_cpu_too():
    network, q = nn.Linear(8, 4, bias=False), torch.randn(1, 2, 16, 8)
    runs = [lambda: network(torch.ones(3, 8)).detach(), lambda: nn.functional.scaled_dot_product_attention(q, q, q)]
    linear, attention = measure([Contestant("", run) for run in runs], 1, CPU, compiled=False)
    assert (linear.flops, attention.flops) == (2 * 3 * 8 * 4, 2 * 2 * 2 * 16 * 16 * 8)


def test_ratios_are_of_medians_and_of_images():
    own = Timing(seconds=[1.0, 2.0, 9.0], output=torch.tensor([1.0, 2.0]))
    peer = Timing(seconds=[4.0, 6.0, 5.0], output=torch.tensor([1.5, 2.0]))
    found = compare(own, peer, own_images=2, peer_images=1)
    assert found["ratio"] == 5.0  # 2 s for two images against 5 s for one
    assert found["quartiles"] == pytest.approx([(6.0 + 10 / 9) / 2, 7.0])
    assert (found["largest_difference"], found["relative"]) == (0.5, 0.25)


def test_contestants_take_turns():
    order = []
    made = [Contestant(name, lambda name=name: order.append(name)) for name in "ab"]
    measure(made, 3, CPU, compiled=False)
    assert "".join(order) == "ab" + "ababab"  # the first of each is not timed


def test_overhead_is_what_forward_and_backward_did_not_take():
    timing = Timing(seconds=[1.1, 1.1], cpu_seconds=[1.0, 1.0])
    assert row(Contestant("", lambda: None, rest=[0.1, 0.1]), timing, 1.0)["overhead"] == pytest.approx(0.1)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--batch-size", "0"], ["--output", "nowhere/b.json"]])
def test_impossible_flags_are_refused(flags):
    with pytest.raises(ValueError, match=flags[0]):
        main(["encode", *flags])


@pytest.mark.parametrize("kind", ["sample", "train"])
def test_the_peer_may_run_in_bfloat16(tmp_path, kind, capsys):
    pytest.importorskip("diffusers")
    flags = ["--against", "diffusers", "--peer-dtype", "bfloat16", "--steps", "2", "--rounds", "1"]
    main([kind, *TINY, *flags, "--output", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())
    (name,) = found["ratios"]
    assert name.startswith("diffusers bfloat16")
    assert found["matmul_flops"].keys() == {"float32", "bfloat16"}
    if kind != "train":
        assert 1e-4 < found["ratios"][name]["relative"] < 0.3


@pytest.mark.parametrize(("native", "side"), [(True, 2048), (False, 256)])
def test_what_a_cpu_emulates_is_measured_small_and_said(native, side, monkeypatch, capsys):
    """A product of 2048 x 2048 in emulated bfloat16 takes ten seconds and more, six times over."""
    shapes = []
    monkeypatch.setattr(contest, "has_bfloat16", lambda: native)
    monkeypatch.setattr(contest, "_run_once", lambda product, timing, device: timing.seconds.append(1.0))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: shapes.append(shape))
    contest.matmul_peak.__wrapped__(CPU, torch.bfloat16)
    assert shapes == [(side, side)]
    assert contest.is_emulated(CPU, torch.bfloat16) is not native
    assert not contest.is_emulated(CPU, torch.float32)
    assert not contest.is_emulated(torch.device("cuda"), torch.bfloat16)
    show({"machine": {}, "matmul_flops": {"bfloat16": 8e8}, "emulated": ["bfloat16"], "rows": [ROW], "ratios": {}})
    assert "0.8 GFLOP/s\nthis CPU emulates bfloat16" in capsys.readouterr().out


def test_growth_has_a_row_for_each_size(tmp_path, monkeypatch, capsys):
    sizes = {"BATCH_SIZES": (1, 2), "STEPS": (1, 3), "SIDES": (16, 64), "IMAGES": (20, 600), "LINKS": 100, "TILE": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(growth, name, value)
    flags = ["--rounds", "1", "--steps", "2", "--output", str(tmp_path / "b.json")]
    main(["growth", "debug=tiny", "--device", "cpu", *flags])
    found = json.loads((tmp_path / "b.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "sample, batch 1, 2 steps",
        "sample, batch 2, 2 steps",
        "sample, batch 1, 1 steps",
        "sample, batch 1, 3 steps",
        "decode 16 x 16",
        "decode 64 x 64",
        "decode 64 x 64, tiles",
        "folder of 20 images",
        "folder of 600 images",
        "cache of 20 latents",
        "cache of 600 latents",
    ]
    assert found["ratios"] == {}
    assert rows["decode 64 x 64, tiles"]["gflops"] > 0
    assert rows["folder of 600 images"]["gflops"] is None


def test_linked_pictures_and_shards_are_whole_data_sets(tmp_path):
    growth.link_pictures(tmp_path / "pictures", 20_500)
    assert sum(1 for _ in (tmp_path / "pictures").rglob("*.png")) == 20_500
    cache = LatentCache(tmp_path, {}, 1030, (1, 1, 2, 2), "float16")
    growth.link_shards(cache)
    assert cache.missing() == []
    assert [len(cache.open(shard).moments[:]) for shard in cache.shards] == [33] * 31 + [7]


def test_memory_of_a_run_is_what_it_adds():
    device, kept = torch.device("cpu"), [torch.ones(2**22)]  # 16 MiB that were there before
    timing = measure([Contestant("", lambda: (kept[0] * 2).sum() and None, images=2)], 1, device, compiled=False)[0]
    assert 15 * 2**20 < timing.grown < 24 * 2**20
    assert row(Contestant("", lambda: None, images=2), timing, 1.0)["mb_per_image"] == timing.grown / 2**21


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to be measured")
@pytest.mark.parametrize("kind", ["sample", "train"])
def test_a_gpu_is_measured_end_to_end(tmp_path, kind):
    """What `docs/performance.md` asks of a GPU is in the table, in bfloat16 and against bfloat16."""
    pytest.importorskip("diffusers")
    flags = ["--dtype", "bfloat16", "--against", "diffusers", "--peer-dtype", "bfloat16", "--steps", "2"]
    main([kind, *TINY[:-1], "cuda", *flags, "--output", str(tmp_path / "b.json")])
    for line in json.loads((tmp_path / "b.json").read_text())["rows"]:
        assert line["images_per_s"] > 0
        assert 0 < line["share_of_peak"] < 1
        assert line["mb_per_image"] > 0


@pytest.mark.parametrize(("layout", "form"), LAYOUTS.items())
def test_the_layout_of_our_networks_can_be_chosen(monkeypatch, layout, form):
    seen = []
    monkeypatch.setattr(subjects, "forward", lambda subject: seen.append(subject.pipe) or [])
    contestants(parse(["forward", *TINY, "--layout", layout]), None)
    convolutions = [
        m for network in (seen[0].unet, seen[0].vqvae) for m in network.modules() if hasattr(m, "kernel_size")
    ]
    wide = [layer.weight for layer in convolutions if layer.kernel_size == (3, 3) and min(layer.weight.shape[:2]) > 1]
    assert len(wide) > 10
    assert all(weight.is_contiguous(memory_format=form) for weight in wide)


def test_growth_has_no_peer():
    with pytest.raises(ValueError, match="--against diffusers: growth"):
        main(["growth", "--against", "diffusers"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_skips_with_the_reason(capsys):
    main(["encode", "--device", "cuda"])
    assert capsys.readouterr().out.startswith("skipped: --device cuda")
