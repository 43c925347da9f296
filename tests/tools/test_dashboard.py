"""Dashboards as code: no panel is empty, nothing that is logged is missing; read by a client that is not ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.models.vq_model import VQModel
from ldm_lab.runs.record import read_run
from ldm_lab.runs.tracking import log_to_run
from ldm_lab.tools.dashboard import command, layout
from ldm_lab.utils.reading import LoadError
from tests.trained import copy, metrics, train

pytest.importorskip("wandb_workspaces")
STAGES = ("autoencoder", "diffusion")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both stages of celebahq with W&B, offline, as `debug=tiny` has it."""
    runs = tmp_path_factory.mktemp("dashboard")
    own_cache = f"paths.cache={runs / 'cache'}"  # another test may have cached the latents elsewhere
    train(runs, "experiment=celebahq", "logger=many", own_cache)
    wandb.teardown()  # or the processes of other tests would join this one's service
    return runs / "celebahq"


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """Nobody is logged in here, and the working directory is empty."""
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    wandb.teardown()


def leet(folder, *flags):
    """What `wandb leet inspect` prints of a stage's offline run, as JSON, a value a line."""
    (path,) = folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    return [json.loads(done.stdout)] if flags else [json.loads(line) for line in done.stdout.splitlines()]


def specification(*flags):
    """What the command writes."""
    command.main(["--project", "faces", *map(str, flags), "--output", "spec.json"])
    with open("spec.json", encoding="utf-8") as file:
        found = json.load(file)
    os.remove("spec.json")
    return found


def panels(view):
    """The panels of a workspace."""
    return [panel for section in view["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def stage_of(view):
    return view["displayName"].removeprefix("ldm_lab: ")


def keys(shown):
    """Metrics, axes and pictures that panels name."""
    found = set()
    for panel in shown:
        config = panel["config"]
        found |= {*config.get("metrics", ()), *config.get("mediaKeys", ()), config.get("xAxis", layout.AXIS)}
    return found


def report_panels(spec, stage):
    """Those of the report whose runs are of a stage."""
    grids = [block["metadata"] for block in spec["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    mine = [grid for grid in grids if grid["runSets"][0]["name"] == stage]
    return [panel for grid in mine for panel in grid["panelBankSectionConfig"]["panels"]]


# --- what is shown is what is logged


def test_every_panel_shows_what_was_logged_and_all_that_was_logged_is_shown(run):
    spec = specification("--runs", run)
    assert [stage_of(view) for view in spec["workspaces"]] == list(STAGES)
    for view in spec["workspaces"]:
        (told,) = leet(run / stage_of(view), "--summary")
        logged = {name for name in told["summary"] if not name.startswith("_")}
        assert keys(panels(view)) == logged
        assert keys(report_panels(spec, stage_of(view))) == logged
        assert all(panel["config"].get("metrics", ["-"]) for panel in panels(view))
        assert {name.partition("/")[0] for name in logged} >= {"train", "val", "perf", "pictures", "images_seen"}


def test_without_runs_it_names_what_any_run_logs(run, tiny_runs):
    logged = {stage: set() for stage in STAGES}
    for folder in (run, tiny_runs / "lsun_churches"):  # VQ and KL
        for stage, record in read_run(folder).stages.items():
            logged[stage] |= {*record.curves, *(f"pictures/{name}" for name in record.pictures), "images_seen"}
    for view in specification()["workspaces"]:
        assert keys(panels(view)) == logged[stage_of(view)]


def test_evaluations_have_panels_where_there_are_any():
    logged = {"val/loss", "eval/fid", "eval/fd_faces", "perf/device_hours", "pictures/mine"}
    found = layout.sections("diffusion", logged)
    assert layout.names(found) == logged | {"images_seen"}
    quality, hours = found[:2]
    assert [panel.keys for panel in quality.panels] == [("val/loss",), ("val/loss",), ("eval/fid",)]
    assert {panel.x for panel in hours.panels} == {"perf/device_hours"}
    assert [panel.keys for panel in found[-1].panels] == [("eval/fd_faces",), ("pictures/mine",)]
    assert "Quality over device hours" not in {s.name for s in layout.sections("diffusion", {"val/loss"})}


def test_another_client_reads_what_metrics_csv_says(run):
    """The best value where a summary is asked for, else the last one; and the run, its config and its facts."""
    for stage in STAGES:
        (told,) = leet(run / stage, "--summary")
        rows = metrics(run / stage)
        losses = [row["val/loss"] for row in rows.values() if "val/loss" in row]
        assert told["summary"]["val/loss"] == {"min": pytest.approx(min(losses), rel=1e-5)}
        assert told["summary"]["train/loss"] == pytest.approx(rows[64]["train/loss"], rel=1e-5)
        assert told["run_id"] == (run / stage / "wandb_id").read_text()
        assert (told["project"], told["state"]) == ("ldm_lab", "finished")
        assert told["config"]["model"] == read_run(run).stages[stage].config["model"]
        assert told["config"]["facts"].keys() >= {"git_commit", "data", "parameters", "flops_per_image"}


def test_pictures_are_beside_their_images_seen(run):
    """Each as often as it was shown, and no larger than the PNG in the run's folder."""
    for stage, record in read_run(run).stages.items():
        shown = {}
        for line in leet(run / stage):
            item = line.get("history", {}).get("item", {})
            for key in item:
                if key.startswith("pictures/") and key.endswith("._type"):
                    shown.setdefault(key[9:-6], []).append(int(item["images_seen"]))
        assert shown == {name: list(found) for name, found in record.pictures.items()}


# --- what was made of what


def test_lineage_runs_from_the_autoencoder_to_the_diffusion_model(run):
    artifacts = {
        stage: {
            line["artifact"]["name"].partition("-")[0]: line["artifact"]
            for line in leet(run / stage)
            if line["type"] == "artifact"
        }
        for stage in STAGES
    }
    first, second = (artifacts[stage] for stage in STAGES)
    assert first.keys() == {"autoencoder"}
    assert second.keys() == {"autoencoder", "latents", "diffusion"}
    used = {kind for kind, artifact in second.items() if artifact.get("use_after_commit")}
    assert used == {"autoencoder"}
    assert not first["autoencoder"].get("use_after_commit")
    for part in ("name", "digest", "type"):  # one and the same
        assert first["autoencoder"][part] == second["autoencoder"][part]
    assert first["autoencoder"]["name"].endswith(fingerprint(VQModel.from_pretrained(run / "autoencoder/final")))
    assert json.loads(second["diffusion"]["metadata"])["folder"] == str(run / "diffusion/final")
    assert json.loads(second["latents"]["metadata"])["count"] == 64
    for artifact in (*first.values(), *second.values()):
        assert sum(int(entry["size"]) for entry in artifact["manifest"]["contents"]) < 200  # no weights are sent


def test_what_comes_after_is_a_run_of_its_own_in_the_same_group(run, tmp_path):
    folder, used, made = tmp_path / "samples", ("diffusion", "0" * 16), ("evaluation", "1" * 16)
    log_to_run(run / "diffusion", folder, used, made, {"num_samples": 5}, {"eval/fid": 3.0}, images_seen=64)
    (told,) = leet(folder, "--summary")
    assert (told["summary"]["eval/fid"], told["summary"]["images_seen"]) == (3.0, 64)
    assert (told["project"], told["config"], told["state"]) == ("ldm_lab", {"num_samples": 5}, "finished")
    records = leet(folder)
    (one,) = [line["run"] for line in records if line["type"] == "run"]
    assert (one["run_group"], one["job_type"], one["display_name"]) == ("celebahq", "evaluation", "celebahq/evaluation")
    artifacts = [line["artifact"] for line in records if line["type"] == "artifact"]
    assert [(one["name"], one.get("use_after_commit", False)) for one in artifacts] == [
        (f"diffusion-{'0' * 16}", True), (f"evaluation-{'1' * 16}", False),
    ]  # fmt: skip


def test_what_comes_after_a_stage_without_wandb_or_fails_is_not_told(run, tiny_runs, tmp_path, monkeypatch, caplog):
    def init(**_):
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", init)
    told = (("diffusion", "a"), ("samples", "b"), {})
    log_to_run(tiny_runs / "celebahq/diffusion", tmp_path / "one", *told)
    assert not (tmp_path / "one").exists()
    log_to_run(run / "diffusion", tmp_path / "two", *told)
    log_to_run(tmp_path, tmp_path / "three", *told)  # no stage of ours
    messages = [record.getMessage() for record in caplog.records if record.name == "ldm_lab.runs.tracking"]
    assert messages == ["the samples could not be logged to W&B: no room"]


# --- which runs are compared


def test_stages_are_apart_and_the_baseline_is_pinned(run, tiny_runs, tmp_path):
    other = copy(tiny_runs, tmp_path, "lsun_churches") / "lsun_churches"
    spec = specification("--runs", run, other, "--baseline", run, "--entity", "us")
    for view in spec["workspaces"]:
        (runset,) = view["spec"]["section"]["runSets"]
        text = json.dumps(runset["filters"])
        assert f'"{stage_of(view)}"' in text
        assert '"celebahq"' in text
        assert '"lsun_churches"' in text
        assert runset["runFeed"] is not None
        assert '"jobType"' in text
    bare = specification("--runs", run, other, "--entity", "us")
    baselines = [json.dumps(one["workspaces"][1]["spec"]["section"]).count("aseline") for one in (spec, bare)]
    assert baselines[0] > baselines[1]


def test_coordinates_are_the_settings_that_differ(run, tiny_runs):
    view = specification("--runs", run, tiny_runs / "lsun_churches")["workspaces"][1]
    (plot,) = [panel for panel in panels(view) if panel["viewType"] == "Parallel Coordinates Plot"]
    columns = [column["accessor"] for column in plot["config"]["columns"]]
    assert columns[-1] == "summary:val/loss.min"
    assert 2 <= len(columns) <= 11
    assert all(column.startswith("config:") for column in columns[:-1])
    assert "Run Comparer" in {panel["viewType"] for panel in panels(view)}
    same = specification("--runs", run)["workspaces"][1]
    (plot,) = [panel for panel in panels(same) if panel["viewType"] == "Parallel Coordinates Plot"]
    assert "config:model.value.optimizer.lr" in [column["accessor"] for column in plot["config"]["columns"]]


# --- where it goes


def test_where_nobody_is_logged_in_a_file_says_it_all(capsys):
    command.main(["--project", "faces"])
    said = capsys.readouterr().out
    assert said == "nobody is logged in to W&B: the specification of the dashboard is in dashboard_faces.json\n"
    before = Path("dashboard_faces.json").read_bytes()
    with pytest.raises(ValueError, match=r"^--output dashboard_faces\.json: is there already"):
        command.main(["--project", "faces"])
    assert Path("dashboard_faces.json").read_bytes() == before


@pytest.mark.parametrize("reachable", [True, False])
def test_who_is_logged_in_gets_it_saved(capsys, monkeypatch, reachable):
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    saved = []

    def save(one):
        if not reachable:
            raise ConnectionError("no network")
        saved.append((type(one).__name__, one.entity, one.project))
        return type("Saved", (), {"url": f"https://there/{len(saved)}"})

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(ws.Workspace, "save", save)
    monkeypatch.setattr(wr.Report, "save", save)
    command.main(["--project", "faces", "--entity", "us"])
    said = capsys.readouterr().out.splitlines()
    if reachable:
        assert saved == [("Report", "us", "faces"), *[("Workspace", "us", "faces")] * 2]
        assert said == [f"saved: https://there/{number}" for number in (1, 2, 3)]
    else:
        assert said == [
            "W&B cannot be reached (no network): the specification of the dashboard is in dashboard_faces.json"
        ]


def test_what_cannot_be_is_refused_in_a_line(run, tiny_runs, monkeypatch):
    with pytest.raises(LoadError, match="no such folder"):
        command.main(["--project", "faces", "--runs", "nowhere"])
    with pytest.raises(ValueError, match=r"^--baseline .*: has no W&B run"):
        command.main(["--project", "faces", "--baseline", str(tiny_runs / "avatars")])
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.delitem(sys.modules, "ldm_lab.tools.dashboard.views", raising=False)
    with pytest.raises(ValueError, match=r"is not installed: pip install 'ldm_lab\[dashboards\]'$"):
        command.main(["--project", "faces"])
