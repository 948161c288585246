"""Models as they are stored: checkpoints of Hub families, adapters, exports, and the limits of what is read."""
