"""Fine-tuning on labelled data: pretraining's engine, stream, checkpoints and loop, with a classifier."""
