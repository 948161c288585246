"""Measuring models: accuracy on held-out data, comparisons, reports, curves."""
