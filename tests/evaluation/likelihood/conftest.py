"""A tokenizer of single bytes, and a small model."""

from tests.rollout.conftest import llama, tokenizer

__all__ = ["llama", "tokenizer"]
