"""The page: everything in one file, every number with its row, nothing in it that could run or load."""

import base64
import hashlib
import html
import io
import json
import math
import re
import shutil
import subprocess

import pytest
from PIL import Image

from ldm_lab.runs.record import read_run
from ldm_lab.tools.report.page import as_json, page
from ldm_lab.tools.report.pictures import Budget, chosen, inlined
from tests.tools.report.runs import write_evaluation, write_picture, write_run, write_stage

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(2)">&lt;'"$content${policy}<!--"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom",
    "--virtual-time-budget=3000",
)  # fmt: skip


def shown(text):
    """What the page's scripts are given."""
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def two_runs(folder):
    """Two runs of two stages with all that a page shows."""
    for name, loss in (("a", 0.5), ("b", 0.4)):
        run = write_run(folder / name, loss=(loss, loss / 2), seed=len(name), extra=name)
        rows = {5: {"val/psnr": 20, "perf/images_per_second": 9}, 15: {"val/psnr": 30 * loss, "train/loss": "nan"}}
        write_stage(run / "autoencoder", "autoencoder", rows)
        write_picture(run / "diffusion", "samples", 10)
        write_picture(run / "diffusion", "samples", 20, "green")
        write_picture(run / "autoencoder", "reconstructions", 15)
        write_evaluation(run, {"fid": (10 * loss, 9 * loss, 11 * loss)})
    return [read_run(folder / "a"), read_run(folder / "b")]


def numbers(tree):
    """Every number that says where it is from."""
    if isinstance(tree, dict):
        if "file" in tree:
            yield tree
        for part in tree.values():
            yield from numbers(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from numbers(part)


def test_every_number_is_in_the_file_and_row_that_it_names(tmp_path):
    runs = two_runs(tmp_path)
    found = list(numbers(shown(page(runs, Budget()))))
    assert len(found) >= 20
    for number in found:
        if number["file"].endswith("metrics.csv"):
            text = (tmp_path / number["file"]).read_text()
            (row,) = (line.split(",") for line in text.splitlines() if line.startswith(f"{number['images']},"))
            assert str(number["value"]) in {cell if cell == "nan" else str(float(cell or 0)) for cell in row}
        else:
            metrics = json.loads((tmp_path / number["file"]).read_text())["metrics"]
            ends = {key: number[key] for key in ("value", "low", "high")}
            assert ends in metrics.values()


def test_curves_pictures_and_settings_are_all_there(tmp_path):
    content = shown(page(two_runs(tmp_path), Budget()))
    assert [run["name"] for run in content["runs"]] == ["a", "b"]
    curves = {(part["stage"], m["metric"]): m["runs"] for part in content["curves"] for m in part["metrics"]}
    assert curves["diffusion", "val/loss"] == [[[10, 0.5], [20, 0.25]], [[10, 0.4], [20, 0.2]]]
    assert curves["autoencoder", "train/loss"] == [[[15, "nan"]]] * 2
    pictures = {part["name"]: [[one["images"] for one in run] for run in part["runs"]] for part in content["pictures"]}
    assert pictures == {"samples": [[10, 20]] * 2, "reconstructions": [[15]] * 2}
    settings = {(one["stage"], one["key"]): one["values"] for one in content["settings"]}
    assert settings == {("diffusion", "extra"): ["a", "b"]}
    assert content["warnings"] == []
    assert content["verdict"].startswith("The numbers disagree. Better is b on eval/fid")


def test_runs_of_other_data_are_warned_of(tmp_path):
    runs = [read_run(write_run(tmp_path / name, marks=marks)) for name, marks in (("a", (1,)), ("b", (2,)))]
    content = shown(page(runs, Budget()))
    (line,) = content["warnings"]
    assert line.startswith("diffusion: the held-out images differ (data.npz)")
    assert not content["comparisons"][0]["compares"]


def test_no_number_is_called_better_that_does_not_compare(tmp_path):
    def rows(*marks):
        runs = [read_run(write_run(tmp_path / f"{m}{i}", loss=(0.5, 0.1 * i), marks=(m,))) for i, m in enumerate(marks)]
        return {one["metric"]: one["better"] for one in shown(page(runs, Budget()))["metrics"]}

    assert rows(1, 1) == {"val/loss": "lower"}
    assert rows(2, 3) == {"val/loss": None}


def test_losses_by_timestep_are_one_curve(tmp_path):
    rows = {images: {f"val/loss_t{tenth}": images / 100 + tenth for tenth in range(10)} for images in (1, 2)}
    write_stage(tmp_path / "a/diffusion", rows=rows)
    (stage,) = shown(page([read_run(tmp_path / "a")], Budget()))["curves"]
    (metric,) = stage["metrics"]
    assert metric["runs"] == [[[tenth + 1, 0.02 + tenth] for tenth in range(10)]]
    assert "axis" in metric


@pytest.mark.parametrize(
    ("seeds", "note"), [((0, 0), "same seeds"), ((0, 1), "different seeds: 0, 1"), ((0, None), "")]
)
def test_samples_say_whether_their_seeds_are_the_same(tmp_path, seeds, note):
    runs = []
    for name, seed in zip("ab", seeds, strict=True):
        more = {} if seed is None else {"callbacks": {"sample_grid": {"seed": seed}}}
        run = write_run(tmp_path / name, **more)
        write_picture(run / "diffusion", "samples", 1)
        runs.append(read_run(run))
    (group,) = shown(page(runs, Budget()))["pictures"]
    assert note in group["note"]
    assert bool(note) == bool(group["note"])


def test_runs_of_one_name_are_called_by_their_folders(tmp_path):
    runs = [read_run(write_run(tmp_path / place / "x")) for place in ("one", "two")]
    assert [run["name"] for run in shown(page(runs, Budget()))["runs"]] == [str(run.folder) for run in runs]


def test_hostile_text_stays_text(tmp_path):
    name = HOSTILE.replace("/", "|")
    run = write_run(tmp_path / name, **{"title": HOSTILE, HOSTILE: 1})
    other = write_run(tmp_path / "b", title="x")
    (run / "diffusion/metrics.csv").write_text(f'images_seen,"{HOSTILE.replace(chr(34), chr(39))}"\n1,2\n')
    text = page([read_run(run), read_run(other)], Budget())
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "<!--" not in text
    content = shown(text)
    assert content["runs"][0]["name"] == name
    assert HOSTILE in [one["key"] for one in content["settings"]]
    assert html.escape(name) in text


def test_the_policy_lets_run_what_the_page_brings_and_nothing_else(tmp_path):
    text = page([read_run(write_run(tmp_path / "a"))], Budget())
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        (found,) = re.findall(pattern, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


def test_json_of_a_script_cannot_end_it():
    text = as_json({"a": HOSTILE, "b": "\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text)["a"] == HOSTILE
    with pytest.raises(ValueError):
        as_json(math.nan)


@pytest.mark.parametrize(
    ("most", "kept"), [(0, []), (1, [50]), (2, [10, 50]), (3, [10, 30, 50]), (9, [10, 20, 30, 40, 50])]
)
def test_pictures_are_chosen_evenly(most, kept):
    assert chosen([10, 20, 30, 40, 50], most) == kept


def decoded(uri):
    kind, _, content = uri.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_pictures_shrink_to_the_width_and_small_ones_stay(tmp_path):
    stage = write_run(tmp_path / "a") / "diffusion"
    large, small = write_picture(stage, "samples", 1, size=(300, 150)), write_picture(stage, "samples", 2)
    kind, image = decoded(inlined(large, Budget(width=100)))
    assert (kind, image.size) == ("data:image/webp", (100, 50))
    red, green, blue = image.convert("RGB").getpixel((50, 25))
    assert red > 180
    assert max(green, blue) < 60
    kind, image = decoded(inlined(small, Budget()))
    assert image.size == (16, 16)


def browse(file):
    """What a browser makes of a page: its elements on stdout, its complaints on stderr."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={file.parent / 'profile'}", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_draws_it(tmp_path):
    name = "x<img src=x onerror=document.title='hit'>"
    runs = two_runs(tmp_path)
    runs.append(read_run(write_run(tmp_path / name, loss=(0.5, 0.123))))
    file = tmp_path / "page.html"
    file.write_text(page(runs, Budget()), encoding="utf-8")
    done = browse(file)
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert html.escape(name, quote=False) in drawn
    assert "hit" not in re.findall("<title>(.*)</title>", drawn)
    for text in ("0.123", "val/loss", "metrics.csv, images_seen 20", "4.5 to 5.5"):
        assert text in drawn
    assert drawn.count("<svg") == sum(len(part["metrics"]) for part in shown(file.read_text())["curves"])
    assert drawn.count('class="curve') >= drawn.count("<svg")
    assert len(re.findall(r'<img[^>]* src="data:image/', drawn)) == 4


HANDS = """<script>{
  const pictures = () => [...document.querySelectorAll("#pictures figure")].map((f) => f.innerText.trim());
  const sources = () => [...document.querySelectorAll("#pictures img")].map((image) => image.src);
  const [last, before] = [pictures(), sources()];
  const slider = document.querySelector("#slider");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const chart = document.querySelector("svg"), box = chart.getBoundingClientRect();
  const still = chart.parentElement.innerText;
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left, clientY: box.top, bubbles: true }));
  const hovered = chart.parentElement.innerText, dots = chart.querySelectorAll(".cursor .dot").length;
  document.querySelector("#pictures button.picture").click();
  const enlarged = document.querySelector("dialog").open;
  document.querySelector("dialog").click();
  const told = { last, first: pictures(), changed: sources().filter((source, i) => source !== before[i]).length,
    label: document.querySelector("output").value, still, hovered, dots, enlarged,
    closed: !document.querySelector("dialog[open]") };
  document.body.dataset.told = JSON.stringify(told);
}</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_slider_cursor_and_enlarging_answer(tmp_path):
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page(two_runs(tmp_path), Budget()))
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"{HANDS}</body>"), encoding="utf-8")
    done = browse(file)
    assert "CONSOLE" not in done.stderr, done.stderr
    told = json.loads(html.unescape(re.findall('data-told="([^"]*)"', done.stdout)[0]))
    assert told["label"] == "10 images seen"
    assert any(line.endswith("at 20") for line in told["last"])
    assert any(line.endswith("at 10") for line in told["first"])
    assert any(line.endswith("not before 15") for line in told["first"])  # reconstructions of stage 1
    assert told["changed"] == 2  # samples of both runs
    assert told["dots"] == 2
    assert told["hovered"] != told["still"]
    assert told["enlarged"]
    assert told["closed"]


def test_evaluations_by_the_same_rules_stand_beside_each_other_whatever_their_files_are_called(tmp_path):
    for name, values in (("a", (9.0, 8.0)), ("b", (7.0, 6.0))):
        write_run(tmp_path / name)
        for images, value in zip((10, 20), values, strict=True):
            write_evaluation(tmp_path / name, {"fid": value, "near_copies": 0.0}, f"{name}{images}", images)
    write_evaluation(tmp_path / "b", {"fid": 1.0}, "more", 30, num_samples=1000)
    content = shown(page([read_run(tmp_path / name) for name in "ab"], Budget()))
    found = [one for one in content["metrics"] if one["metric"] == "eval/fid"]
    assert [[number and number["value"] for number in one["final"]] for one in found] == [[8.0, 6.0], [None, 1.0]]
    assert "100 samples, ddim 20 steps" in found[0]["stage"]
    curves = {metric["metric"]: metric["runs"] for metric in content["curves"][0]["metrics"]}
    assert curves["eval/fid"] == [[[10, 9.0], [20, 8.0]], [[10, 7.0], [20, 6.0]]]
