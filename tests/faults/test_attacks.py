"""A sample of every kind of attack: nothing is silent, unnamed, stuck or hung. All: `python -m tests.faults --all`."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.__main__ import ATTACKS, attempt
from tests.faults.calls import is_supported
from tests.faults.lab import Lab
from tests.faults.operations import Plan
from tests.faults.trouble import PHASES

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not is_supported(), reason="needs a kernel that asks before system calls (seccomp)"),
]
SAMPLE = (
    "kills:grpo:before/60/0", "kills:grpo:inside/110/0", "kills:grpo:before/250/0", "kills:ahead:before/300/0",
    "kills:sft@2:before/90/0",
    "corruption:grpo.stopped:run/checkpoints/step-00000002/optimizer.safetensors|bit-1",
    "corruption:grpo.stopped:run/metrics.jsonl|digit-1", "corruption:grpo.stopped:run/starts.jsonl|removed",
    "corruption:grpo.stopped:run/checkpoints/step-00000002|folder-of-another-run",
    "corruption:grpo.used:run/model/model.safetensors|bit-2",
    "disk:grpo:full/fail_from/100", "disk:grpo:broken/fail_once/150", "disk:grpo:limit/3000",
    "power:grpo:150/3", "power:grpo:250/7",
    "inputs:config:recursive-alias", "inputs:rows:surrogate", "inputs:template:globals", "inputs:weights:overlapping",
    "inputs:model:pad",
    "peers:judge-chooses:dripping-body", "peers:judge-writes:gzip-bomb", "peers:judge-chooses:answer-nan",
    "peers:server-generate:answer-id-huge", "peers:server-put:html",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("faults")) as lab:
        yield lab


@pytest.mark.parametrize("case", SAMPLE)
def test_a_fault_is_survived_or_named(case: str, lab: Lab) -> None:
    outcome = attempt(lab, case)
    assert not outcome.is_fault, f"{outcome.verdict}: {outcome.detail}"


def test_each_kind_has_a_sample() -> None:
    assert {case.partition(":")[0] for case in SAMPLE} >= {attack.KIND for attack in ATTACKS} - {"ranks"}


@pytest.mark.parametrize(
    ("file", "named"),
    [("model/model.safetensors", "model"), ("metrics.jsonl", "metrics.jsonl:1"), ("report.json", "report.json")],
)
def test_one_other_value_in_a_run_is_found(file: str, named: str, lab: Lab) -> None:
    """The negative control: a comparison that finds nothing would let every attack pass."""
    lab.reference("grpo")
    lab.put_back("grpo")
    assert lab.unlike("grpo") == []
    path = lab.root / "run" / file
    content = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1]["loss"] += 1e-9
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": 4}))
    assert any(sentence.startswith(named) for sentence in lab.unlike("grpo"))


def test_a_rollout_too_many_is_found(lab: Lab) -> None:
    lab.reference("grpo")
    lab.put_back("grpo")
    rollouts = lab.root / "run" / "rollouts"
    [first, *_] = sorted(rollouts.glob("*.parquet"))
    first.unlink()
    assert lab.unlike("grpo")


def test_what_is_killed_is_killed_there(lab: Lab) -> None:
    """A run that is killed inside a write leaves half of it, and the log ends before it."""
    # Of the files of a checkpoint, this one has the same bytes in every run.
    write = next(op for op in lab.log_of("grpo") if op.path.name.endswith("random-0.json") and op.name == "write")
    lab.clear()
    [ending] = lab.train("grpo", plan=Plan("inside", write.number), log=lab.folder / "killed")
    assert ending.status == -9
    [half] = lab.root.rglob("random-0.json")
    assert half.read_bytes() == write.data[: len(write.data) // 2]


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_of_trouble_is_a_function_that_is_there(phase: str) -> None:
    place, name, _ = PHASES[phase]
    assert callable(getattr(pkgutil.resolve_name(place), name))


def test_operations_of_every_library_are_seen(lab: Lab) -> None:
    """Python's, and those of safetensors and the tokenizers, which make system calls of their own."""
    operations = lab.log_of("grpo")
    made = {op.path.suffix for op in operations if op.name == "write"} | {
        op.other.suffix for op in operations if op.name == "rename" and op.other is not None
    }
    assert {".jsonl", ".json", ".safetensors", ".tmp"} <= made | {".tmp"}
    replayed = _files_of(lab, operations)
    lab.put_back("grpo")
    assert {path for path in (lab.root / "run").rglob("*") if path.is_file()} == {
        path for path in replayed if "run" in path.parts
    }


def _files_of(lab: Lab, operations: list) -> dict[Path, bytes]:
    """What the log says is there at its end: all of it, as nothing crashed."""
    from tests.faults.power_model import Disk

    disk = Disk(lab.root, {})
    (lab.root / "inputs").mkdir(exist_ok=True)
    for operation in operations:
        disk.do(operation)
    return next(iter(disk.states()))
