"""Likelihood of given texts: perplexity by token, word and byte, and calibration of the next token."""
