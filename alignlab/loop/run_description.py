"""How a training is called, and what run it belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunDescription:
    """What a training's folder, messages and report say of it; a trainer makes one of its own until it is given one.

    Attributes:
        title: name of the run, in the progress line and the report.
        config_text: the resolved config, written beside the results.
        section: the user's name of the trainer's section, in messages about changed settings.
        base_model: name or path of the model that a trained adapter belongs on; None where it has none.
        generate_options: flags with which `alignlab generate` renders a prompt as the training did.
        part_of: id of the run that this one is a stage of; None for a run of its own.
        settings_are_final: whether another run has begun from the output of this one, so that none of its settings may
            change any more.
    """

    title: str
    config_text: str
    section: str = "config"
    base_model: str | None = None
    generate_options: tuple[str, ...] = ()
    part_of: str | None = None
    settings_are_final: bool = False
