"""What a run of RLAIF would begin with, and whether its stages could end well."""

from __future__ import annotations

from peft import LoraConfig

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import RLAIFConfig, stages_of
from alignlab.loop.ending_check import check_ending, on_main_rank, writer_of
from alignlab.loop.preflight import Preflight
from alignlab.loop.weight_decay import describe_weight_decay
from alignlab.models.adapters import add_lora
from alignlab.scoring.judges.make_judge import describe
from alignlab.trainers.rlaif.inputs import RLAIFInputs


def preflight_of(
    config: RLAIFConfig, inputs: RLAIFInputs, peft_config: LoraSettings | LoraConfig | None
) -> Preflight:
    """Return the prompts, the scorer, the constitution and the judge of a run on a model without weights.

    A run that trains checks the disk at the start of each stage instead, with the weights that the stage trains.

    Raises:
        ConfigError, CheckpointError: a stage could not end well; see `loop.ending_check.check_ending`.
    """
    model, tokenizer = inputs.model if peft_config is None else add_lora(inputs.model, peft_config), inputs.tokenizer

    def check_stages() -> None:
        for stage in stages_of(config):
            check_ending(stage, model, tokenizer, config.output_dir, writer_of(stage, model, tokenizer))

    on_main_rank(check_stages)
    held_out, constitution = inputs.held_out, inputs.constitution
    principles = ", ".join(principle.name for principle in constitution.principles)
    beside = {"principles": f"{constitution.name}: {principles}", "judge": describe(config.judge)}
    decay = [f"{stage.method}: {describe_weight_decay(model, stage.optim)}" for stage in stages_of(config)]
    return Preflight(inputs.prompts, held_out.prompts, held_out.scorer, beside, weight_decay=decay)
