"""Supervised examples: token ids, and a mask of those that are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from numbers import Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.bad_row import BadRow, check_characters
from alignlab.data.chat.thoughts import THOUGHT_FIELDS
from alignlab.data.dataset import Dataset, dataset_from_rows
from alignlab.data.messages import check_text, is_taught
from alignlab.data.prompts import chat_of, split_row
from alignlab.data.rendering import PromptRenderer
from alignlab.data.rows import scalar
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError
from alignlab.types import Message, Text, TokenSequences


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    Attributes:
        token_ids: the whole sequence, at least one token.
        completion_mask: True on the tokens that are trained on ("taught"). The first token never is, because no token
            before it predicts it.
    """

    token_ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.completion_mask) >= 1
        assert not self.completion_mask[0], "the first token of a sequence has no predecessor"

    @property
    def sequences(self) -> TokenSequences:
        """The example's token ids as its only sequence."""
        return (self.token_ids,)

    @property
    def labels(self) -> tuple[float, ...]:
        """1 for each token that is trained on, 0 for the others."""
        return tuple(map(float, self.completion_mask))


@dataclass(frozen=True)
class _Piece:
    """A part of a rendered example, whose tokens are all trained on or not.

    Attributes:
        text: the rendered text.
        taught: True if it is trained on.
    """

    text: str
    taught: bool


def load_examples(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer_column: str = "answer",
    answer_template: str = "{answer}",
) -> Dataset[Example]:
    """Return the examples of a source; see `examples_from_rows`."""
    return examples_from_rows(
        load_rows(settings), settings.rendering, tokenizer, answer_column=answer_column,
        answer_template=answer_template,
    )


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]],
    settings: RenderSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer_column: str = "answer",
    answer_template: str = "{answer}",
) -> Dataset[Example]:
    """Render and tokenise rows of one of three forms.

    - `messages` without a prompt; or a prompt that is a chat with its answer, without another answer: the assistant's
      messages are trained on; see `RenderSettings.taught_turns`.
    - a prompt and `completion` (TRL's form; a string, or chat messages): the completion is trained on.
    - a prompt and `answer_column`: `answer_template`, with the answer in place of `{answer}`, is trained on.

    The chat template reads the columns `tools` and `chat_template_kwargs`. The prompt is rendered as for rollouts, so
    that the completion follows exactly the tokens that rollouts start from.
    The end-of-sequence token closes each example, once, and is trained on.

    Raises:
        ConfigError: the settings contradict each other or the tokenizer.
        DataError: a row cannot be used (with its number), or no row can. One reason is a chat template that renders
            the beginning of a conversation differently once the assistant's message follows.
    """
    if "{answer}" not in answer_template:
        raise ConfigError(f"answer_template must contain {{answer}}, and is {answer_template!r}; add it")
    if tokenizer.eos_token_id is None:
        raise ConfigError("supervised examples end with the tokenizer's eos token, and it has none; set eos_token")

    def make_examples(row: Mapping[str, Any], render: PromptRenderer) -> list[Example]:
        return [_example(pieces, render) for pieces in _examples_of(row, render, answer_column, answer_template)]

    return dataset_from_rows(rows, settings, tokenizer, make_examples)


def completion_example(prompt: Text, completion: Text, render: PromptRenderer) -> Example:
    """Return the example of a prompt and a completion, closed by the end-of-sequence token.

    Raises:
        BadRow: the two cannot be rendered without a loss, or not be cut apart.
    """
    return _example(_cut_after(prompt, completion, render, "compared")[0], render)


def _examples_of(
    row: Mapping[str, Any], render: PromptRenderer, answer_column: str, answer_template: str
) -> list[list[_Piece]]:
    """Return the pieces of each example of a row."""
    turns, name = render.settings.taught_turns, render.settings.prompt_column
    messages = _conversation(row, name, answer_column)
    if messages is not None:
        return _chat_pieces(render.messages(messages), render, 0, turns)
    prompt, columns = split_row(row, name)
    _say_thought(columns, render)
    return _cut_after(prompt, _completion(columns, answer_column, answer_template), render, turns)


def _conversation(row: Mapping[str, Any], prompt_column: str, answer_column: str) -> list[Message] | None:
    """Return the messages of a row that holds a whole conversation; None for a row of a prompt and a completion.

    A conversation is the column `messages` of a row without a prompt; or a prompt that ends with the assistant's
    message, in a row without another completion.
    """
    has_prompt = row.get(prompt_column) is not None
    column = prompt_column if has_prompt else "messages"
    if row.get(column) is None:
        return None
    is_completed = any(row.get(name) is not None for name in ("completion", answer_column))
    if has_prompt and (is_completed or isinstance(row[column], str)):
        return None
    messages = chat_of(row[column], column)
    return None if has_prompt and messages[-1]["role"] != "assistant" else messages


def _cut_after(prompt: Text, completion: Text, render: PromptRenderer, turns: str) -> list[list[_Piece]]:
    if render.chat:
        before = render.messages(prompt)
        system, after = _without_prompt(prompt, completion)
        if system:  # the system message of a conversation replaces that of the settings
            before = [*system, *(before[1:] if before[0]["role"] == "system" else before)]
        if before[-1]["role"] == after[0]["role"] == "assistant":
            return [_continued_pieces(before, after, render)]
        return _chat_pieces([*before, *after], render, len(before), turns)
    if not isinstance(completion, str):
        raise BadRow("wrong_type", "has chat messages in the column 'completion', and prompts are plain here")
    return [[_Piece(render(prompt), False), _Piece(render.plain_completion(completion), True)]]


def _without_prompt(prompt: Text, completion: Text) -> tuple[list[Message], list[Message]]:
    """Return the system message at the start of a completion, if any, and the messages after the prompt.

    A completion may be a whole conversation, as in TRL's datasets. Then it must begin with the prompt, apart from white
    space, and from a system message, which a prompt that is a text cannot have.

    Raises:
        BadRow: the completion begins with other messages, or nothing follows the prompt.
    """
    if isinstance(completion, str):
        return [], [{"role": "assistant", "content": completion}]
    prompt_messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    first = completion[0]["role"]
    num_system = int(first == "system" != prompt_messages[0]["role"])
    system, messages = list(completion[:num_system]), list(completion[num_system:])
    if len(messages) >= len(prompt_messages) and all(map(_same_message, prompt_messages, messages)):
        if len(messages) == len(prompt_messages):
            raise BadRow("empty", "has nothing in a completion after the prompt")
        return system, messages[len(prompt_messages) :]
    if first == "system" or first == prompt_messages[-1]["role"] == "user":
        raise BadRow(
            "other_prompt",
            f"has a completion that begins with the {first}'s message, and not with the prompt; give what follows "
            "the prompt, or the whole conversation",
        )
    return [], messages


def _same_message(first: Message, second: Message) -> bool:
    """Return True if two messages are equal apart from white space."""
    words, other_words = ({**message, "content": str(message["content"]).split()} for message in (first, second))
    return words == other_words


def _continued_pieces(before: Sequence[Message], after: Sequence[Message], render: PromptRenderer) -> list[_Piece]:
    """Return the pieces of a chat whose completion continues the prompt's last message, the assistant's."""
    if len(after) > 1 or set(after[0]) > {"role", "content"}:
        raise BadRow(
            "wrong_type", "has a prompt that ends with the assistant's message, which a single text must continue"
        )
    _check_not_blank(after[0])
    start = render.render_chat(render.lossless(before))
    joined = [*before[:-1], {**before[-1], "content": before[-1]["content"] + after[0]["content"]}]
    through = render.render_chat(render.lossless(joined, taught=[len(joined) - 1]), generation=False)
    if not through.startswith(start):
        raise BadRow(
            "unstable_template",
            "is rendered by the chat template so that the assistant's begun message changes once more follows; give a "
            "prompt that ends with the user's, or another template",
        )
    turn = through[len(start) :].rstrip()
    render.check_taught([*before, *after], len(before), turn)
    return [_Piece(start, False), _Piece(turn, True)]


def _check_not_blank(message: Message) -> None:
    """Raise if a message to train on is empty; one that only calls tools is not."""
    if not message["content"].strip() and set(message) <= {"role", "content"}:
        raise BadRow("empty", "has an empty message of the assistant's where one is taught")


def _say_thought(columns: Mapping[str, Any], render: PromptRenderer) -> None:
    """Log once that a column of thoughts beside the completion is not trained on."""
    name = next((name for name in THOUGHT_FIELDS if columns.get(name) is not None), None)
    if name is not None:
        render.notices.say(
            "unread thought",
            "the column %r is not taught; to teach it, write it into the completion, as this field of the assistant's "
            "message or between <think> and </think>", name,
        )  # fmt: skip


def _completion(columns: Mapping[str, Any], answer_column: str, answer_template: str) -> Text:
    if columns.get("completion") is not None:
        return check_text(columns["completion"], "completion")
    answer = scalar(columns.get(answer_column))
    if answer is None:
        raise BadRow("missing_column", f"has no column 'completion' and no column {answer_column!r}")
    if not isinstance(answer, str | Real | Decimal | date):
        raise BadRow(
            "wrong_type",
            f"has {type(answer).__name__} in the column {answer_column!r}, of which no text can be taught but Python's "
            "own notation; write the answer as text, or call the column completion and give chat messages",
        )
    if not str(answer).strip():
        raise BadRow("empty", f"has an empty string in the column {answer_column!r}")
    check_characters(answer, answer_column)
    return answer_template.replace("{answer}", str(answer))


def _chat_pieces(
    messages: Sequence[Message], render: PromptRenderer, first_taught: int, turns: str
) -> list[list[_Piece]]:
    """Return the pieces of each example of a chat; the assistant's turns from message `first_taught` on are taught.

    A turn is the text that the template adds for a message to the text that a rollout would start from, without white
    space at its end.

    Args:
        turns: see `RenderSettings.taught_turns`; or "compared", like "together", for completions to compare.
    """
    candidates = range(first_taught, len(messages))
    taught = [i for i in candidates if messages[i]["role"] == "assistant" and is_taught(messages[i])]
    if not taught:
        raise BadRow("empty", "has no message of the assistant's that is taught, so there is nothing to teach")
    if taught[0] == 0:
        raise BadRow("empty", "begins with the assistant's message, and has no prompt before it")
    for i in taught:
        _check_not_blank(messages[i])
    if turns in ("separately", "last"):
        chosen = taught if turns == "separately" else taught[-1:]
        return [_turns(messages[: i + 1], [i], render, turns) for i in chosen]
    return [_turns(messages, taught, render, turns)]


def _turns(messages: Sequence[Message], taught: Sequence[int], render: PromptRenderer, turns: str) -> list[_Piece]:
    """Return the pieces of a rendered chat, cut at the beginning and the end of each taught turn."""
    form = render.lossless(messages, taught=taught)
    pieces: list[_Piece] = []
    done = ""
    for i in taught:
        before = render.render_chat(form[:i], continue_last=False)
        through = render.render_chat(form[: i + 1], generation=False)
        if not before.startswith(done) or not through.startswith(before):
            raise BadRow("unstable_template", _unstable(i, render, turns if pieces else "one"))
        turn = _closed_once(through[len(before) :].rstrip(), render)
        render.check_taught(messages, i, turn)
        pieces += [_Piece(before[len(done) :], False), _Piece(turn, True)]
        done = before + turn
    return pieces


def _closed_once(turn: str, render: PromptRenderer) -> str:
    """Return a turn with a single end token, which both the row's text and the template may have written."""
    eos = render.tokenizer.eos_token
    while turn.endswith(eos * 2):
        turn = turn.removesuffix(eos)
    return turn


def _unstable(index: int, render: PromptRenderer, turns: str) -> str:
    """Return the message for a template that renders a conversation's beginning differently once more follows."""
    setting = render.settings.setting
    if turns == "together":
        fix = (
            f"set {setting('taught_turns', 'separately')} to teach each turn after the history as it is then, or "
            f"{setting('taught_turns', 'last')} to teach the last one alone"
        )
    elif turns == "compared":
        fix = "put all but the last turn of the completion into the prompt"
    else:
        fix = (
            "where the generation prompt begins a thought, give an answer that begins with one, turn the thought off "
            f"by {setting('chat_template_kwargs')}, or use a tokenizer with another template"
        )
    return (
        f"is rendered by the chat template so that the text before message {index} changes once the message follows, "
        f"and what the assistant wrote cannot be told apart; {fix}"
    )


def _example(pieces: Sequence[_Piece], render: PromptRenderer) -> Example:
    eos = render.tokenizer.eos_token_id
    ids: list[int] = []
    mask: list[bool] = []
    text = ""
    for piece in pieces:
        if not piece.text:
            continue
        text += piece.text
        added = _continuation(ids, text, piece.text, render)
        if piece.taught and True not in mask:
            render.check_length(ids)
        ids += added
        mask += [piece.taught] * len(added)
    if ids[-1] != eos or not mask[-1]:
        ids.append(eos)
        mask.append(True)
    mask[0] = False
    return Example(tuple(ids), tuple(mask))


def _continuation(ids: Sequence[int], whole: str, piece: str, render: PromptRenderer) -> list[int]:
    """Return the tokens of `piece`, the end of the text `whole`, after the tokens `ids` of its beginning.

    They are the last tokens of the whole text, unless one of its tokens crosses the boundary, which is impossible after
    a rollout's prompt; then the piece is tokenised alone.
    """
    together = list(render.encode([whole])[0])
    if together[: len(ids)] == list(ids) and len(together) > len(ids):
        return together[len(ids) :]
    alone = render.encode_alone(piece)
    if render.tokenizer.decode([*ids, *alone]) != render.tokenizer.decode(together):
        raise BadRow(
            "wrong_type", f"has a text that the tokenizer cannot cut before {piece[:40]!r} without changing it"
        )
    return alone
