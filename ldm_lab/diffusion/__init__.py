"""Pure diffusion mathematics on plain tensors, independent of networks and trainers."""
