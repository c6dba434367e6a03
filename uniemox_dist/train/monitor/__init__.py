"""Monitoring during training: metrics, TensorBoard, stragglers, loss spikes, non-finite steps and traces."""
