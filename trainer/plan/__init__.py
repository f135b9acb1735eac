"""What a training step costs on a cluster, read off the program that XLA compiles for it."""
