"""Damage to each file of a run: it is named, made again, or of no consequence; never taken as true.

The states of a run in which its files are damaged, and what is done then:

    stopped     killed between its last two checkpoints; resumed
    finished    resumed
    cached      its caches and models are there, and the run's folder is not; begun
    used        finished; what it made is read, as by generate, eval, merge and the next run
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults import runs
from tests.faults.attack import Outcome, Verdict, parts, verdict_of_failure
from tests.faults.lab import Ending, Lab
from tests.faults.mutations import MUTATIONS, mutated
from tests.faults.operations import Plan
from tests.faults.readings import NAMED, UNNAMED
from tests.faults.results import how_they_differ

KIND, POINTS = "corruption", 45
_CACHED = ("dpo", "kto", "distill", "rlaif", "rlaif_reward")
_USED = ("sft", "dpo", "reward", "grpo", "ppo", "rlaif_reward", "warm")
_SPREAD = ("sft_fsdp2@2", "ppo_zero2@2", "grpo_zero3@2")
SUBJECTS = (
    *(f"{run}.{state}" for state in ("stopped", "finished") for run in runs.RUNS),
    *(f"{run}.stopped" for run in _SPREAD),
    *(f"{run}.cached" for run in _CACHED),
    *(f"{run}.used" for run in _USED),
)
CHANGED, GONE = "on the run has other settings", "is gone: the run goes on without"
_UNREAD = ("README.md", "curves.png", "trackers")
_REPLACED = ("removed", "other-step", "other-run")
_FOLDERS = ("swapped-folders", "renamed-folder", "copied-folder", "folder-of-another-run", "removed-folder")


def cases(lab: Lab, subject: str) -> list[str]:
    """Each damage of each file, and of each folder of a checkpoint."""
    _prepare(lab, subject)
    lab.put_back(subject)
    found = []
    for path in _files(lab.root, subject):
        content = path.read_bytes()
        name = path.relative_to(lab.root)
        possible = [how for how in MUTATIONS if mutated(content, how, str(name)) is not None]
        replaced = [how for how in _REPLACED if how == "removed" or _replacement(lab, subject, name, how) is not None]
        found += [f"{KIND}:{subject}:{name}|{how}" for how in (*possible, *replaced)]
    if not subject.endswith((".used", ".cached")):
        found += [
            f"{KIND}:{subject}:{path.relative_to(lab.root)}|{how}"
            for path in sorted(lab.root.glob("run/**/checkpoints/step-*")) for how in _FOLDERS
        ]
    return found


def attempt(lab: Lab, case: str) -> Outcome:
    """Damage one file, and do what is done in this state."""
    subject, how = parts(case)
    name, damage = how.split("|")
    run, state = subject.split(".")
    _prepare(lab, subject)
    expected = _expected(lab, subject)
    lab.put_back(subject)
    path = lab.root / name
    if damage in _FOLDERS:
        _damage_folder(lab, subject, path, damage)
    else:
        _damage_file(lab, subject, path, damage)
    damaged = path.read_bytes() if path.is_file() else None
    said = ""
    if state != "used":
        endings = lab.train(run, resume=state != "cached")
        failed = [ending for ending in endings if not ending.is_done]
        if failed:  # a rank that the server ended, as another had failed, has said nothing
            return _failure(case, path, next((ending for ending in failed if not ending.was_ended), failed[0]))
        said = endings[0].text
    [ending] = lab.ask("read")
    if ending.traceback is not None:
        return Outcome(case, "unnamed", ending.message)
    verdict, detail = _compared(ending.value, expected)
    if verdict == "silent" and ((path.parent.name == "inputs" and CHANGED in said) or f"{path} {GONE}" in said):
        return Outcome(case, "named", "the run goes on with the user's other input, or without the file, and says so")
    if verdict == "harmless" and path.is_file() and path.read_bytes() != damaged:
        verdict = "made again"
    return Outcome(case, verdict, detail)


def _prepare(lab: Lab, subject: str) -> None:
    """Bring a run into the state, and another run of another seed, and keep both."""
    if lab.is_kept(subject):
        return
    run, state = subject.split(".")
    operations = lab.log_of(run)
    plan = Plan()
    if state == "stopped":
        renamed = [(op.number, op.other.name) for op in operations if op.name == "rename" and op.other is not None]
        saved = [number for number, name in renamed if name.startswith("step-") and "." not in name]
        plan = Plan("before", (saved[-2] + saved[-1]) // 2)
    for name, overrides in ((f"{subject}-other", ["trainer.seed=1"]), (subject, [])):
        lab.clear()
        lab.train(run, plan=plan, overrides=overrides)
        if state == "cached":
            shutil.rmtree(lab.root / "run")
        lab.keep(name)


def _expected(lab: Lab, subject: str) -> dict[str, str]:
    """What is read where nothing was damaged."""
    if subject not in lab.notes:
        run, state = subject.split(".")
        lab.put_back(subject)
        if state != "used":
            for ending in lab.train(run, resume=state != "cached"):
                assert ending.is_done, ending.message
        [ending] = lab.ask("read")
        assert ending.traceback is None, ending.traceback
        lab.notes[subject] = ending.value
    expected: dict[str, str] = lab.notes[subject]
    wrong = [value for value in expected.values() if value.startswith((NAMED, UNNAMED))]
    assert not wrong, wrong
    return expected


def _files(root: Path, subject: str) -> Iterator[Path]:
    run, state = subject.split(".")
    config = (root / "inputs" / f"{runs.split_name(run)[0]}.yaml").read_text()
    for path in sorted(root.rglob("*")):
        part = path.relative_to(root).parts
        if not path.is_file() or path.suffix == ".lock" or path.name == ".lock" or set(part) & set(_UNREAD):
            continue
        if path.name.startswith(".tmp"):  # a random name of safetensors', in what a kill left
            continue
        is_model = len(part) > 2 and f"inputs/{part[1]}" in config
        if state == "used":
            wanted = part[0] == "run" and path.parent.name in ("model", "adapter")
        elif state == "cached":
            wanted = part[0] == "cache" or is_model
        elif state == "stopped":
            wanted = part[0] != "inputs" or is_model or f"inputs/{part[1]}" in config
        else:
            wanted = part[0] != "inputs"
        if wanted:
            yield path


def _replacement(lab: Lab, subject: str, name: Path, how: str) -> bytes | None:
    """The same file of another step or of another run, where there is one and it differs."""
    kept = lab.kept(subject)
    own = (kept / name).read_bytes()
    if how == "other-run":
        places = [lab.kept(f"{subject}-other") / name]
    else:
        step = next((part for part in name.parts if part.startswith("step-")), None)
        if step is None:
            return None
        siblings = sorted((kept / str(name).partition(step)[0]).glob("step-*"))
        places = [kept / str(name).replace(step, sibling.name) for sibling in siblings if sibling.name != step]
    found = [path.read_bytes() for path in places if path.is_file()]
    return next((content for content in found if content != own), None)


def _damage_file(lab: Lab, subject: str, path: Path, how: str) -> None:
    name = path.relative_to(lab.root)
    if how == "removed":
        path.unlink()
        return
    content = _replacement(lab, subject, name, how) if how in _REPLACED else mutated(path.read_bytes(), how, str(name))
    assert content is not None, f"{name} cannot have {how}"
    path.write_bytes(content)


def _damage_folder(lab: Lab, subject: str, path: Path, how: str) -> None:
    """Damage among whole checkpoints, each of which is intact."""
    later = path.with_name("step-00000009")
    if how == "removed-folder":
        shutil.rmtree(path)
    elif how == "renamed-folder":
        path.rename(path.with_name(f"{path.name}.bak"))
    elif how == "copied-folder":
        shutil.copytree(path, later)
    elif how == "folder-of-another-run":
        shutil.rmtree(path)
        shutil.copytree(lab.kept(f"{subject}-other") / path.relative_to(lab.root), path)
    else:
        others = [other for other in sorted(path.parent.glob("step-*")) if other != path]
        if others:
            path.rename(later)
            others[0].rename(path)
            later.rename(others[0])


def _failure(case: str, path: Path, ending: Ending) -> Outcome:
    """Of a run that refuses to go on: its message must lead to the file; of a user's own, to what they are."""
    verdict, detail = verdict_of_failure(ending)
    said = ending.text.rpartition("alignlab train: ")[2]
    is_users = path.parent.name == "inputs"
    places = (path.name, str(path.parent), path.parent.name)
    if verdict == "named" and not is_users and not any(place in said for place in places):
        return Outcome(case, "vague", f"it does not say where: {said}")
    return Outcome(case, verdict, detail)


def _told(value: str, expected: str) -> str:
    return value[:300] if value.startswith(NAMED) else how_they_differ(value, expected)


def _compared(read: dict[str, str], expected: dict[str, str]) -> tuple[Verdict, str]:
    """Whether what is read is right, refused, or wrong."""
    others = {name: value for name, value in read.items() if expected.get(name) != value}
    # An old checkpoint that somebody removed is no loss.
    others |= {name: "nothing" for name in expected if name not in read and "/step-" not in name}
    told = [f"{name}: {_told(value, expected.get(name, ''))}" for name, value in others.items()]
    if any(value.startswith(UNNAMED) for value in others.values()):
        return "unnamed", next(value for value in others.values() if value.startswith(UNNAMED))[-1000:]
    if any(not value.startswith(NAMED) for value in others.values()):
        return "silent", "; ".join(told)
    return ("named" if others else "harmless"), "; ".join(told)
