"""Rewards: functions, reward models and judges that score completions."""
