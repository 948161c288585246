"""Reward plug-ins, one file each. They import `alignlab.types` and nothing else of alignlab.

A reward is a function with TRL's signature, `def reward(prompts, completions, **columns) -> list[float | None]`, sync
or async. `prompts` and `completions` are strings or lists of chat messages; `columns` are the dataset's columns and
`completion_ids`, with one entry for each completion. None means that the reward does not apply to a completion. Named
keyword parameters that are not columns are the reward's options, set in the configuration. The manual is README.md.
"""
