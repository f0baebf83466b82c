"""One training step and its parts: features, losses, gradients, on one process or several."""
