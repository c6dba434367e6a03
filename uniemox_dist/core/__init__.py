"""Shared foundations: errors, atomic files, logs, signals, the watchdog and text formatting. Torch-free."""
