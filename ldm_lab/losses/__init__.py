"""Losses of the first stage: pixel, perceptual, latent and adversarial."""
