"""What people do with a release: embed, predict, reconstruct. Needs neither deepspeed nor webdataset."""
