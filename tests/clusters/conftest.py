"""One Slurm for all tests of the session that need one."""

import pytest

from tests.clusters.slurm import Slurm, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running Slurm of two nodes; tests skip where none can be started."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
