"""What loading imports when it is first needed is imported before anything is watched; most cases are for the soak."""

import pytest
import torch

from ldm_lab import LDMPipeline
from tests.security import sources

EVERY = 5  # which of the hostile cases an ordinary run takes; `-m soak` takes the others


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Spread over all kinds of cases, always the same ones."""
    cases = [item for item in items if "tests/security/test_hostile" in item.nodeid and hasattr(item, "callspec")]
    for number, item in enumerate(cases):
        if number % EVERY:
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session", autouse=True)
def _warm():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the copies of this process have no others
    pipe = LDMPipeline.from_pretrained(sources.FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=1)
    yield
    torch.set_num_threads(threads)
