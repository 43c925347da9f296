"""W&B dashboards as code: what stands where, and its form for `wandb-workspaces`."""
