"""Before any test loads torch: how its threads wait, as with every entry, and how many there are."""

import os
import signal

from ldm_lab.utils.threads import wait_asleep

wait_asleep()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever starts the tests may have it ignored, as `nohup` does
