"""A judge's model in this process: choices are scored by a packed forward pass, texts come from our engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.judge import ModelJudge
from alignlab.config.render import RenderSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.data.messages import BadRow
from alignlab.data.packing import pack_rollouts
from alignlab.data.rendering import PromptRenderer
from alignlab.data.vocabulary import check_ids
from alignlab.errors import ConfigError
from alignlab.models.adapters import adapters_disabled, has_adapters
from alignlab.models.attention import causal_lm, num_embeddings
from alignlab.models.checkpoints import load_model, load_tokenizer
from alignlab.models.policy import Policy
from alignlab.rlaif.answers import answer_key
from alignlab.rlaif.chat_model import Conversation, Failure
from alignlab.rollout.engine import EmbeddedEngine
from alignlab.training.reference_cache import digest_of_model
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

_UNASKED = (
    "the chat template refuses the question, it is longer than the judge's positions, or it holds a token that the "
    "judge has no embedding for"
)


class LocalChatModel:
    """A model with a chat template. Of one with adapters the frozen base answers: it is the policy's, shared.

    Args:
        model: in evaluation or in training; it is left as it was.
        tokenizer: with a chat template.
        tokens_per_batch: tokens in one forward pass.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that writes tokens without an embedding.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, tokens_per_batch: int = 4096
    ) -> None:
        check_chats(tokenizer, num_embeddings(model))
        self.identity = f"{digest_of_model(model)} {answer_key(template=tokenizer.chat_template)}"
        self.num_retries = 0
        self._model, self._tokenizer, self._budget = model, tokenizer, tokens_per_batch
        self._policy = Policy(model)
        # A completion must not end its own turn in the question to the judge.
        self._render = PromptRenderer(RenderSettings(escape_special_tokens=tokenizer.is_fast), tokenizer)
        self._num_rows = num_embeddings(model)

    def choose(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> list[tuple[float, ...] | Failure]:
        """Log-probability of the first token of each choice; the conversation is computed once for all of them."""
        tokens = self._first_tokens(choices)
        asked = self._prompts(conversations, room=1)
        groups = [
            Rollout(prompt, tuple(Completion((token,), "", (0.0,), None, "stop", (0,)) for token in tokens))
            for prompt in asked.values()
        ]
        scores = iter(self._score(groups))
        return [
            next(scores) if i in asked else Failure("refused", _UNASKED) for i in range(len(conversations))
        ]

    def write(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | Failure]:
        """A sampled answer to each conversation."""
        asked = self._prompts(conversations, room=max_new_tokens)
        sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        with self._base():
            # Of the model inside: an engine of one with adapters would merge them.
            engine = EmbeddedEngine(causal_lm(self._model), self._tokenizer, RolloutSettings())
            rollouts = iter(engine.generate(list(asked.values()), sampling))
        return [
            next(rollouts).completions[0].text if i in asked else Failure("refused", _UNASKED)
            for i in range(len(conversations))
        ]

    def _base(self) -> AbstractContextManager[None]:
        return adapters_disabled(self._model) if has_adapters(self._model) else nullcontext()

    def _prompts(self, conversations: Sequence[Conversation], *, room: int) -> dict[int, Prompt]:
        """By index, those that the template takes and that leave room for the answer."""
        rendered = {}
        for i, conversation in enumerate(conversations):
            try:
                rendered[i] = self._render(list(conversation))
            except BadRow:
                continue
        encoded = self._render.encode(list(rendered.values()))
        limit = causal_lm(self._model).config.get_text_config().max_position_embeddings - room
        return {
            i: Prompt(ids, "", index=i)
            for i, ids in zip(rendered, encoded, strict=True)
            if len(ids) <= limit and max(ids) < self._num_rows
        }

    def _first_tokens(self, choices: Sequence[str]) -> list[int]:
        tokens = [self._tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
        if len(set(tokens)) < len(tokens):
            raise ConfigError(
                f"choices must begin with different tokens, and two of {', '.join(choices)} do not in this tokenizer"
            )
        return tokens

    def _score(self, groups: Sequence[Rollout]) -> list[tuple[float, ...]]:
        device = next(self._model.parameters()).device
        found: list[list[float]] = [[0.0] * len(group.completions) for group in groups]
        was_training = self._policy.training
        self._policy.eval()
        try:
            with torch.no_grad(), self._base():
                for pack in pack_rollouts(groups, budget=self._budget):
                    moved = pack.to(device)
                    logprobs = self._policy(moved.tokens, moved.segments, moved.completion_mask).logprobs.tolist()
                    for place in pack.completion_mask.nonzero()[:, 0].tolist():
                        group, choice = divmod(int(pack.segments.sequence_of_token[place]), len(groups[0].completions))
                        found[group][choice] = logprobs[place]
        finally:
            self._policy.train(was_training)
        return [tuple(row) for row in found]


def check_chats(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise if a judge cannot be asked in chats.

    Args:
        rows: of the judge's embedding table.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that writes tokens without an embedding.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "a judge is asked in chats, and its tokenizer has no chat template; name an instruct model (judge.name)"
        )
    render = PromptRenderer(RenderSettings(), tokenizer)
    try:
        text = render([{"role": "user", "content": "1"}])
    except BadRow:
        return  # each question is rendered, and refused, by itself
    check_ids([render.encode([text])], {"the judge": rows}, tokenizer, what="a question to the judge: question")


def default_device() -> str:
    """Where a judge is computed that has no policy beside it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_local(
    settings: ModelJudge, policy: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None
) -> LocalChatModel:
    """The model that the settings name; without a name, the policy's base.

    Raises:
        ConfigError: no name is given, and there is no policy.
    """
    if settings.name is None:
        if policy is None or tokenizer is None:
            raise ConfigError("judge.name is not given, and there is no policy whose base could judge; give judge.name")
        return LocalChatModel(policy, tokenizer, tokens_per_batch=settings.tokens_per_batch)
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    device = next(policy.parameters()).device if policy is not None else torch.device(default_device())
    model = load_model(settings.name, dtype=dtype, device=device)
    if isinstance(model, PeftModel):  # trained to judge: here the adapter is meant
        model = model.merge_and_unload()
    model.requires_grad_(False).eval()
    return LocalChatModel(model, load_tokenizer(settings.name), tokens_per_batch=settings.tokens_per_batch)
