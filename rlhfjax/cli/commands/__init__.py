"""What the commands do; `rlhfjax.cli.main` says which module is whose."""
