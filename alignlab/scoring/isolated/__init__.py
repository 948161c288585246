"""Reward functions in processes of their own (`run_in: process`)."""
