"""The DeepSpeed engine, the step, the loop, and checkpoints that any other number of ranks can load."""
