"""The run folder: identity, files, checkpoints, and where a run starts from."""
