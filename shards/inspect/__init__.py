"""Looking at data sets: verification, statistics and the HTML report."""
