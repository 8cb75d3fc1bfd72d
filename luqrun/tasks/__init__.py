"""What networks learn: data, network, loss and metrics."""
