"""Inspection of data sets: verification, statistics and the HTML report."""
