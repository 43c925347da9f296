"""From a command line to built objects; Hydra and OmegaConf are imported here alone."""
