"""Data sets made from others: index foreign tars, select, split and merge."""
