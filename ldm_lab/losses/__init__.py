"""What the first stage is trained on: pixels, perception, what is asked of the latents, and an adversary."""
