"""Small tokenizers, made here: plain, with a chat template, and one that adds tokens at both ends."""

import pytest
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from alignlab.data.tokenizer_training import train_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["What is 1 + 2 = 3", "user assistant system"], vocab_size=270)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML, whose turns end with the end-of-sequence token, as SmolLM2's do."""
    tokenizer = train_tokenizer(["What is 1 + 2 = 3", "user assistant system"], vocab_size=270)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", special=True)]})
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|im_end|>", special=True)})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def framing_tokenizer() -> PreTrainedTokenizerFast:
    """Adds `<bos>` before and the end-of-sequence token after every text; its chat template writes `<bos>` itself."""
    tokenizer = train_tokenizer(["What is 1 + 2 = 3"], vocab_size=270)
    tokenizer.add_special_tokens({"bos_token": AddedToken("<bos>", special=True)})
    bos, eos = ("<bos>", tokenizer.bos_token_id), (str(tokenizer.eos_token), tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos]
    )
    tokenizer.chat_template = "<bos>{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}" + (
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer
