"""Networks: autoencoders and UNet, with the constructor arguments and state dicts of diffusers."""
