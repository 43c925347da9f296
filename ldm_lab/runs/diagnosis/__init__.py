"""What the records of a training say about its health: pure functions from records to findings."""
