"""Hostile inputs to `alignlab train`: refused by a sentence, or harmless; none runs code, waits or fills memory."""

from __future__ import annotations

from alignlab.files.manifest import MODEL_MANIFEST
from tests.faults.attack import Outcome, parts, verdict_of_failure
from tests.faults.input_cases import COMPRESSED, FILES, MARK, TABLES, TEMPLATES
from tests.faults.lab import Ending, Lab

KIND, POINTS = "inputs", 1000
SUBJECTS = (*FILES, "template", "compressed", "tables")
PATIENCE_S = 40.0
MOST_MEMORY_MIB = 3000


def cases(lab: Lab, subject: str) -> list[str]:
    """Each content of each file."""
    tables = {"template": TEMPLATES, "compressed": COMPRESSED, "tables": TABLES}
    names = FILES[subject][2] if subject in FILES else tables[subject]
    return [f"{KIND}:{subject}:{name}" for name in names]


def attempt(lab: Lab, case: str) -> Outcome:
    """Write the input, and begin the run that reads it."""
    subject, name = parts(case)
    lab.clear()
    run, overrides = _write(lab, subject, name)
    [ending] = lab.train(run, overrides=overrides, resume=False, timeout_s=PATIENCE_S)
    return _outcome(lab, case, ending)


def _write(lab: Lab, subject: str, name: str) -> tuple[str, list[str]]:
    """Write one content; returns the run and the overrides by which it is read."""
    inputs = lab.root / "inputs"
    (inputs / "policy" / MODEL_MANIFEST).unlink()  # by which any change is known: others' models have none
    if subject in FILES:
        run, file, contents = FILES[subject]
        path = inputs / file
        path.write_bytes(contents[name](path.read_bytes()))
        return run, ["trainer.output_dir=run"] if subject != "config" else []
    if subject == "template":
        (inputs / "policy" / "chat_template.jinja").write_text(TEMPLATES[name], errors="surrogatepass")
        return "grpo", []
    rows = (inputs / "prompts.jsonl").read_bytes()
    suffix, content = ("jsonl.gz", COMPRESSED[name]) if subject == "compressed" else TABLES[name]
    path = inputs / f"rows.{suffix}"
    path.write_bytes(content(rows))
    return "grpo", [f"data.path=inputs/{path.name}"]


def _outcome(lab: Lab, case: str, ending: Ending) -> Outcome:
    if list(lab.root.rglob(MARK)):
        return Outcome(case, "silent", "code of the input was run")
    if ending.was_ended:
        return Outcome(case, "hung", f"no end within {PATIENCE_S:g} s: {ending.message[-300:]}")
    if ending.memory_mib > MOST_MEMORY_MIB:
        return Outcome(case, "hung", f"{ending.memory_mib} MiB of memory")
    if ending.is_done:
        return Outcome(case, "harmless", ending.message[-300:])
    verdict, detail = verdict_of_failure(ending)
    return Outcome(case, verdict, detail)
