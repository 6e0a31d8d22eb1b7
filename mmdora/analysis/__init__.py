"""Analysis of a run: weight decomposition and plots."""
