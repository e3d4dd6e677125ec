"""Training on one machine: the plan of every step, the loop, checkpoints and evaluation."""
