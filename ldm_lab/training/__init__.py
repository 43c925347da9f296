"""How the two stages are trained: thin LightningModules, the EMA of the weights, schedules and callbacks."""
