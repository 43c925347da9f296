"""Reading what other projects wrote."""
