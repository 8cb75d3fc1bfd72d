"""The benchmark of scripts/benchmark.py; nothing else in luqrun imports it. Read run.py first."""
