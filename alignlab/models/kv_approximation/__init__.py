"""Approximations of cached keys and values: each one defined once, for the engine's cache and for the trainer's pass.

An approximation is a deterministic function of positions and numbers. The engine stores what is left of keys and
values; the trainer's forward pass computes the same function of its own keys and values, with gradients straight
through, so that both see the same model.
"""
