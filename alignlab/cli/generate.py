"""Complete a prompt, and write the text to standard output as it is generated.

The prompt is a user's message if the tokenizer has a chat template, and plain text otherwise or with --plain.
"""

from __future__ import annotations

import argparse
from datetime import date
from typing import TYPE_CHECKING, Any

from alignlab.cli.beams import add_beam_arguments, beam_params, print_beams
from alignlab.cli.policy import add_policy_arguments, add_sampling_arguments, load_policy, sampling_settings
from alignlab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.data import RenderSettings
    from alignlab.config.rollout import SamplingSettings, SpeculationSettings
    from alignlab.types import Prompt

NAME = "generate"
SUMMARY = "complete a prompt, streaming the text"
EXAMPLE = 'alignlab generate smollm2-135m-instruct "What is 2 + 3?" --temperature 0 --max-new-tokens 32'
MAX_NEW_TOKENS = 256
_JSON_NAMES = {list: "list", dict: "object"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder of a model or an adapter, a packaged model")
    parser.add_argument("prompt", metavar="PROMPT")
    add_policy_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--begin-with", metavar="TEXT", help="text that every completion begins with")
    add_beam_arguments(parser)
    parser.add_argument(
        "--speculate", metavar="WITH",
        help="guess tokens to be faster, with the same text: ngram, what followed before, or a smaller model of the "
        "same tokenizer",
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling; the same seed gives the same text")
    parser.add_argument("--system-prompt", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--prompt-template", metavar="TEXT", help="text with {prompt} in it, put around the prompt")
    parser.add_argument("--plain", action="store_true", help="do not use the chat template")
    parser.add_argument("--tools", metavar="JSON", help="tools for the chat template, a list of schemas")
    parser.add_argument(
        "--chat-template-kwargs", metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false}',
    )
    parser.add_argument("--template-date", metavar="DAY", help="today's date in the chat template, such as 2026-11-30")
    parser.add_argument("--escape-special-tokens", action="store_true", help="read special tokens in PROMPT as text")


def run(args: argparse.Namespace) -> int:
    """Write one completion as it is generated."""
    sampling = sampling_settings(args, max_new_tokens=MAX_NEW_TOKENS)
    beams = beam_params(args, max_new_tokens=sampling.max_new_tokens)

    from alignlab.config.data import RenderSettings, SettingNames
    from alignlab.config.rollout import RolloutSettings
    from alignlab.rollout.embedded.engine import EmbeddedEngine

    if not args.prompt.strip():
        raise ConfigError(f"PROMPT is empty, and must be a text to complete; write it in quotes, such as {EXAMPLE}")
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise ConfigError("PROMPT must be text, and has bytes that are none in the terminal's encoding; write UTF-8")
    model, tokenizer = load_policy(args.model, args.adapter, args.dtype)
    limit = getattr(model.config, "max_position_embeddings", None) or RenderSettings().max_prompt_tokens
    settings = RenderSettings(
        chat=False if args.plain else None,
        system_prompt=args.system_prompt,
        prompt_template=args.prompt_template,
        max_prompt_tokens=limit,
        escape_special_tokens=args.escape_special_tokens,
        **template_settings(args),
    ).named(SettingNames("the prompt", _flag))
    prompt = rendered(args.prompt, settings, tokenizer)
    if args.begin_with is not None:
        sampling = beginning_with(args.begin_with, sampling, tokenizer)
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings(speculation=speculation_of(args.speculate)))
    if beams is not None:
        print_beams(engine.beam_search([prompt], beams)[0])
        return 0
    for text in engine.stream(prompt, sampling.params(n=1, seed=args.seed)):
        print(text, end="", flush=True)
    print(flush=True)
    return 0


def speculation_of(source: str | None) -> SpeculationSettings | None:
    """Return the settings of --speculate."""
    from alignlab.config.rollout import DraftModelSettings, NgramSettings

    if source is None:
        return None
    return NgramSettings() if source == "ngram" else DraftModelSettings(model=source)


def beginning_with(text: str, sampling: SamplingSettings, tokenizer: PreTrainedTokenizerBase) -> SamplingSettings:
    """Return settings under which a completion begins with a text.

    Raises:
        ConfigError: the text has no tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"--begin-with is {text!r}, and must have a token; leave it out")
    return sampling.model_copy(update={"forced_tokens": dict(enumerate(ids))})


def rendered(text: str, settings: RenderSettings, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the tokens of a prompt.

    Raises:
        ConfigError, DataError: the flags contradict each other or the tokenizer, or the prompt cannot be rendered.
    """
    from alignlab.data.bad_row import BadRow
    from alignlab.data.rendering import PromptRenderer
    from alignlab.types import Prompt

    render = PromptRenderer(settings, tokenizer)
    try:
        [token_ids] = render.encode([render(text)])
        if len(token_ids) >= settings.max_prompt_tokens:
            raise BadRow(
                "too_long",
                f"has {len(token_ids)} tokens, and must have fewer than the model's {settings.max_prompt_tokens} "
                "positions; shorten it",
            )
        render.check_length(token_ids)
    except BadRow as error:
        raise DataError(f"the prompt {error}") from error
    return Prompt(token_ids, text)


def _flag(setting: str, value: str | bool | None) -> str:
    """Return the flag of a field of `RenderSettings`, with a value where one is advised."""
    if setting == "chat":
        return "--plain"
    flag = f"--{setting.replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {value}"


def template_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of the chat template as fields of `RenderSettings`.

    Raises:
        ConfigError: a flag's JSON or date cannot be read.
    """
    from alignlab.data.nesting import parse_json

    settings: dict[str, Any] = {}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        text = getattr(args, name)
        if text is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        try:
            settings[name] = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"{flag} must be JSON, and is {text[:200]!r}: {error}; correct it") from None
        if not isinstance(settings[name], kind):
            raise ConfigError(f"{flag} must be a JSON {_JSON_NAMES[kind]}, and is {text[:200]!r}; correct it")
    if args.template_date is not None:
        try:
            settings["template_date"] = date.fromisoformat(args.template_date)
        except ValueError as error:
            raise ConfigError(f"--template-date must be a day, such as 2026-11-30: {error}; correct it") from error
    return settings
