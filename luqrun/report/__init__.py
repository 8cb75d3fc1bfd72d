"""Run folders in, the paper's tables and figures out: `scripts/tables.py` is the command."""
