"""Training: the loop (read loop.py first), its two trainers (pretraining and fine-tuning), the step and the engine."""
