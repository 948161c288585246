"""The learner, the training loops, and what both need."""
