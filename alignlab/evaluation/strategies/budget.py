"""Budget forcing: thinking of a given length, by generation in stages.

A trace thinks until it ends by itself or the budget is used up. One that ends early may be drawn out: its end is taken
away and "Wait" put in its place. Then the end of the thinking and a cue are put behind it, and the answer is generated.
Reference: Muennighoff et al. (2025), s1, arXiv:2501.19393, Sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import SamplingSettings
from alignlab.evaluation.strategies.figures import Estimate, Figure
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.settings import Budget
from alignlab.rollout.engine import RolloutEngine
from alignlab.types import Completion, Prompt, Rollout, Writer


@dataclass
class Trace:
    """One completion as it grows.

    Attributes:
        prompt: index of its prompt.
        token_ids, logprobs, raw_logprobs, writers: of each token; a token that was put in has log-prob 0 and the writer
            "user". `has_raw` is False once an engine gave no raw log-probs.
        left: tokens of thinking that are left of the budget.
        ended: True if the last stage ended by itself.
    """

    prompt: int
    left: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    has_raw: bool = True
    ended: bool = False

    def write(self, completion: Completion) -> None:
        """Add what the policy wrote."""
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs
        self.has_raw = self.has_raw and completion.raw_logprobs is not None
        self.raw_logprobs += completion.raw_logprobs or completion.logprobs
        self.writers += ["policy"] * len(completion.token_ids)

    def put(self, token_ids: Sequence[int]) -> None:
        """Add tokens that the policy did not write."""
        self.token_ids += token_ids
        self.logprobs += [0.0] * len(token_ids)
        self.raw_logprobs += [0.0] * len(token_ids)
        self.writers += ["user"] * len(token_ids)

    def cut(self, length: int) -> None:
        """Take away all tokens from a place on."""
        for values in (self.token_ids, self.logprobs, self.raw_logprobs, self.writers):
            del values[length:]

    def completion(self, tokenizer: PreTrainedTokenizerBase) -> Completion:
        """Return the trace as a completion."""
        return Completion.of(
            self.token_ids, str(tokenizer.decode(self.token_ids, skip_special_tokens=True)), logprobs=self.logprobs,
            raw_logprobs=self.raw_logprobs if self.has_raw else None, finish_reason="stop" if self.ended else "length",
            writers=self.writers,
        )


class BudgetForcing:
    """Generates traces of a budget, by any engine.

    Args:
        engine, tokenizer: of the policy.
        sampling: temperature and truncation. Its stop strings end the answer, and the thinking where `settings.end` is
            None; a pattern or a schema is the answer's; forced tokens are the thinking's. Its lengths are not used.
        settings: the strategy's.
        seed: of the sampling.
    """

    def __init__(
        self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings, settings: Budget,
        seed: int,
    ) -> None:
        self._engine, self._tokenizer, self._sampling, self._settings = engine, tokenizer, sampling, settings
        self._seed = seed

    def generate(self, prompts: Sequence[Prompt], budget: int) -> list[Rollout]:
        """Return `settings.samples` traces of each prompt, of at most `budget` tokens of thinking each."""
        samples = self._settings.samples
        traces = [Trace(prompt, budget) for prompt in range(len(prompts)) for _ in range(samples)]
        self._think(prompts, traces, first=True)
        for _ in range(self._settings.waits):
            early = [trace for trace in traces if trace.ended and trace.left > 0]
            for trace in early:
                self._put(trace, self._settings.wait)
            self._think(prompts, early)
        for trace in traces:
            self._put(trace, (self._settings.end or "") + self._settings.cue)
        self._extend(prompts, traces, [self._settings.answer_tokens] * len(traces), {"forced_tokens": ()})
        completions = [trace.completion(self._tokenizer) for trace in traces]
        return [
            Rollout(prompt, tuple(completions[row * samples : (row + 1) * samples]))
            for row, prompt in enumerate(prompts)
        ]

    def _think(self, prompts: Sequence[Prompt], traces: Sequence[Trace], *, first: bool = False) -> None:
        """Go on with the thinking of traces, and take away the end of those that end by themselves."""
        end = self._settings.end
        stop = self._sampling.stop if end is None else (end,)
        end_ids = [] if end is None else self._ids(end)
        # An end that is one token may be a special one, which the text that engines search for stop strings lacks.
        stop_ids = tuple(end_ids) if len(end_ids) == 1 else ()
        starts = [len(trace.token_ids) for trace in traces]
        own = {"stop": () if stop_ids else tuple(stop), "stop_token_ids": stop_ids, "regex": None, "json_schema": None}
        later = {} if first else {"forced_tokens": ()}
        self._extend(prompts, traces, [trace.left for trace in traces], {**own, **later}, together=first)
        for trace, start in zip(traces, starts, strict=True):
            trace.left -= len(trace.token_ids) - start
            if trace.ended:
                self._take_end_away(trace, start, stop)

    def _extend(
        self, prompts: Sequence[Prompt], traces: Sequence[Trace], lengths: Sequence[int], changes: Mapping[str, Any],
        *, together: bool = False,
    ) -> None:
        """Generate up to a number of tokens behind each trace.

        Args:
            lengths: these numbers.
            changes: parameters of the sampling that are others in this stage.
            together: whether the traces are empty, so that those of a prompt are samples of it.
        """
        if not traces:
            return
        step = self._settings.samples if together else 1
        asked = [
            replace(prompts[trace.prompt], token_ids=(*prompts[trace.prompt].token_ids, *trace.token_ids))
            for trace in traces[::step]
        ]
        sampling = replace(self._sampling.params(n=step, seed=self._seed), min_new_tokens=0, **changes)
        params = [replace(sampling, max_new_tokens=length) for length in lengths[::step]]
        written = [completion for rollout in self._engine.generate(asked, params) for completion in rollout.completions]
        for trace, completion in zip(traces, written, strict=True):
            trace.write(completion)
            trace.ended = completion.finish_reason == "stop"

    def _take_end_away(self, trace: Trace, start: int, stop: Sequence[str]) -> None:
        """Take away what ended the thinking: the stop string, and what stands behind it in its token; or the end token.

        A token that holds text in front of the stop string too is replaced by the tokens of that text.
        """
        written = trace.token_ids[start:]
        text = str(self._tokenizer.decode(written))
        places = [text.find(end) for end in stop if end in text]
        if not places:
            trace.cut(len(trace.token_ids) - 1)
            return
        thinking, kept = text[: min(places)], len(written)
        while not thinking.startswith(str(self._tokenizer.decode(written[:kept]))):
            kept -= 1
        before = thinking[len(str(self._tokenizer.decode(written[:kept]))) :]
        trace.cut(start + kept)
        if before:
            self._put(trace, before)

    def _put(self, trace: Trace, text: str) -> None:
        trace.put(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def most_new_tokens(settings: Budget) -> int:
    """Return the largest number of tokens that may stand behind a prompt; texts count a token a byte, at most."""
    forced = settings.waits * len(settings.wait.encode()) + len(((settings.end or "") + settings.cue).encode())
    return max(settings.budgets) + forced + settings.answer_tokens


def budget_figure(problems: Sequence[GradedProblem], budget: int) -> Figure:
    """Return the accuracy of traces of a budget: the mean over the traces of a problem, and the tokens of one."""
    estimates = [Estimate(fmean(problem.right)) for problem in problems]
    return Figure.of("budget", budget, estimates, fmean(fmean(problem.tokens) for problem in problems))
