"""Measure the accuracy of a model, or of several side by side, on held-out problems.

Accuracy is reported greedy, sampled, and as pass@k by the unbiased estimator, each with its 95 % interval. The problems
are a config's evaluation data, or those of a reasoning_gym task that training never sees. The last line of standard
output is the result as JSON.

A MODEL is a Hub id, a packaged model, or the folder of a model, an adapter or a run; LABEL=MODEL gives it a name.
Several models are loaded one after the other, in one dtype, and get the same problems and seeds, each rendered by its
own tokenizer. Each is compared with the first; statistical tests over the problems show which differences exceed
chance. Ctrl-C reports what is measured by then.

--strategy asks what more samples are worth. --num-samples samples of each problem are drawn once (and kept by --pool),
and accuracy is computed for --pass-at of them, with an oracle line (pass@k) and the sampled tokens as the cost:

  majority                       the answer that most samples give, as the scorer's read_answer reads it
  weighted:weight=NAME           votes weighted by a reward, or by the model's own log-probs (logprob, the default)
  best_of_n:reward=NAME          the best sample by a reward plug-in, a reward model's folder, judge, or logprob
  confidence:window=16           weighted votes; unsure samples, and sampling itself, are stopped early (DeepConf)
  adaptive:start=4               more samples for problems on whose first samples the answers disagree
  calibrated:held_out_frac=0.5   the share of votes as a confidence: temperature, calibration error before and after
  budget:budgets=[64,256],waits=1,end=</think>   thinking that is cut, or drawn out by "Wait" (budget forcing)
  augment:templates=forms.txt    votes over several forms of the prompt, a line each with {prompt} in it

  alignlab eval before=smollm2-135m-instruct after=runs/mine --config configs/grpo_smollm2_cpu.yaml --num-samples 32
      --strategy majority --strategy best_of_n:reward=logprob --pool runs/pools --plot scaling.png
  alignlab eval smollm2-135m-instruct --task chain_sum --num-samples 8 --strategy 'budget:budgets=[32,128],waits=2'

--perplexity FILE measures the likelihood of given texts, by token, word and byte, and the next token's calibration:

  alignlab eval before=smollm2-135m-instruct after=runs/mine --perplexity book.txt --window 1024 --stride 512
  alignlab eval smollm2-135m-instruct --perplexity rows.jsonl --calibrate held_out.jsonl --plot reliability.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.candidates import Candidate, candidates_of
from alignlab.cli.evaluation_plan import Plan, plan_of_config, plan_of_task
from alignlab.cli.perplexity import add_perplexity_arguments, check_perplexity_arguments, measure_texts
from alignlab.cli.policy import (
    add_policy_arguments,
    add_sampling_arguments,
    load_policy,
    resolved_dtype,
)
from alignlab.cli.strategies import add_strategy_arguments, measure_models
from alignlab.errors import AlignlabError, ConfigError, DataError, RolloutError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.evaluation.comparison import MeasuredPolicy
    from alignlab.evaluation.results import EvaluationResult
    from alignlab.models.hub.export import Model
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt

NAME = "eval"
SUMMARY = "accuracy on held-out problems, of one model or several side by side"
EXAMPLE = (
    "alignlab eval before=smollm2-135m-instruct after=runs/grpo_smollm2_cpu "
    "--config configs/grpo_smollm2_cpu.yaml --num-samples 8 --pass-at 1 8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("models", metavar="MODEL", nargs="*", help="default: the config's model, or the adapter's base")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="CONFIG", help="config of a run, whose evaluation is done")
    source.add_argument("--task", metavar="NAME", help="a reasoning_gym task, such as chain_sum")
    source.add_argument("--perplexity", metavar="FILE", help="texts, or rows of text, or of prompt and completion")
    add_policy_arguments(parser)
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="override of a setting; repeatable"
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="system message, for --task")
    ways = ("last_number", "tagged", "whole")
    parser.add_argument("--extract", choices=ways, help="for --task: part of the text that is the answer")
    parser.add_argument("--num-problems", type=int, metavar="N", help="number of problems; default: all")
    parser.add_argument("--num-samples", type=int, metavar="N", help="sampled completions a problem")
    parser.add_argument("--pass-at", type=int, metavar="K", nargs="+", help="values of k for pass@k and strategies")
    parser.add_argument("--seed", type=int, help="seed of the sampled completions")
    shown = "show the completions of N problems; with several models, of N problems on which they differ"
    parser.add_argument("--show", type=int, metavar="N", default=0, help=shown)
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the models, strategies or calibration")
    add_strategy_arguments(parser)
    add_perplexity_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    check_arguments(args)
    if args.perplexity is not None:
        measure_texts(named_candidates(args, None), args)
        return 0
    config = default = None
    if args.config is not None:
        from alignlab.config.loader import load_config

        config = load_config(args.config, args.set)
        plan, default = plan_of_config(config, args), config.model.name
    else:
        plan = plan_of_task(args)
    candidates = named_candidates(args, default)
    if args.strategy:
        measure_models(plan, config, candidates, args)
    elif len(candidates) > 1:
        compare(plan, candidates, args)
    else:
        evaluate_one(plan, candidates[0], args)
    return 0


def named_candidates(args: argparse.Namespace, default: str | None) -> list[Candidate]:
    """Return the models, and print the folders of those that were named by a run's."""
    candidates = candidates_of(args.models, args.adapter, default)
    for candidate in candidates:
        if not candidate.is_as_given:
            print(f"{candidate.name}: {candidate.model}", file=sys.stderr)
    return candidates


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that would be ignored or misunderstood."""
    check_perplexity_arguments(args)
    for is_broken, message in (
        (
            args.config is not None and (args.system_prompt is not None or args.extract is not None),
            "--system-prompt and --extract are for --task; with --config use --set data.system_prompt=X",
        ),
        (
            args.pool is not None and not args.strategy,
            f"--pool is {args.pool}, and keeps the samples of strategies; add --strategy majority",
        ),
        (
            bool(args.show and args.strategy),
            "--show shows completions of the plain evaluation; leave it out, or leave out --strategy",
        ),
    ):
        if is_broken:
            raise ConfigError(message)
    if args.plot is not None:
        _check_plot(args)


def _check_plot(args: argparse.Namespace) -> None:
    """Refuse a plot of nothing, or one that cannot be written."""
    if len(args.models) < 2 and not (args.strategy or args.perplexity):
        raise ConfigError("--plot draws several models side by side; give at least two MODELs, or leave it out")
    if not (args.plot.suffix == ".png" and args.plot.absolute().parent.is_dir()):
        raise ConfigError(f"--plot must be a .png file in a folder that exists, and is {args.plot}; correct it")


def evaluate_one(plan: Plan, candidate: Candidate, args: argparse.Namespace) -> None:
    """Measure the accuracy of one policy, and print it."""
    from alignlab.evaluation.accuracy_intervals import accuracy_intervals

    with _naming(candidate):
        result = evaluate_policy(plan, candidate.model, candidate.adapter, args.dtype)
    show(result, args.show)
    numbers = {name.removeprefix("eval/"): round(value, 4) for name, value in result.metrics().items()}
    label = {"name": candidate.name} if candidate.labelled else {}
    intervals = {name: [round(bound, 4) for bound in bounds] for name, bounds in accuracy_intervals(result).items()}
    print(json.dumps({"task": plan.task, **label, **numbers, **sizes(result), "intervals": intervals}))


@contextmanager
def _naming(candidate: Candidate) -> Iterator[None]:
    """Put the policy's name in front of the message of an engine's error, such as of logits that are not finite."""
    try:
        yield
    except RolloutError as error:
        raise RolloutError(f"MODEL {candidate.name}: {error}") from error


def compare(plan: Plan, candidates: Sequence[Candidate], args: argparse.Namespace) -> None:
    """Measure several policies, one after the other; on an error or Ctrl-C, report those measured so far."""
    from alignlab.scoring.loading import load_reward

    scorer = load_reward(plan.scorer)
    problems = same_problems(plan, candidates, scorer)
    dtype = resolved_dtype(args.dtype, adapted=any(candidate.adapted for candidate in candidates))
    measured: list[MeasuredPolicy] = []
    try:
        for number, candidate in enumerate(candidates, 1):
            print(f"{candidate.name}: model {number} of {len(candidates)}, {dtype}", file=sys.stderr, flush=True)
            measured.append(measure(plan, candidate, problems[number - 1], scorer, dtype))
    finally:
        if measured:
            facts = {"seed": plan.seed, "dtype": dtype, "complete": len(measured) == len(candidates)}
            report_comparison(plan, measured, facts, args)


def same_problems(plan: Plan, candidates: Sequence[Candidate], scorer: LoadedReward) -> list[list[Prompt]]:
    """Return each policy's problems, rendered by its own tokenizer; only those that every policy can read.

    Raises:
        AlignlabError: with the name of a policy that cannot be loaded or read the problems, before one is loaded.
    """
    from alignlab.cli.policy import tokenizer_source
    from alignlab.models.hub.checkpoints import empty_model, load_tokenizer

    prompts = []
    for candidate in candidates:
        try:
            model = empty_model(candidate.model)
            tokenizer = load_tokenizer(tokenizer_source(candidate.model, candidate.adapter))
            prompts.append(problems_with_room(plan, model, tokenizer))
            check_scorer_accepts_reference(scorer, prompts[-1][0], tokenizer)
        except AlignlabError as error:
            raise type(error)(f"MODEL {candidate.name}: {error}; nothing was evaluated") from error
    indices = [{prompt.index for prompt in rendered} for rendered in prompts]
    shared = set.intersection(*indices)
    if not shared:
        raise DataError("no problem can be given to all models: each skips others; see data.max_prompt_tokens")
    left_out = len(set.union(*indices) - shared)
    if left_out:
        print(f"problems left out, because not every model can be given them: {left_out}", file=sys.stderr)
    usable = ([prompt for prompt in rendered if prompt.index in shared] for rendered in prompts)
    return [problems[: plan.evaluation.num_problems] for problems in usable]


def measure(
    plan: Plan, candidate: Candidate, prompts: Sequence[Prompt], scorer: LoadedReward, dtype: str
) -> MeasuredPolicy:
    """Load one policy, measure it, and free its memory."""
    import gc

    import torch

    from alignlab.evaluation.comparison import MeasuredPolicy

    gc.collect()  # frees the policy before it
    torch.cuda.empty_cache()
    policy, tokenizer = load_policy(candidate.model, candidate.adapter, dtype)
    start = time.perf_counter()
    with _naming(candidate):
        result = answer(plan, policy, tokenizer, prompts, scorer)
    seconds = time.perf_counter() - start
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    return MeasuredPolicy(candidate.name, candidate.model, result, num_parameters, seconds)


def report_comparison(
    plan: Plan, measured: Sequence[MeasuredPolicy], facts: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Print a table and some completions on standard error, JSON on standard output, and draw the plot."""
    from rich.console import Console

    from alignlab.evaluation.comparison import comparison_json, plot_comparison, show_comparison

    show_comparison(Console(stderr=True), measured, args.show)
    result = {"task": plan.task, **sizes(measured[0].result), **facts, "models": comparison_json(measured)}
    print(json.dumps(result), flush=True)
    if args.plot is not None:
        plot_comparison(measured, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)


def sizes(result: EvaluationResult) -> dict[str, int]:
    """Return the number of problems and of samples."""
    return {"num_problems": result.num_problems, "num_samples": result.num_samples}


def evaluate_policy(plan: Plan, model: str, adapter: str | None, dtype: str) -> EvaluationResult:
    """Load a policy, its problems and its scorer, and measure it."""
    from alignlab.scoring.loading import load_reward

    scorer = load_reward(plan.scorer)
    policy, tokenizer = load_policy(model, adapter, dtype)
    prompts = problems_with_room(plan, policy, tokenizer)
    check_scorer_accepts_reference(scorer, prompts[0], tokenizer)
    return answer(plan, policy, tokenizer, prompts[: plan.evaluation.num_problems], scorer)


def problems_with_room(plan: Plan, model: Any, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    """Return the problems that a model can read and complete; unless bad rows are skipped, only as many as needed.

    Raises:
        ConfigError, DataError: a problem does not fit, and bad rows are not skipped.
    """
    from alignlab.data.prompts import load_prompts
    from alignlab.loop.preflight import with_room

    prompts = load_prompts(plan.data, tokenizer)
    needed = prompts if plan.data.on_bad_row == "skip" else prompts[: plan.evaluation.num_problems]
    return with_room(needed, model, plan, plan.data.rendering, tokenizer=tokenizer, what="evaluation prompt")


def answer(
    plan: Plan,
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    scorer: LoadedReward,
) -> EvaluationResult:
    """Sample the policy's answers, and measure their accuracy."""
    from alignlab.evaluation.evaluate import evaluate
    from alignlab.rollout.engine import make_engine

    return evaluate(
        make_engine(policy, tokenizer, plan.rollout),
        prompts,
        scorer,
        sampling=plan.sampling,
        num_samples=plan.evaluation.num_samples,
        seed=plan.seed,
        pass_at=plan.evaluation.pass_at,
        time_limit_s=plan.evaluation.scorer_time_limit_s,
    )


def check_scorer_accepts_reference(scorer: LoadedReward, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the scorer does not accept a row's own answer: every accuracy would be 0.

    Raises:
        ConfigError: with the answer and its score.
    """
    from alignlab.cli.check_rewards import value_of_own_answer

    value = value_of_own_answer(scorer, prompt, tokenizer)
    if value is not None and value != 1.0:
        raise ConfigError(
            f"the scorer {scorer.name} gives {value} to the row's own answer {prompt.columns['answer']!r}, so nothing "
            "could be right; choose how the answer is taken (--extract whole, or the reward's option extract), or "
            "another scorer"
        )


def show(result: EvaluationResult, num_problems: int) -> None:
    """Print the metrics, and some completions, on standard error."""
    from alignlab.evaluation.accuracy_intervals import accuracy_intervals
    from alignlab.evaluation.tables import describe_judged

    intervals = accuracy_intervals(result)
    for problem in result.samples[:num_problems]:
        mark = {True: "right", False: "wrong", None: "not judged"}[problem.greedy_correct]
        lines = [f"problem: {problem.prompt}", f"  answer: {problem.answer}", f"  greedy ({mark}): {problem.greedy}"]
        print("\n".join([*lines, *(f"  sampled: {text}" for text in problem.sampled)]), file=sys.stderr)
    print(f"{describe_judged(result)} problems, {result.num_samples} samples each; 95 % intervals", file=sys.stderr)
    for name, value in result.metrics().items():
        if name != "eval/num_judged":
            low, high = intervals[name.removeprefix("eval/")]
            print(f"  {name.removeprefix('eval/'):15} {value:.3f}  {low:.2f}..{high:.2f}", file=sys.stderr)
