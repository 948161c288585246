"""Judges: models that compare and rate answers by a constitution."""
