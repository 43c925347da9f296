"""Translates configs and tensor names of CompVis/latent-diffusion to ours (those of diffusers).

This package builds no network: `read` and `read_first_stage` turn a checkpoint into configs and tensors, plain data.
The config is translated first, as the tensor names depend on it:

    config = unet_config(params)
    UNet2DModel(**config).load_weights(unet_state(state, config), origin="model.ckpt")

A tensor without a counterpart in our networks, or a setting that they do not support, raises `LoadError`.
"""

from ldm_lab.checkpoints.compvis.autoencoder import autoencoder_state, kl_config, vq_config
from ldm_lab.checkpoints.compvis.checkpoint import Part, is_checkpoint, read, read_first_stage
from ldm_lab.checkpoints.compvis.unet import unet_config, unet_state

__all__ = [
    "Part",
    "autoencoder_state",
    "is_checkpoint",
    "kl_config",
    "read",
    "read_first_stage",
    "unet_config",
    "unet_state",
    "vq_config",
]
