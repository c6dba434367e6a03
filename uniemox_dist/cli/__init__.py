"""The command line: one module per command group. Slow imports happen inside the commands."""
