"""CompVis/latent-diffusion: its configs and tensor names, translated to ours (those of diffusers).

`load_pipeline` and `load_first_stage` read a checkpoint. What they are made of takes plain data and returns plain
data. A config is translated first; the names depend on it:

    config = unet_config(params)
    UNet2DModel(**config).load_weights(unet_state(state, config), origin="model.ckpt")

Tensors that the original has and ours do not, or settings that ours cannot express, are a `LoadError`.
"""

from ldm_lab.interop.compvis.autoencoder import kl_config, kl_model_state, vq_config, vq_model_state
from ldm_lab.interop.compvis.checkpoint import load_first_stage, load_pipeline
from ldm_lab.interop.compvis.unet import unet_config, unet_state

__all__ = [
    "kl_config",
    "kl_model_state",
    "load_first_stage",
    "load_pipeline",
    "unet_config",
    "unet_state",
    "vq_config",
    "vq_model_state",
]
