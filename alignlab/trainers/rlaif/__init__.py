"""Reinforcement learning from a judge's feedback (RLAIF), stage by stage."""
