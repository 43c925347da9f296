"""What the tests that kill have done, in the last lines of the report."""

from tests.reliability.kills import SEED, TALLY


def pytest_terminal_summary(terminalreporter):
    if TALLY["kills"]:
        counts = ", ".join(f"{name}: {count}" for name, count in TALLY.items())
        terminalreporter.write_line(f"{counts} (KILLS_SEED={SEED})")
