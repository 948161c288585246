"""What a child of the server does: a run from its config, reading what a run has made, making the inputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.faults import readings, results, runs
from tests.faults.trouble import prepare


def make_inputs() -> None:
    """Write the inputs into the working folder."""
    runs.make_inputs(Path("inputs"))


def train(
    name: str, *, resume: bool | None = None, overrides: list[str] | None = None,
    trouble: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run `alignlab train` as a user does.

    Args:
        resume: None goes on with a run where there is one.
        trouble: phase, action and rank, see `trouble`.

    Returns:
        The exit status.
    """
    from alignlab.cli import main
    from alignlab.runs.folder import holds_run

    folder = Path("run")
    if resume is None:
        resume = holds_run(folder) or holds_run(folder / "warm_start")
    if name == "ahead":
        _collect_ahead()
    if trouble is not None and os.environ.get("RANK", "0") == str(trouble["rank"]):
        prepare(trouble["phase"], trouble["action"])
    flags = ["--resume"] if resume else []
    status = main(["train", f"inputs/{name}.yaml", *(overrides or ()), *flags])
    return {"exit": status}


def made() -> dict[str, str]:
    """What the run in the working folder has made."""
    return results.what_was_made(Path("run"), Path.cwd())


def modules_after(name: str) -> list[str]:
    """The modules that a run imports as it goes, to be imported once before the next."""
    before = set(sys.modules)
    train(name)
    return [module for module in sys.modules if module not in before and not module.startswith("tests.")]


def _collect_ahead() -> None:
    """Give runs on servers an engine of this process, whose samples do not depend on when it is asked.

    What a server samples ahead depends on which update it has just been given, so that no two runs are the same. This
    engine keeps the weights that it began with, and all else is as it is on servers: the thread, the order, the age.
    """
    from alignlab.config.rollout import RolloutSettings
    from alignlab.loop import online
    from alignlab.rollout.embedded.engine import EmbeddedEngine

    class Steady(EmbeddedEngine):
        def update_weights(self, policy_version: int) -> None:
            self.policy_version = policy_version

    def make(model: Any, tokenizer: Any, settings: Any) -> EmbeddedEngine:
        import copy

        return Steady(copy.deepcopy(model), tokenizer, RolloutSettings())

    online.make_engine = make  # type: ignore[assignment]


def read() -> dict[str, str]:
    """What alignlab reads in the run in the working folder."""
    return readings.readings(Path("run"))


def damaged_checkpoints() -> list[str]:
    """What is wrong with the checkpoints of all runs in the working folder."""
    return [
        f"{name}: {value}" for name, value in readings.readings(Path("run")).items()
        if Path(name).name.startswith("step-") and value.startswith((readings.NAMED, readings.UNNAMED))
    ]
