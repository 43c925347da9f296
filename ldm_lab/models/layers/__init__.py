"""Building blocks of networks: pure torch, parameters named as in diffusers."""
