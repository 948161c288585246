"""The tiny policy and task of `tests.trainers`."""

from tests.trainers.conftest import make_config, make_model, rows, tokenizer

__all__ = ["make_config", "make_model", "rows", "tokenizer"]
