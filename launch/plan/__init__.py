"""What a run will need and cost, told before it is queued: pure functions of the settings. Torch-free."""
