"""Feedback from models: a judge that prefers and rates by a constitution, and what becomes of its answers."""
