"""What hardware asks of a training: which share of its work is 4-bit (job=cost), and what the multipliers take."""
