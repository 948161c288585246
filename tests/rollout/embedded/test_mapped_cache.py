"""A cache in a file: exact, bounded in memory, gone with the process, refused where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.config.kv_cache import MmapCache
from alignlab.config.rollout import RolloutSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.rollout.embedded import mapped_cache
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.mapped_cache import MappedBatch, MappedCache, Reading, joined, read
from alignlab.rollout.embedded.mapped_file import MappedFile, check_mapped_cache, touched_bytes
from alignlab.rollout.embedded.paged_attention import PagedBatch, RowGroup
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.memory import engine_bytes
from alignlab.types import SamplingParams
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import VOCAB, MakeEngine, flat, make_prompts
from tests.rollout.embedded.test_swapping import assert_same

SAMPLING = SamplingParams(n=3, max_new_tokens=14, ignore_eos=True, seed=3)
LENGTHS = (5, 17, 40, 17)
MIB = 2**20


def resident_bytes(num_bytes: int) -> int:
    """Bytes in memory of the mapping of this size in this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if "(deleted)" in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if end - start == num_bytes:
                return next(int(other.split()[1]) for other in lines if other.startswith("Rss:")) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("schedule", ["as it is", "pre-empted", "swapped"])
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_completions_are_those_of_an_exact_cache(
    name: str, schedule: str, make_engine: MakeEngine, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Readings of few blocks, so that long sequences take several."""
    monkeypatch.setattr(mapped_cache, "_READING_BYTES", 3000)
    model, prompts = request.getfixturevalue(name), make_prompts(*LENGTHS)
    settings: dict[str, Any] = {"block_size": 4}
    if schedule != "as it is":
        settings |= {"cache_tokens": 72, "prefill_tokens": 9}
    if schedule == "swapped":
        settings |= {"preemption": "swap"}
    expected = make_engine(model, block_size=4).generate(prompts, SAMPLING)
    engine = make_engine(model, kv_cache={"type": "mmap", "folder": str(tmp_path)}, **settings)
    rollouts = engine.generate(prompts, SAMPLING)
    assert_same(flat(expected), flat(rollouts))
    assert (engine.num_preempted > 0) == (schedule != "as it is")
    assert engine.metrics().get("engine/swapped_in", 0) == (engine.num_preempted if schedule == "swapped" else 0)
    for completion, logprobs in zip(flat(rollouts), engine.logprobs(rollouts), strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.raw_logprobs), atol=1e-5, rtol=0)
    assert not list(tmp_path.iterdir()), "the file has no name"
    file = engine._runner.cache._file  # type: ignore[attr-defined]
    assert file.num_bytes >= sum(t.nbytes for layer in engine._runner.cache.layers.values() for t in layer.values())
    engine.rest()
    assert engine._runner.cache._file is None and not engine._runner.cache.layers  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["latent-sinks-soft-cap", "gated-window", "shared-recurrent-and-latent"])
def test_latents_sinks_caps_and_states(
    kind: str, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_cache, "_READING_BYTES", 3000)
    model, prompts = make_model(kind, vocab_size=VOCAB).double(), make_prompts(*LENGTHS)
    expected = make_engine(model).generate(prompts, SAMPLING)
    engine = make_engine(model, block_size=4, kv_cache={"type": "mmap", "folder": str(tmp_path)})
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)), atol=1e-6)


def test_two_readings_are_joined_as_one_softmax() -> None:
    """exp(1), exp(2) and exp(4) over their sum, of the values 1, 10 and 100."""
    one = read(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0]]))
    other = read(torch.tensor([[4.0, -torch.inf]]), torch.tensor([[100.0], [7.0]]))
    assert (one.top.item(), other.top.item(), other.total.item()) == (2, 4, 1)
    both = joined(one, other)
    e = [2.718281828**x for x in (1, 2, 4)]
    assert (both.output[..., 0] / both.total).item() == pytest.approx((e[0] + 10 * e[1] + 100 * e[2]) / sum(e))
    hidden = read(torch.full((1, 2), -torch.inf), torch.ones(2, 1))
    for pair in ((hidden, one), (one, hidden)):
        result = joined(*pair)
        assert isinstance(result, Reading)
        assert [part.item() for part in result] == pytest.approx([part.item() for part in one])


def test_bytes_that_a_read_brings_into_memory() -> None:
    assert touched_bytes(torch.tensor([0, 1, 2]), 1000) == 65_536, "one piece of the file"
    assert touched_bytes(torch.tensor([65, 5, 65]), 1000) == 2 * 65_536, "row 65 lies in two, which has row 5 too"
    assert touched_bytes(torch.tensor([1]), 4 * 65_536) == 4 * 65_536


class Steps:
    """Prompts in a cache of 4 layers and 48 MiB, of which 4 may be in memory."""

    def __init__(self, folder: Path) -> None:
        self.specs = {index: LayerCacheSpec.of_heads(2, 96, 96) for index in range(4)}
        settings = MmapCache(folder=folder, resident_gib=4 / 1024)
        self.cache = MappedCache(self.specs, 16, settings, torch.float32)
        self.twin = PagedCache(self.specs, 16)
        for cache in (self.cache, self.twin):
            cache.resize({None: 512})

    def attended(self, kind: type[PagedBatch], cache: PagedCache, start: int, end: int) -> list[Tensor]:
        positions = torch.arange(start, end)[None]
        group = RowGroup(0, end - start, None, None, positions, {None: torch.arange(-(-end // 16))}, {})
        batch = kind(cache, {None: positions[0]}, [group])
        generator = torch.Generator().manual_seed(start)
        outputs = []
        for layer in self.specs:
            query, key, value = (torch.randn(1, heads, end - start, 96, generator=generator) for heads in (4, 2, 2))
            outputs.append(batch.attend(layer, query, key, value, scaling=0.1, sliding_window=None, softcap=None))
        return outputs


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_a_part_of_the_file_is_in_memory(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    file = steps.cache._file
    assert file is not None and file.num_bytes == 48 * MIB
    most = 0
    for start in (*range(0, 8190, 2730), 8190):
        end = min(start + 2730, 8192)
        ours, twins = (
            steps.attended(kind, cache, start, end)
            for kind, cache in ((MappedBatch, steps.cache), (PagedBatch, steps.twin))
        )
        for one, other in zip(ours, twins, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        most = max(most, resident_bytes(file.num_bytes))
    assert 0 < most <= 5 * MIB, "what was touched at once may come on top"


CRASH = """
import os, signal, sys, torch
from alignlab.rollout.embedded.mapped_file import MappedFile
from pathlib import Path
file = MappedFile(Path(sys.argv[1]), 1 << 20, 1 << 20)
file.zeros((10,), torch.float32).fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], check=False, capture_output=True)
    assert result.returncode == -9, result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_written_stays_when_memory_is_taken_back(tmp_path: Path) -> None:
    file = MappedFile(tmp_path, 1 << 20, 1 << 16)
    tensors = [file.zeros((1000,), torch.float32), file.zeros((3, 5), torch.int16)]
    for number, tensor in enumerate(tensors):
        file.touch(1 << 16)
        assert (tensor == 0).all()
        tensor.fill_(number + 1)
    file.touch(1 << 20)
    assert [set(tensor.flatten().tolist()) for tensor in tensors] == [{1.0}, {2}]


def test_a_folder_that_cannot_hold_it_is_refused(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(**settings: Any) -> EmbeddedEngine:
        return make_engine(kv_cache={"type": "mmap", "folder": str(tmp_path), **settings})

    with pytest.raises(ConfigError, match=r"folder is .*/none, and must be a folder that exists; make it"):
        engine(folder=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"max_gib is 1e\+09, and must be at most what .* has free, [\d.]+ GiB"):
        engine(max_gib=1e9)
    with pytest.raises(ConfigError, match=r"must then run on a CPU, and runs on cuda: .*preemption: swap"):
        check_mapped_cache(MmapCache(folder=tmp_path), torch.device("cuda"))
    with pytest.raises(RolloutError, match=r"needs 32 tokens of cache, and the file of rollout.kv_cache holds 16"):
        engine(max_gib=5000 / 2**30).generate(make_prompts(20), SamplingParams(max_new_tokens=5))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    small = engine()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RolloutError, match=r"room for a cache of .* GiB .*No space left on device.*free some"):
        small.generate(make_prompts(20), SamplingParams(max_new_tokens=5))
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ConfigError, match=r"must be a folder that can be written \(No space left"):
        engine()


def test_the_file_has_half_of_the_free_room(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of 2 layers with keys and values of 2 heads of 8 is 256 bytes, in four parts."""
    engine = make_engine(kv_cache={"type": "mmap", "folder": str(tmp_path)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2 * 16 * 256))
    engine.generate(make_prompts(20, 20, 20), SamplingParams(max_new_tokens=12, n=2))
    assert engine._space.blocks.num_blocks == 5
    assert engine._runner.cache.max_file_bytes() == 4 * 8192 + 5 * 16 * 256, "parts of 5 KiB take two pages"


def test_memory_is_predicted_without_the_file(llama: PreTrainedModel, tmp_path: Path) -> None:
    settings = RolloutSettings(kv_cache={"type": "mmap", "folder": str(tmp_path), "resident_gib": 2**-15})
    sizes = {"num_sequences": 8, "num_tokens": 128}
    assert engine_bytes(llama, settings, torch.device("cpu"), **sizes) == 2**15
    assert engine_bytes(llama, RolloutSettings(), torch.device("cpu"), **sizes) == 8 * 128 * 256
