"""Training of the two stages: thin LightningModules, the EMA of the weights, schedules and callbacks."""
