"""The benchmark of scripts/benchmark.py (read run.py first) and the check of scripts/gpu_check.py (gpu_check.py, and
gpu_lines.py for what it checks); nothing else in luqrun imports them."""
