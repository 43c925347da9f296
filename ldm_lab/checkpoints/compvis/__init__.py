"""CompVis/latent-diffusion: its configs and tensor names, translated to ours (those of diffusers).

Nothing here builds a network: `read` and `read_first_stage` turn a checkpoint into configs and tensors, plain data. A
config is translated first; the names depend on it:

    config = unet_config(params)
    UNet2DModel(**config).load_weights(unet_state(state, config), origin="model.ckpt")

Tensors that the original has and ours do not, or settings that ours cannot express, are a `LoadError`.
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
