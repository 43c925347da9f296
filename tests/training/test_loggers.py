"""Where metrics go: one row for each number of images, and a W&B that neither asks nor stops anything."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import wandb
from PIL import Image

from ldm_lab.training.loggers import csv as csv_logger
from ldm_lab.training.loggers.csv import MetricsCSV
from ldm_lab.training.loggers.wandb import WandbLogger

# --- metrics.csv


def rows(folder):
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log(logger, images_seen, **metrics):
    logger.log_metrics({"images_seen": float(images_seen), "epoch": 0, **metrics}, step=1)


def test_metrics_of_the_same_images_share_a_row(tmp_path):
    logger = MetricsCSV(tmp_path)
    log(logger, 16, loss=0.25)
    log(logger, 8, loss=1 / 3)
    log(logger, 16, val=2.0)
    logger.log_metrics({"lr": 1.0})  # not about images: nowhere to put it
    logger.finalize("success")
    assert rows(tmp_path) == [
        {"images_seen": "8", "loss": "0.333333", "val": ""},
        {"images_seen": "16", "loss": "0.25", "val": "2"},
    ]


def test_a_resumed_run_keeps_the_rows_and_repeats_none(tmp_path):
    first = MetricsCSV(tmp_path)
    for images in (8, 16, 24):
        log(first, images, loss=images)
    first.finalize("success")
    resumed = MetricsCSV(tmp_path)
    resumed.forget_after(16)  # its newest checkpoint
    for images in (24, 32):
        log(resumed, images, loss=-images, new=1.0)
    resumed.finalize("success")
    assert [(row["images_seen"], row["loss"], row["new"]) for row in rows(tmp_path)] == [
        ("8", "8", ""), ("16", "16", ""), ("24", "-24", "1"), ("32", "-32", "1"),
    ]  # fmt: skip


def test_a_fresh_start_forgets_a_run_that_left_no_checkpoint(tmp_path):
    first = MetricsCSV(tmp_path)
    log(first, 8, loss=1.0)
    first.finalize("success")
    again = MetricsCSV(tmp_path)
    again.forget_after(0)
    log(again, 4, loss=2.0)
    again.finalize("success")
    assert [row["images_seen"] for row in rows(tmp_path)] == ["4"]


def test_large_counts_are_exact(tmp_path):
    logger = MetricsCSV(tmp_path)
    log(logger, 2**24 + 1, loss=1.0)
    logger.flush()
    assert rows(tmp_path)[0]["images_seen"] == str(2**24 + 1)


def test_writing_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    now = iter(range(1, 1000))
    monkeypatch.setattr(
        csv_logger, "time", SimpleNamespace(monotonic=lambda: next(now))
    )  # a second passes at each look
    logger, written = MetricsCSV(tmp_path), []
    for images in range(8, 8 * 60, 8):
        log(logger, images, loss=1.0)
        logger.save()
        written.append(len(rows(tmp_path)))
    assert written[0] == 1
    assert 2 <= len(set(written)) <= 4
    logger.finalize("success")
    assert len(rows(tmp_path)) == 59


# --- W&B


class FakeRun:
    settings = SimpleNamespace(log_internal="/nowhere")

    def __init__(self):
        self.logged, self.metrics, self.finished, self.config = [], {}, None, self

    def define_metric(self, name, **settings):
        self.metrics[name] = settings

    def update(self, params, **_):
        self.params = params

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def service(monkeypatch):
    """W&B without W&B: what `init` was called with, and whether the user is logged in."""
    calls = SimpleNamespace(inits=[], runs=[], logged_in=False, logins=[])

    def init(**settings):
        calls.inits.append(settings)
        calls.runs.append(FakeRun())
        return calls.runs[-1]

    def login(**settings):
        calls.logins.append(settings)
        return calls.logged_in

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "teardown", lambda exit_code: None)
    return calls


def logger(folder, **more):
    return WandbLogger(folder, project="ldm_lab", group="faces", job_type="diffusion", **more)


def test_it_asks_for_nothing_and_goes_online_only_where_the_user_is_logged_in(tmp_path, service):
    for logged_in, offline, mode in ((False, False, "offline"), (True, False, None), (True, True, "offline")):
        service.logged_in = logged_in
        log(logger(tmp_path, offline=offline), 8, loss=1.0)
        assert service.inits[-1]["mode"] == mode
    assert service.logins
    assert all(settings["prompt"] is False for settings in service.logins)


def test_the_stages_of_a_run_lie_together_and_a_resumed_stage_goes_on(tmp_path, service):
    for _ in range(2):
        one = logger(tmp_path, tags=["mine"])
        log(one, 8, loss=1.0)
        one.finalize("success")
    settings = service.inits[0]
    assert (settings["project"], settings["group"], settings["job_type"]) == ("ldm_lab", "faces", "diffusion")
    assert (settings["name"], settings["tags"], settings["resume"]) == ("faces/diffusion", ["mine"], "allow")
    assert settings["dir"] == tmp_path
    assert settings["id"] == service.inits[1]["id"] == (tmp_path / "wandb_id").read_text()
    assert logger(tmp_path / "other").version != settings["id"]
    assert [run.finished for run in service.runs] == [0, 0]


def test_images_are_the_axis_of_everything(tmp_path, service):
    one = logger(tmp_path)
    log(one, 8, loss=0.5)
    one.log_metrics({"loss": 1.0})  # without the axis it cannot be drawn
    one.log_picture("samples", Image.new("RGB", (4, 4)), 16)
    one.log_hyperparams({"seed": 0})
    run = service.runs[0]
    assert run.metrics["*"] == {"step_metric": "images_seen"}
    assert run.logged[0] == {"images_seen": 8.0, "loss": 0.5}
    assert (run.logged[1].keys(), run.logged[1]["images_seen"]) == ({"pictures/samples", "images_seen"}, 16)
    assert len(run.logged) == 2
    assert run.params == {"seed": 0}


def test_the_summary_holds_the_best_of_what_is_logged(tmp_path, service):
    """Said once of each metric, when it is new: of several patterns that fit, W&B itself takes any."""
    one = logger(tmp_path, summaries={"min": ["val/loss", "eval/fd_*"], "max": ["eval/recall"]})
    defined = []
    one.experiment.define_metric = lambda name, **settings: defined.append((name, settings["summary"]))
    for images in (8, 16):
        one.log_metrics({"images_seen": images, "val/loss": 1.0, "eval/fd_avatars": 2.0, "eval/recall": 1.0, "x": 1.0})
    assert sorted(defined) == [("eval/fd_avatars", "min"), ("eval/recall", "max"), ("val/loss", "min")]


def test_what_a_killed_process_had_not_written_is_logged_again(tmp_path, service):
    one = logger(tmp_path)
    for images in (8, 16):
        log(one, images, loss=1 / images)
        one.flush()  # a checkpoint follows, and the process is killed
    for _ in range(2):  # as often as that happens
        resumed = logger(tmp_path)
        resumed.forget_after(8)
        resumed.flush()
        assert service.runs[-1].logged == [{"images_seen": 8.0, "loss": 1 / 8}]
    resumed.finalize("success")
    ended = logger(tmp_path)
    ended.forget_after(16)
    assert service.runs[-1].logged == []


class NoArtifacts(FakeRun):
    disabled = False

    def log_artifact(self, artifact):
        raise OSError("no room")


def test_artifacts_may_fail_without_the_rest(tmp_path, service, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: service.runs.append(NoArtifacts()) or service.runs[-1])
    one = logger(tmp_path)
    for _ in range(2):
        one.log_artifact("autoencoder", "abc", folder="here")
    log(one, 8, loss=1.0)
    assert service.runs[0].logged == [{"images_seen": 8.0, "loss": 1.0}]
    assert [record.getMessage() for record in caplog.records] == [
        "W&B takes no artifacts (no room): what was made of what is not told"
    ]


def test_artifacts_can_be_left_out(tmp_path, service):
    one = logger(tmp_path, artifacts=False)
    one.log_artifact("autoencoder", "abc", folder="here")
    one.use_artifact("autoencoder", "abc")
    assert not (tmp_path / "artifacts").exists()


def test_what_the_stage_is_made_of_stands_beside_its_config(tmp_path, service):
    one = logger(tmp_path)
    one.log_facts(lambda: {"parameters": 7})
    assert service.runs[0].params == {"facts": {"parameters": 7}}


def use_all(one):
    log(one, 8, loss=1.0)
    one.log_hyperparams({"seed": 0})
    one.log_picture("samples", Image.new("RGB", (4, 4)), 8)
    one.finalize("success")


def test_a_service_that_is_away_stops_nothing_and_is_mentioned_once(tmp_path, service, monkeypatch, caplog):
    def init(**_):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", init)
    use_all(logger(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        "W&B is away (no network): training goes on, metrics.csv has everything"
    ]


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_a_service_that_goes_away_stops_nothing(tmp_path, service, monkeypatch, method):
    def fail(*_, **__):
        raise ConnectionError("gone")

    monkeypatch.setattr(FakeRun, method, fail)
    use_all(logger(tmp_path))


def test_an_installation_that_is_broken_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # `import wandb` raises ImportError
    use_all(logger(tmp_path))


@pytest.mark.parametrize("text", ["", "../../etc/passwd", "two words", "a\nb", "UPPER", "a" * 5000, "\udcff\x00"])
def test_only_a_plain_id_is_trusted(tmp_path, text):
    path = tmp_path / "wandb_id"
    path.write_text(text, errors="surrogateescape")
    made = logger(tmp_path).version
    assert re.fullmatch("[a-z0-9]{12}", made)
    assert path.read_text() == made == logger(tmp_path).version


def test_an_id_file_that_leads_elsewhere_changes_nothing_there(tmp_path):
    (tmp_path / "elsewhere").write_text("precious words")
    (tmp_path / "wandb_id").symlink_to(tmp_path / "elsewhere")
    made = logger(tmp_path).version
    assert (tmp_path / "elsewhere").read_text() == "precious words"
    assert (tmp_path / "wandb_id").read_text() == made


@pytest.mark.parametrize("where", ["login", "init"])
def test_where_it_cannot_go_online_it_stays_offline_and_says_so(tmp_path, service, monkeypatch, caplog, where):
    service.logged_in = True
    given = getattr(wandb, where)

    def fail(**settings):
        if settings.get("mode") != "offline":
            raise wandb.errors.CommError("no network")
        return given(**settings)

    monkeypatch.setattr(wandb, where, fail)
    use_all(logger(tmp_path))
    assert service.inits[-1]["mode"] == "offline"
    assert service.runs[-1].finished == 0
    (record,) = caplog.records
    assert record.getMessage().startswith("W&B cannot be reached (no network): the run stays offline, in ")


def test_the_user_may_disable_it(tmp_path, service, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    service.logged_in = True
    use_all(logger(tmp_path))
    assert [settings["mode"] for settings in service.inits] == ["disabled"]
    assert service.logins == []


def test_nothing_is_waited_for_long(tmp_path, service):
    use_all(logger(tmp_path))
    settings = service.inits[0]["settings"]
    assert 0 < settings.init_timeout <= 60
    assert 0 < settings.finish_timeout <= 60
