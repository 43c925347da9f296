"""Runs that several tests look at: `debug=tiny` trained once a session, in this process."""

import pytest

from tests.runs import EXPERIMENTS, train


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A folder with a finished `debug=tiny` run of each experiment. Nobody may change it: see `tests.runs.copy`."""
    runs = tmp_path_factory.mktemp("tiny") / "runs"
    for experiment in EXPERIMENTS:
        train(
            runs,
            f"experiment={experiment}",
            "plugins=[tests]",
            "+callbacks.journal._target_=tests.callbacks.Journal",
            "+callbacks.journal.folder=${paths.stage}",
        )
    return runs
