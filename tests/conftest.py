"""Runs that several tests look at: `debug=tiny` trained once a session, in this process."""

import gc
import os
import tempfile
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils import backend_registration

from tests.trained import EXPERIMENTS, train

# The engine of autograd counts devices once, at the first backward: that of `rehearsal` must be among them by then.
if hasattr(backend_registration, "_DummyDeviceGuard"):
    torch._C._acc.register_python_privateuseone_device_guard(backend_registration._DummyDeviceGuard())

# No test outlives a power cut: nothing waits for the disk. Tests of that promise look at the calls.
os.fsync = lambda descriptor: None

# What runs share is shared by the tests of one session alone.
CACHE = tempfile.TemporaryDirectory(prefix="ldm_lab_cache")
os.environ["LDM_LAB_CACHE"] = CACHE.name


TESTS = Path(__file__).parent
# Rooms and files whose tests train, start processes or build whole models. `-m "not slow"` leaves a minute or so.
SLOW = (
    "clusters", "reliability", "rehearsal", "scripts", "security", "training", "checkpoints/test_checkpoint",
    "checkpoints/test_compvis_checkpoint", "checkpoints/test_foreign_files", "checkpoints/test_foreign_models",
    "config/test_configs", "config/test_kinds", "config/test_recipes", "config/test_sweep", "data/test_avatars",
    "data/test_remote", "data/test_shared_latents", "losses/test_autoencoder", "models/test_codebook",
    "models/test_diffusers_parity", "models/test_from_pretrained", "pipeline/test_pipeline_namesake",
    "pipeline/test_pipeline_recorded", "pipeline/test_pipeline_schedulers", "sampling/test_pictures",
    "sampling/test_sample_command", "test_extending", "test_quickstart", "tools/evaluate", "tools/test_benchmark",
    "tools/test_dashboard", "utils/test_float32", "utils/test_hub", "utils/test_locks", "utils/test_threads",
    "utils/test_weights",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A folder with a finished `debug=tiny` run of each experiment. Nobody may change it: see `tests.trained.copy`."""
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


@pytest.fixture(scope="session")
def s3_server():
    """moto's S3 server on this machine."""
    from tests.stores import S3

    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 server, which s3fs then asks; see `tests.stores.Server`."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3_server.endpoint}.items():
        monkeypatch.setenv(name, value)
    s3_server.asked.clear()
    return s3_server


@pytest.fixture
def rehearsal(monkeypatch):
    """A device that is not the CPU: `.device`, and `.log` of what has happened there. See `tests.rehearsal`."""
    from tests.rehearsal import Rehearsal, accelerator, device, rules

    if not device.AVAILABLE:
        pytest.skip(f"torch {torch.__version__} has no torch.utils.backend_registration.{device.SETUP}")
    found = Rehearsal(device.register(), rules.LOG)
    accelerator.register()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: found.log.pin(tensor))
    # In torch 2.15's inference mode a wrapped tensor cannot be changed in place.
    monkeypatch.setitem(lightning.Trainer.__init__.__wrapped__.__kwdefaults__, "inference_mode", False)
    found.log.clear()
    yield found
    found.log.clear()


def pytest_configure(config):
    """Of several workers: files are dealt in the order below, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that workers end at about the same time.

    The rehearsal comes last: torch then has another device, for as long as the process lives.
    """
    for item in items:
        if item.path.relative_to(TESTS).as_posix().startswith(SLOW) or "tiny_runs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("rehearsal" in getattr(item, "fixturenames", ()), item.path not in slow))


def pytest_collection_finish():
    """Python's garbage collector need not look again and again at what was imported: a million objects."""
    gc.collect()
    gc.freeze()
