"""Inference with a release: embeds, classifies and reconstructs pictures. Needs neither DeepSpeed nor webdataset."""
