"""What the first stage is trained on: pixels, perception, the codebook and an adversary."""
