"""The files around the code agree with it: workflow, hooks, issue forms, AGENTS.md."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from ldm_lab.__main__ import tools
from tests.test_architecture import ROOMS

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = ["bug.yml", "question.yml"]
DOCTOR = "python -m ldm_lab doctor RUN"


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


def ends(name):
    """The oldest and the newest minor version of a range `>=a.b,<c.d` in pyproject.toml."""
    found = re.search(rf'{name}>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text("pyproject.toml").replace(' = "', ""))
    assert found, f"pyproject.toml: {name} has no range of the form >=a.b,<c.d"
    major, oldest, next_major, beyond = map(int, found.groups())
    assert major == next_major
    assert beyond > oldest + 1
    return {"oldest": f"{major}.{oldest}", "newest": f"{major}.{beyond - 1}"}


@pytest.fixture
def workflow():
    return yaml.safe_load(text(".github/workflows/ci.yaml"))


@pytest.fixture
def job(workflow):
    (only,) = workflow["jobs"].values()
    return only


def test_the_workflow_takes_both_ends_of_the_ranges(job):
    python, torch = ends("requires-python"), ends("torch")
    matrix = job["strategy"]["matrix"]
    # Quoted in the file: 3.10 without quotes is the number 3.1.
    assert matrix["end"] == [{"name": end, "python": python[end], "torch": torch[end]} for end in ("oldest", "newest")]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}


def test_the_workflow_runs_what_a_developer_runs(job):
    steps = job["steps"]
    (setup,) = (step for step in steps if step.get("uses", "").startswith("actions/setup-python@"))
    assert setup["with"]["python-version"] == "${{ matrix.end.python }}"
    assert setup["with"]["cache"] == "pip"
    assert (ROOT / setup["with"]["cache-dependency-path"]).is_file()
    assert steps[-1]["run"] == ".ci/run"
    assert os.access(ROOT / steps[-1]["run"], os.X_OK)


def test_pip_is_held_to_the_torch_of_the_matrix(job, tmp_path):
    """The step before the last, run as GitHub runs it."""
    step = job["steps"][-2]
    assert step["env"] == {"TORCH": "${{ matrix.end.torch }}"}
    environment = os.environ | {"TORCH": "2.10", "RUNNER_TEMP": str(tmp_path), "GITHUB_ENV": str(tmp_path / "env")}
    subprocess.run(["bash", "-e", "-c", step["run"]], env=environment, check=True)
    name, _, file = (tmp_path / "env").read_text().strip().partition("=")
    assert name == "PIP_CONSTRAINT"
    assert Path(file).read_text() == "torch==2.10.*\n"


def test_the_workflow_is_safe_on_a_fork(workflow, job):
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a truth value
    assert set(triggers) == {"push", "pull_request", "workflow_dispatch"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in job
    assert not re.search(r"\b(secrets|vars)\b", text(".github/workflows/ci.yaml").partition("\nname:")[2])
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert "github.ref" in workflow["concurrency"]["group"]
    assert 30 <= job["timeout-minutes"] <= 180


def test_the_hooks_leave_recorded_outputs_alone():
    config = yaml.safe_load(text(".pre-commit-config.yaml"))
    assert re.search(config["exclude"], "tests/golden/compvis/meta.json")
    assert not re.search(config["exclude"], "tests/helpers.py")
    hooks = {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "check-added-large-files", "check-yaml", "end-of-file-fixer"}
    (limit,) = hooks["check-added-large-files"]["args"]
    kilobytes = int(limit.removeprefix("--maxkb="))
    assert not [path for path in (ROOT / "docs").rglob("*.*") if path.stat().st_size > 1024 * kilobytes]


def test_dependabot_looks_at_packages_and_actions():
    config = yaml.safe_load(text(".github/dependabot.yml"))
    assert config["version"] == 2
    assert {update["package-ecosystem"] for update in config["updates"]} == {"pip", "github-actions"}
    assert all(update["schedule"]["interval"] and update["directory"] == "/" for update in config["updates"])


@pytest.mark.parametrize("name", FORMS)
def test_an_issue_form_asks_for_the_command_and_the_doctor(name):
    form = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{name}"))
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"]), "an id is there twice"
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields.values())
    assert DOCTOR in fields["doctor"]["attributes"]["label"]
    assert "doctor" in tools()
    assert "typed" in fields["command"]["attributes"]["label"]


def test_a_bug_comes_with_its_command_and_the_doctor():
    form = yaml.safe_load(text(".github/ISSUE_TEMPLATE/bug.yml"))
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert required >= {"command", "doctor", "result"}


def test_every_issue_goes_through_a_form():
    assert {path.name for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()} == {*FORMS, "config.yml"}
    assert yaml.safe_load(text(".github/ISSUE_TEMPLATE/config.yml"))["blank_issues_enabled"] is False


@pytest.mark.parametrize("path", ["AGENTS.md", ".github/pull_request_template.md"])
def test_lines_are_short(path):
    assert not [line for line in text(path).splitlines() if len(line) > 100]


def test_agents_md_is_short():
    assert len(text("AGENTS.md").splitlines()) <= 40


def test_agents_md_names_paths_that_exist():
    page = text("AGENTS.md")
    links = re.findall(r"\]\(([^)]+)\)", page)
    quoted = [span for span in re.findall(r"`([^`\n]+)`", page) if re.fullmatch(r"[\w./-]*(/[\w./-]*|\.(py|md))", span)]
    assert {"CONTRIBUTING.md", "docs/architecture.md"} <= set(links)
    assert {"CHANGELOG.md", "train.py", "ldm_lab/runs/changes.py", "tests/golden/"} <= set(quoted)
    missing = {path for path in (*links, *quoted) if not (ROOT / path).exists()}
    assert missing == set()


def test_agents_md_names_every_room():
    page = text("AGENTS.md")
    rooms = [name for name in ROOMS if not name.startswith("__")]
    assert not [name for name in rooms if not re.search(rf"`ldm_lab/{name}(/|\.py)`", page)]


def test_agents_md_gives_commands_of_other_pages():
    """So that a command that changes there changes here too."""
    (block,) = re.findall(r"```\n(.*?)```", text("AGENTS.md"), re.DOTALL)
    commands = [line.partition("  #")[0].strip() for line in block.splitlines()]
    assert len(commands) >= 4
    known = "\n".join(map(text, ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yaml")))
    assert not [command for command in commands if command not in known]


def test_the_pull_request_template_gives_commands_of_contributing():
    commands = re.findall(r"`((?:pytest|ruff) [^`]+)`", text(".github/pull_request_template.md"))
    assert len(commands) == 2
    assert all(command in text("CONTRIBUTING.md") for command in commands)
