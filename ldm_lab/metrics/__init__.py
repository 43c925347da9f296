"""Quality metrics for evaluation; training never optimises them."""
