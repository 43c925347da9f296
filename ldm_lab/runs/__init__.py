"""Files of a run, written and read: folder, record, model card, tracking and diagnosis."""
