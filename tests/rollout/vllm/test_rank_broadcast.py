"""Two ranks train beside servers that get weights by broadcast, from whole weights and from those spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.vllm.conftest import INSTALLED
from tests.trainers.rank_engines import NUM_STEPS, make_model, make_tokenizer
from tests.trainers.test_rank_engines import gaps_of, run, weights_of_ranks

pytestmark = [
    pytest.mark.vllm, pytest.mark.slow, pytest.mark.distributed,
    pytest.mark.skipif(not INSTALLED, reason="needs vLLM"),
]
RUNS = (("dense", "ddp"), ("dense", "fsdp2"), ("dense", "zero3"), ("adapter", "fsdp2"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_two_servers_get_from_two_ranks_what_a_file_would_bring(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests and canaries hold at every update, and the runs end with the weights of a run with files."""
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", "a-token-of-the-tests")
    settings, _ = serve(make_model("dense"), count=2)
    by_file = settings.model_dump(mode="json")
    by_broadcast = by_file | {"transfer": "broadcast"}
    run(
        tmp_path,
        {"name": "dense-file", "model": "dense", "strategy": "ddp", "rollout": by_file},
        *(
            {"name": f"{model}-{strategy}", "model": model, "strategy": strategy, "rollout": by_broadcast}
            for model, strategy in RUNS
        ),
    )
    expected = weights_of_ranks(tmp_path, "dense-file")
    for model, strategy in RUNS:
        gaps = gaps_of(tmp_path, f"{model}-{strategy}")
        assert len(gaps) == NUM_STEPS and max(gaps) < 2e-5, (model, strategy, gaps)
        weights = weights_of_ranks(tmp_path, f"{model}-{strategy}")
        for name, weight in expected.items() if model == "dense" else ():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=f"{strategy}: {name}")
