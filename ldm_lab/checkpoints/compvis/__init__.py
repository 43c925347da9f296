"""Translates configs and tensor names of CompVis/latent-diffusion to ours (those of diffusers).

This package builds no network: `read` and `read_first_stage` turn a checkpoint into configs and tensors, plain data.
The config is translated first, as the tensor names depend on it:

    config = unet_config(params)
    UNet2DModel(**config).load_weights(unet_state(state, config), origin="model.ckpt")

A tensor without a counterpart in our networks, or a setting that they do not support, raises `LoadError`.
"""

from ldm_lab.checkpoints.compvis.autoencoder import kl_config, kl_model_state, vq_config, vq_model_state
from ldm_lab.checkpoints.compvis.checkpoint import Part, is_checkpoint, read, read_first_stage
from ldm_lab.checkpoints.compvis.unet import unet_config, unet_state

__all__ = [
    "Part",
    "is_checkpoint",
    "kl_config",
    "kl_model_state",
    "read",
    "read_first_stage",
    "unet_config",
    "unet_state",
    "vq_config",
    "vq_model_state",
]
