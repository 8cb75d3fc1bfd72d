"""The process: its group, signals, devices, threads and seeds."""
