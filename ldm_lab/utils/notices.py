"""What a user should know, said once in a process: a training opens and writes many files."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger(__name__)


@functools.cache
def say_once(line: str) -> None:
    """Warn, unless this very line was said before."""
    log.warning(line)
