"""When something has gone wrong for long enough to say so, and when it is over."""

from __future__ import annotations


class Episode:
    """Begins with the `patience`-th bad value in a row, ends with a good one; what is neither lets it go on.

    Attributes:
        on: whether there is one.
        since: training images at the first of the bad values.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.on, self.since, self.count, self.at = False, 0, 0, -1

    def note(self, images_seen: int, bad: bool, good: bool) -> bool:
        """Take note of a value; returns whether an episode begins with it."""
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
        """All but the patience."""
        return {"on": int(self.on), "since": self.since, "count": self.count, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> bool:
        """Go on from there, unless that is older: a resumed run makes up for a validation before it loads its state.

        Returns:
            Whether the state was taken.
        """
        if state["at"] < self.at:
            return False
        self.on, self.since, self.count, self.at = bool(state["on"]), state["since"], state["count"], state["at"]
        return True
