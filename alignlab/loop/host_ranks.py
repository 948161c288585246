"""The ranks of a run on one host, which share its memory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from alignlab.config.trainer import ShardingSettings
from alignlab.files.library_errors import writing
from alignlab.files.private_folders import temporary_folder
from alignlab.loop.rank_agreement import RankAgreement
from alignlab.loop.ranks import Ranks
from alignlab.models.hub.host_copies import made_once


class HostRanks:
    """The ranks of this run on this host; a `models.hub.host_copies.Host`.

    Args:
        ranks: of the run, which make this together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._host = ranks, platform.node()
        self._is_first = ranks.gather_json(self._host).index(self._host) == ranks.index

    @contextmanager
    def file(self, num_bytes: int, write: Callable[[Path], None]) -> Iterator[Path]:
        """Yield a file that the host's first rank has written, in a folder of this user's alone."""
        folder = None
        try:
            with RankAgreement(self._ranks.accelerator)("converting the weights of a checkpoint"):
                if self._is_first:
                    folder = temporary_folder(num_bytes)
                    path = Path(folder.name) / "weights.safetensors"
                    with writing(path, "the converted weights of a checkpoint"):
                        write(path)
            own = [self._host, None if folder is None else folder.name]
            [place] = [place for host, place in self._ranks.gather_json(own) if host == self._host and place]
            yield Path(place) / "weights.safetensors"
            self._ranks.accelerator.wait_for_everyone()
        finally:
            if folder is not None:
                folder.cleanup()


@contextmanager
def loading_for_training(settings: ShardingSettings, accelerator: Accelerator) -> Iterator[torch.device]:
    """Yield the device on which a model in training is loaded; every rank loads the same models within the context.

    Weights that are spread over ranks stay on the host, of which no rank has a copy of its own, until each goes to the
    ranks' devices in pieces.
    """
    ranks = Ranks(accelerator)
    if not settings.spreads_weights or ranks.count == 1:
        yield ranks.device
        return
    with made_once(HostRanks(ranks)):
        yield torch.device("cpu")
