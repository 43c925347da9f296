"""Pure diffusion mathematics: plain tensors in, plain tensors out; knows no network and no trainer."""
