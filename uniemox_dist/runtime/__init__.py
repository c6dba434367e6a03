"""What a process needs around the work itself: its place in the world, files, logs, signals."""
