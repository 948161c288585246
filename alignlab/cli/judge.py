"""Measure a run's judge on pairs whose better completion is known, before a policy learns from it.

The pairs are rows of prompt, chosen and rejected; by default, correct answers of a task and those of other questions.
The last line of standard output is the result as JSON. With --write-examples no judge is asked: the questions are
written with their correct answers, as supervised data (trainer.type sft) to train a judge.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from alignlab.cli.places import new_file
from alignlab.cli.train import add_config_arguments
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.config.run import RunConfig
    from alignlab.scoring.judges.judge import Judge
    from alignlab.synthesis.judge_examples import KnownPair

NAME = "judge"
SUMMARY = "measure a judge: accuracy, agreement with itself, preference for the first answer"
EXAMPLE = "alignlab judge configs/rlaif_smollm2_cpu.yaml --num-pairs 60"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--pairs", metavar="FILE", help="rows of prompt, chosen, rejected; default: the config's task")
    parser.add_argument("--num-pairs", type=int, metavar="N", help="number of pairs; default: all")
    parser.add_argument("--held-out", action="store_true", help="for a task: questions that training never sees")
    parser.add_argument("--num-wrong", type=int, default=1, metavar="N", help="for a task: wrong answers a question")
    parser.add_argument(
        "--answer-template", metavar="TEXT", action="append", help="for a task: text with {answer} in it; repeatable"
    )
    parser.add_argument("--write-examples", metavar="FILE", help="write JSONL to train a judge, and ask no judge")
    parser.add_argument(
        "--kind", choices=("both", "comparisons", "ratings"), default="both", help="kind of the examples"
    )
    parser.add_argument(
        "--reason", metavar="TEXT",
        help="for examples with judge.answers sampled: text before the choice; {answer} is the correct answer",
    )


def run(args: argparse.Namespace) -> int:
    """Measure the judge, or write examples."""
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.overrides)
    feedback(config)
    for name in ("num_pairs", "num_wrong"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, and must be at least 1; use 1 or more")
    check_unread(args)
    check_reason(args, feedback(config).judge)
    pairs = load_pairs(args) if args.pairs is not None else task_pairs(config, args)
    if args.write_examples is not None:
        path = new_file(args.write_examples, "--write-examples")
        write_examples(config, pairs[: args.num_pairs], path, args.kind)
        return 0
    print(json.dumps(ask(config, pairs[: args.num_pairs])), flush=True)
    return 0


def check_unread(args: argparse.Namespace) -> None:
    """Raise if a flag would be ignored.

    Raises:
        ConfigError: with the fix.
    """
    of_tasks = {
        "--held-out": args.held_out, "--num-wrong": args.num_wrong != 1, "--answer-template": args.answer_template,
    }  # fmt: skip
    for flag, is_given in of_tasks.items():
        if is_given and args.pairs is not None:
            raise ConfigError(f"{flag} is about the questions of a task, and --pairs names other pairs; leave one out")
    if args.kind != "both" and args.write_examples is None:
        raise ConfigError(f"--kind is {args.kind}, and goes with --write-examples; leave it out, or add that")


def check_reason(args: argparse.Namespace, judge: Any) -> None:
    """Raise if --reason would be ignored, or does not contain the answer.

    Raises:
        ConfigError: with the fix.
    """
    if args.reason is None:
        return
    if args.write_examples is None or judge.backend == "reward_model" or judge.answers != "sampled":
        raise ConfigError(
            f"--reason is {args.reason!r}, and goes with --write-examples and a judge that writes before it chooses; "
            "leave it out, or set trainer.judge.answers=sampled"
        )
    if "{answer}" not in args.reason:
        raise ConfigError(f"--reason is {args.reason!r}, and must contain {{answer}}; put it in")


def reason_for(args: argparse.Namespace, answer: str) -> str:
    """Return the reason for a pair with this correct answer."""
    return "" if args.reason is None else str(args.reason).replace("{answer}", answer)


def load_pairs(args: argparse.Namespace) -> list[KnownPair]:
    """Return the pairs in the rows of a file.

    Raises:
        DataError: there is no row, or a row has no prompt, chosen or rejected that is a text or a chat.
    """
    from alignlab.config.data import DataSettings
    from alignlab.data.bad_row import BadRow, without_value
    from alignlab.data.chat.from_text import with_chats
    from alignlab.data.messages import check_text
    from alignlab.data.notices import Notices
    from alignlab.data.rows import check_text_sizes, plain_row
    from alignlab.data.sources import load_rows
    from alignlab.errors import DataError
    from alignlab.synthesis.judge_examples import KnownPair
    from alignlab.types import message_text

    pairs = []
    notices = Notices(args.pairs)
    for index, raw_row in enumerate(load_rows(DataSettings(path=args.pairs))):
        try:
            plain = plain_row(raw_row)
            check_text_sizes(plain, "prompt")
            row = with_chats(plain, "prompt", notices.of_row(index))
            for name in ("prompt", "chosen", "rejected"):
                if row.get(name) is None:
                    raise without_value(row, name)
                row[name] = check_text(row[name], name)
        except BadRow as error:
            raise DataError(f"{args.pairs}: row {index} (the first is 0) {error}; correct it, or remove it") from error
        chosen = message_text(row["chosen"])
        pairs.append(KnownPair(row["prompt"], chosen, message_text(row["rejected"]), reason_for(args, chosen)))
    if not pairs:
        raise DataError(f"{args.pairs} must have a pair to judge, and has no row; give another file")
    return pairs


def task_pairs(config: RunConfig, args: argparse.Namespace) -> list[KnownPair]:
    """Return pairs of a correct and a wrong answer of the config's task, in each of the templates.

    Raises:
        ConfigError: there is no task, or a template has no place for the answer.
    """
    from alignlab.data.preferences import right_and_wrong
    from alignlab.data.sources import load_rows
    from alignlab.synthesis.judge_examples import KnownPair

    data = config.evaluation_data if args.held_out else config.data
    if data is None or data.task is None:
        raise ConfigError("the config's data are prompts without pairs to judge; give --pairs FILE")
    templates = args.answer_template or ["{answer}"]
    unfit = [template for template in templates if "{answer}" not in template]
    if unfit:
        raise ConfigError(f"--answer-template is {unfit[0]!r}, and must contain {{answer}}; put it in")
    return [
        KnownPair(
            row["prompt"],
            better=template.replace("{answer}", row["chosen"]),
            worse=template.replace("{answer}", row["rejected"]),
            reason=reason_for(args, row["chosen"]),
        )
        for row in right_and_wrong(load_rows(data), num_wrong=args.num_wrong)
        for template in templates
    ]


def feedback(config: RunConfig) -> Any:
    """Return the trainer's section of RLAIF.

    Raises:
        ConfigError: the config has another trainer.
    """
    from alignlab.config.trainers import RLAIFConfig

    if not isinstance(config.trainer, RLAIFConfig):
        kind = config.trainer.type
        raise ConfigError(f"trainer.type is {kind}, and must be rlaif to have a judge; give another CONFIG")
    return config.trainer


def write_examples(config: RunConfig, pairs: list[KnownPair], path: Path, kind: str) -> None:
    """Write the questions with their correct answers."""
    from alignlab.config.judge import load_constitution
    from alignlab.runs.journal import write_rows
    from alignlab.synthesis.judge_examples import comparisons, rated

    trainer = feedback(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if trainer.judge.backend == "reward_model":
        raise ConfigError("judge.backend is reward_model, which is asked no question; train one by trainer.type reward")
    constitution = load_constitution(trainer.constitution)
    rows = [] if kind == "ratings" else list(comparisons(constitution, pairs, trainer.judge))
    rows += [] if kind == "comparisons" else rated(constitution, pairs, trainer.judge)
    write_rows(path, rows)
    print(f"alignlab judge: wrote {len(rows)} questions about {len(pairs)} pairs to {path}", file=sys.stderr)


def ask(config: RunConfig, pairs: list[KnownPair]) -> dict[str, Any]:
    """Return the measurements of the judge, and show them as a table on standard error."""
    from rich.console import Console
    from rich.table import Table

    judge = judge_of(config)
    metrics = measure(judge, pairs) | {name: count for name, count in sorted(judge.counts.items()) if count}
    table = Table(title=f"judge of {config.trainer.output_dir}", title_justify="left", show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console(stderr=True).print(table)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in metrics.items()}


def judge_of(config: RunConfig) -> Judge:
    """Return the judge that the run would ask."""
    import torch

    from alignlab.config.judge import load_constitution
    from alignlab.scoring.judges.local import default_device
    from alignlab.scoring.judges.make_judge import make_judge, shares_base
    from alignlab.starting_model import make_model, make_tokenizer, model_dtype

    trainer = feedback(config)
    policy = tokenizer = None
    if shares_base(trainer.judge):
        tokenizer = make_tokenizer(config)
        policy = make_model(config.model, tokenizer, model_dtype(config.model))
        torch.nn.Module.to(policy, default_device())
    constitution = load_constitution(trainer.constitution)
    return make_judge(trainer.judge, constitution, policy=policy, tokenizer=tokenizer, seed=trainer.seed)


def measure(judge: Judge, pairs: list[KnownPair]) -> dict[str, Any]:
    """Return the judge's accuracy (ties count one half), its confidence, and its preference for the first place."""
    from alignlab.synthesis.labels import position_bias

    verdicts = judge.compare([(pair.prompt, pair.better, pair.worse) for pair in pairs])
    probabilities = [verdict.probability for verdict in verdicts if verdict.probability is not None]
    good = judge.rate([(pair.prompt, pair.better) for pair in pairs])
    bad = judge.rate([(pair.prompt, pair.worse) for pair in pairs])
    leads = [g - b for g, b in zip(good, bad, strict=True) if g is not None and b is not None]
    agreement, first_rate = position_bias(verdicts)
    return {
        "num_pairs": len(pairs),
        "accuracy": right_rate([p - 0.5 for p in probabilities]),
        "rating_accuracy": right_rate(leads),
        "confidence": fmean(max(p, 1 - p) for p in probabilities) if probabilities else None,
        "agreement": agreement,
        "first_rate": first_rate,
    }


def right_rate(leads: list[float]) -> float | None:
    """Return the fraction of leads above 0, ties as one half; None without any."""
    return fmean(0.5 if lead == 0 else float(lead > 0) for lead in leads) if leads else None
