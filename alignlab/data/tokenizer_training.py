"""A byte-level BPE tokenizer trained from a task's own text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignlab.errors import ConfigError

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: `<|pad|>` (id 0), `<|endoftext|>` (1), all 256 bytes, and the merges.

    Any text can be encoded, and decodes to itself. Each digit is a token, so that a model learns arithmetic on digits
    and not on numbers that happen to be frequent. There is no chat template.

    Args:
        texts: texts from which merges are learnt.
        vocab_size: largest number of tokens, >= 258; there are fewer if the texts have fewer pairs to merge.

    Raises:
        ConfigError: `vocab_size` leaves no room for all bytes, or there is no text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(
            f"tokenizer.vocab_size must be at least {len(alphabet) + 2} (256 bytes and 2 special tokens), "
            f"and is {vocab_size}; raise it"
        )
    texts = list(texts)
    if not any(texts):
        raise ConfigError("a tokenizer is trained from text, and there is none; check the data and tokenizer.num_texts")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
