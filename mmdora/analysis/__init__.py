"""What tuning did to a model: weight decomposition, and plots."""
