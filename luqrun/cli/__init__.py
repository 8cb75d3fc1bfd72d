"""The command line: Hydra in, run folder out."""

from luqrun.cli.command import main

__all__ = ["main"]
