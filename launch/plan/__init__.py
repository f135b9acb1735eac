"""`muster plan`, and what `muster run` asks of it: plans made by `trainer.plan`, and kept."""
