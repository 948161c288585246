"""The stage of critique and revision, and of supervised fine-tuning on the revised completions.

revision/
    rank*.jsonl        all answers, critiques and revisions
    revisions.jsonl    the revised completions: prompt, completion
    sft/               the run that trains on them
    model/             the trained model, with its adapter merged
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from alignlab.config.rlaif import RevisionSettings
from alignlab.errors import ConfigError, DataError
from alignlab.models.hub.checkpoints import save_model
from alignlab.models.hub.saving import published
from alignlab.models.shards import shard_root, whole_copy
from alignlab.scoring.judges.judge import PromptedJudge
from alignlab.synthesis.prompt_journal import Row
from alignlab.synthesis.revision import Reviser, supervised_rows
from alignlab.trainers.rlaif.sampling import SampledRows
from alignlab.trainers.rlaif.stage import Progress, StageContext
from alignlab.trainers.sft import SFTTrainer


class RevisionStage:
    """Critique, revision and fine-tuning; later stages start from the merged model."""

    name = "revision"

    def __init__(self, context: StageContext, settings: RevisionSettings) -> None:
        self._context, self._settings = context, settings
        self._sampled = SampledRows(
            context, settings, self.folder / "revisions.jsonl", "critique and revision"
        )

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self._context.folder / self.name

    @property
    def _model_folder(self) -> Path:
        return self.folder / "model"

    def finished(self) -> bool:
        """Return whether the trained model is saved."""
        return (self._model_folder / "config.json").is_file()

    def run(self, progress: Progress) -> Progress:
        """Revise completions of the policy, and train the policy on them; see `Stage.run`."""
        context = self._context
        rows = self._revised_rows(progress.policy)
        trainer = SFTTrainer(
            copy.deepcopy(progress.policy),
            context.stage_config(self._settings.trainer, self.folder / "sft"),
            rows,
            tokenizer=context.tokenizer,
            peft_config=context.peft_config,
            callbacks=context.callbacks,
            render_settings=context.render_settings,
        )
        result = context.train(trainer, "revision.trainer")
        policy = self._merge_and_save(trainer.learner.model)
        return replace(
            progress, policy=policy, base_model=policy.config.name_or_path,
            result=replace(result, model_path=self._model_folder),
        )  # fmt: skip

    def _revised_rows(self, policy: Any) -> Sequence[Row]:
        critic = self._context.judge_beside(policy)
        if not isinstance(critic, PromptedJudge):
            raise ConfigError(f"revision needs a judge that writes, and {type(critic).__name__} does not; give another")
        reviser = Reviser(
            critic.model,
            self._context.constitution,
            num_revisions=self._settings.num_revisions,
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            seed=self._context.config.seed,
        )
        rows = self._sampled.make(policy, reviser.revise, group_size=1)
        outcomes = Counter(row["outcome"] for row in rows)
        self._context.show("critique and revision", sorted(outcomes.items()))
        revised = supervised_rows(rows)
        if not revised:
            raise DataError(
                f"none of {len(rows)} answers was revised ({dict(outcomes)}); see {self.folder}, and choose another "
                "judge or constitution"
            )
        self._sampled.publish(revised)
        return revised

    def _merge_and_save(self, trained: Any) -> Any:
        """Return the trained model with its adapter merged, ready to be trained further, once it is saved.

        It is whole on each rank, as the model is that a run begins with.
        """
        whole = trained if shard_root(trained) is None else whole_copy(trained)
        policy: Any = whole.merge_and_unload() if isinstance(whole, PeftModel) else whole
        policy.eval().requires_grad_(True)
        if self._context.is_main_rank:
            with published(self._model_folder, run_id=self._context.run_id) as unfinished:
                save_model(policy, unfinished)
                self._context.tokenizer.save_pretrained(unfinished)
        policy.config.name_or_path = str(self._model_folder.resolve())
        return policy
