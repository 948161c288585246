"""The command `alignlab`: one file for each of its sub-commands."""
