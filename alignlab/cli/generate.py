"""Write a completion of a prompt, token by token, to standard output.

The prompt is a user's message where the tokenizer has a chat template, plain text elsewhere or with --plain.
"""

from __future__ import annotations

import argparse

from alignlab.cli.policy import add_policy_arguments, add_sampling_arguments, load_policy, sampling_settings

NAME = "generate"
SUMMARY = "complete a prompt, streaming the text"
EXAMPLE = 'alignlab generate smollm2-135m-instruct "What is 2 + 3?" --temperature 0 --max-new-tokens 32'
MAX_NEW_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a folder of a model or an adapter, a packaged model")
    parser.add_argument("prompt", metavar="PROMPT")
    add_policy_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--system-prompt", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--prompt-template", metavar="TEXT", help="text with {prompt} in it, put around the prompt")
    parser.add_argument("--plain", action="store_true", help="no chat template")


def run(args: argparse.Namespace) -> int:
    """Stream one completion."""
    sampling = sampling_settings(args, max_new_tokens=MAX_NEW_TOKENS)

    from alignlab.config.render import RenderSettings
    from alignlab.config.rollout import RolloutSettings
    from alignlab.data.prompts import prompts_from_rows
    from alignlab.rollout.engine import EmbeddedEngine

    model, tokenizer = load_policy(args.model, args.adapter, args.dtype)
    limit = getattr(model.config, "max_position_embeddings", None) or RenderSettings().max_prompt_tokens
    settings = RenderSettings(
        chat=False if args.plain else None,
        system_prompt=args.system_prompt,
        prompt_template=args.prompt_template,
        max_prompt_tokens=limit,
    )
    [prompt] = prompts_from_rows([{"prompt": args.prompt}], settings, tokenizer)
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings())
    for text in engine.stream(prompt, sampling.params(n=1, seed=args.seed)):
        print(text, end="", flush=True)
    print(flush=True)
    return 0
