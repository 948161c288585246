"""The pools of samples of one model, for `alignlab eval --strategy`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.candidates import Candidate
from alignlab.cli.policy import load_policy
from alignlab.files.digests import fast_digest, fast_digest_of_file, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.cli.evaluation_plan import Plan
    from alignlab.config.rollout import EngineSettings
    from alignlab.evaluation.strategies.pool import Pool
    from alignlab.evaluation.strategies.settings import Budget
    from alignlab.rollout.engine import RolloutEngine
    from alignlab.types import Prompt, Rollout

Draw = Callable[["RolloutEngine", "PreTrainedTokenizerBase", Sequence["Prompt"]], Sequence["Rollout"]]


class Sampler:
    """Draws pools from one model, which is loaded when samples are missing.

    Args:
        plan: the sampling, and the engine.
        candidate: the model.
        dtype: of its weights.
        folder: of the pools; None keeps them in memory.
        problems: prompts on which a cache in few dimensions is measured, for all pools alike.
    """

    def __init__(
        self, plan: Plan, candidate: Candidate, dtype: str, folder: Path | None, problems: Sequence[Prompt]
    ) -> None:
        self._plan, self._candidate, self._dtype, self._folder = plan, candidate, dtype, folder
        self._problems = problems
        self._engine: RolloutEngine | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._weights = {
            name: weights_digest(place)
            for name, place in (("model", candidate.model), ("adapter", candidate.adapter)) if place is not None
        }  # fmt: skip

    def pool(self, prompts: Sequence[Prompt], *, form: str | None = None, num_samples: int | None = None) -> Pool:
        """Return plain samples of prompts; `form` is the template that they are rendered with, if any."""
        plan = self._plan
        count = num_samples or plan.evaluation.num_samples
        return self._pool(
            prompts, "samples" if form is None else f"form-{sha256_of(form)[:12]}",
            lambda engine, _, batch: engine.generate(batch, plan.sampling.params(n=count, seed=plan.seed)),
            form=form, num_samples=count,
        )  # fmt: skip

    def budget_pool(self, prompts: Sequence[Prompt], strategy: Budget, budget: int) -> Pool:
        """Return traces of a budget of thinking."""
        from alignlab.evaluation.strategies.budget import BudgetForcing

        plan = self._plan
        settings = strategy.model_copy(update={"budgets": (budget,)})
        return self._pool(
            prompts, f"budget-{sha256_of(settings.model_dump_json())[:12]}",
            lambda engine, tokenizer, batch: BudgetForcing(
                engine, tokenizer, plan.sampling, settings, plan.seed
            ).generate(batch, budget),
            budget=settings,
        )

    def _pool(self, prompts: Sequence[Prompt], name: str, draw: Draw, **how: Any) -> Pool:
        from alignlab.evaluation.strategies.pool import draw_pool

        plan = self._plan
        facts = as_facts(
            **self._weights, dtype=self._dtype, sampling=plan.sampling, seed=plan.seed,
            **engine_facts(plan.rollout, self._problems), **how,
        )
        file = None if self._folder is None else self._folder / folder_name(self._candidate.name) / f"{name}.jsonl"
        return draw_pool(prompts, facts, lambda batch: draw(*self._loaded(), batch), file)

    def _loaded(self) -> tuple[RolloutEngine, PreTrainedTokenizerBase]:
        import gc

        import torch

        from alignlab.models.kv_approximation.choice import measure_cache
        from alignlab.rollout.engine import make_engine

        if self._engine is None or self._tokenizer is None:
            gc.collect()  # frees the model before it
            torch.cuda.empty_cache()
            candidate = self._candidate
            print(f"{candidate.name}: sampling, {self._dtype}", file=sys.stderr, flush=True)
            policy, self._tokenizer = load_policy(candidate.model, candidate.adapter, self._dtype)
            measure_cache(policy, self._plan.rollout, self._problems)
            self._engine = make_engine(policy, self._tokenizer, self._plan.rollout)
        return self._engine, self._tokenizer

    def close(self) -> None:
        """Free the model and the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def engine_facts(rollout: EngineSettings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what of an engine changes the distribution that is sampled from; None for what does not.

    Args:
        rollout: settings of the engine.
        prompts: on which a cache in few dimensions is measured.
    """
    from alignlab.config.kv_cache import LowRankCache
    from alignlab.config.rollout import approximate_cache, quantization, rounded_weights, served_cache
    from alignlab.models.kv_approximation.low_rank_bases import calibration_digest

    cache, rounding = approximate_cache(rollout), rounded_weights(rollout)
    measured_on = None
    if isinstance(cache, LowRankCache):
        measured_on = calibration_digest(cache, [prompt.token_ids for prompt in prompts])
    return {
        "engine": rollout.engine,
        "quantization": quantization(rollout) if rounding is None else rounding.model_dump(mode="json"),
        "kv_cache": served_cache(rollout) if cache is None else cache.model_dump(mode="json", exclude={"replay"}),
        "measured_on": measured_on,
    }


def as_facts(**facts: Any) -> dict[str, Any]:
    """Return what samples depend on as JSON; facts that are None are left out."""
    return {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in facts.items() if value is not None
    }  # fmt: skip


def weights_digest(place: str) -> dict[str, str]:
    """Return the place of a model or an adapter, and a digest of the files of a local one."""
    files = [file for end in ("*.safetensors", "*config.json") for file in sorted(Path(place).glob(end))]
    digests = fast_digest(f"{file.name} {fast_digest_of_file(file)}\n" for file in files)
    return {"place": place} | ({"files": digests} if files else {})


def folder_name(name: str) -> str:
    """Return a model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"
