"""What every part builds on: errors, atomic files, logs, signals, the watchdog and text formatting. Torch-free."""
