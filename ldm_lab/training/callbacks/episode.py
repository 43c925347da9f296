"""Detects that a metric has been bad for several validations in a row, and that it has recovered."""

from __future__ import annotations


class Episode:
    """A period of bad values: begins at the `patience`-th bad value in a row, ends at a good value.

    Attributes:
        on: whether an episode lasts now; a value that is neither good nor bad changes nothing.
        since: training images at the first of the bad values.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.on, self.since, self.count, self.at = False, 0, 0, -1

    def note(self, images_seen: int, bad: bool, good: bool) -> bool:
        """Record a value; returns whether an episode begins with it."""
        self.at = images_seen
        if bad:
            self.since = self.since if self.count else images_seen
            self.count += 1
        elif good or not self.on:
            self.on, self.count = False, 0
        begins = not self.on and self.count >= self.patience
        self.on |= begins
        return begins

    def state_dict(self) -> dict[str, int]:
        """All attributes but the patience."""
        return {"on": int(self.on), "since": self.since, "count": self.count, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> bool:
        """Restore a state, unless it is older than this one: a resumed run may validate before it loads its state.

        Returns:
            Whether the state was taken.
        """
        if state["at"] < self.at:
            return False
        self.on, self.since, self.count, self.at = bool(state["on"]), state["since"], state["count"], state["at"]
        return True
