"""What every other package uses, and what imports none of them."""
