"""Using a release: embed, predict and reconstruct pictures. Needs neither DeepSpeed nor webdataset."""
