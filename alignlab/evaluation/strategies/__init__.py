"""Test-time strategies: what more samples of a problem are worth, computed from one pool of samples."""
