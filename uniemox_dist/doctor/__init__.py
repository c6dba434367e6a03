"""Checks of a node or an allocation for problems that would stop or slow a run. Measuring and judging are separate
functions."""
