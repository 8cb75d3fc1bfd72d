"""Run folders in, the paper's tables and figures out: `luqrun-tables` and `luqrun-pictures` are the commands."""
