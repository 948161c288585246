"""Rows made of completions that the policy samples for the training prompts, kept in a journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignlab.config.resume import refused_settings
from alignlab.config.rlaif import LabelSettings, RevisionSettings
from alignlab.loop.training_loop import TrainResult
from alignlab.models.fingerprints import model_digest
from alignlab.rollout.engine import RolloutEngine, make_engine
from alignlab.rollout.vllm.rank_groups import require_own_vllm
from alignlab.runs.journal import write_rows
from alignlab.synthesis.prompt_journal import PromptJournal, Row
from alignlab.trainers.rlaif.stage import StageContext, StageStopped
from alignlab.types import Prompt, Rollout


class SampledRows:
    """The rows of a stage that samples: one for each prompt, of `group_size` completions by the policy.

    The product is a file that is written once all rows are made. From then on the rows stay as they are.

    Args:
        context: the run's shared facts.
        settings: the stage's section.
        product: the file that marks the rows as complete, in the folder of the journals.
        title: name of the work in the progress display.
    """

    def __init__(
        self, context: StageContext, settings: RevisionSettings | LabelSettings, product: Path, title: str
    ) -> None:
        self.product = product
        self._context, self._settings, self._title = context, settings, title
        self._journal = PromptJournal(product.parent, context.accelerator)

    def finished(self) -> bool:
        """Return whether all rows are made, and later stages may have learnt from them."""
        return self.product.exists()

    def rows_of_this_rank(self) -> list[Row]:
        """Return the rows that this rank has made so far."""
        return self._journal.rows_of_this_rank()

    def make(
        self, policy: Any, make_rows: Callable[[Sequence[Rollout]], Sequence[Row]], *, group_size: int
    ) -> list[Row]:
        """Return the rows of all prompts, in the order of the prompts; make those that are missing.

        Args:
            policy: samples the completions.
            make_rows: makes one row of each prompt and its completions.
            group_size: completions of a prompt.

        Raises:
            StageStopped: a signal has stopped the work.
            CheckpointError: earlier rows were made with something else, are of other prompts or damaged.
        """
        settings = self._settings
        require_own_vllm(settings.rollout, "sampling for RLAIF")
        self._context.accelerator.wait_for_everyone()
        self._journal.check_made_with(self._facts(policy))
        prompts = self._context.prompts[: settings.num_prompts]
        if self.finished():
            return self._journal.read_complete(prompts, done=self.product)
        sampling = settings.sampling.params(n=group_size, seed=self._context.config.seed)
        engines: list[RolloutEngine] = []

        def sample_and_make(batch: Sequence[Prompt]) -> Sequence[Row]:
            if not engines:  # made only when a prompt has no row yet
                engines.append(make_engine(policy, self._context.tokenizer, settings.rollout))
            return make_rows(engines[0].generate(batch, sampling))

        try:
            rows = self._journal.collect(
                prompts, sample_and_make, batch_size=settings.prompts_per_batch, title=self._title
            )
        finally:
            for engine in engines:
                engine.close()
        if rows is None:
            folder = self._journal.folder
            raise StageStopped(TrainResult(0, 0.0, folder, True, None, {}, None, None, folder))
        return rows

    def publish(self, rows: Sequence[Row]) -> None:
        """Write the product, which marks the rows as complete."""
        if self._context.is_main_rank:
            write_rows(self.product, rows)

    def _facts(self, policy: Any) -> dict[str, Any]:
        """Return what the rows depend on, as JSON."""
        config = self._context.config
        return {
            "constitution": self._context.constitution.model_dump(mode="json"),
            "model": model_digest(policy),
            "judge": refused_settings(config.judge),
            "settings": refused_settings(self._settings),
            "seed": config.seed,
        }
