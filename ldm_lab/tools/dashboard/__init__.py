"""W&B dashboards as code: their layout, and its translation for `wandb-workspaces`."""
