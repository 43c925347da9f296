"""What a run leaves behind: its folder, records, cards, tracked files and diagnosis."""
