"""Training with the Trainer, sweeps, and convex fits."""
