"""What runs have recorded, side by side on one page that opens from disk."""
