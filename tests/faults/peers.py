"""Judges and servers that are slow, endless, broken or lie: named within their deadline, never believed."""

from __future__ import annotations

from tests.faults.attack import Outcome, parts
from tests.faults.hostile_peer import ABOUT, ANSWERS, GENERATED, JUDGED, WIRE, Behaviour, HostilePeer, says
from tests.faults.lab import Ending, Lab

KIND, POINTS = "peers", 1000
SUBJECTS = ("judge-chooses", "judge-writes", "server-about", "server-put", "server-generate")
PATIENCE_S = 200.0
MOST_MEMORY_MIB = 1500
_WELL = {
    "GET /alignlab/about": says(ABOUT), "PUT /alignlab/weights": says({"arrived": {}}),
    "POST /alignlab/release": says({}), "POST /inference": GENERATED["stop-reason"],
}  # fmt: skip
_HOSTILE_AT = {
    "judge-chooses": "POST", "judge-writes": "POST", "server-about": "GET /alignlab/about",
    "server-put": "PUT /alignlab/weights", "server-generate": "POST /inference",
}  # fmt: skip


def _behaviours(subject: str) -> dict[str, Behaviour]:
    own = {"judge-chooses": JUDGED, "judge-writes": JUDGED, "server-generate": GENERATED}.get(subject, {})
    return WIRE | ANSWERS | {f"answer-{name}": what for name, what in own.items()}


def cases(lab: Lab, subject: str) -> list[str]:
    """Each behaviour of each peer."""
    return [f"{KIND}:{subject}:{name}" for name in _behaviours(subject)]


def attempt(lab: Lab, case: str) -> Outcome:
    """Ask the peer."""
    subject, name = parts(case)
    lab.clear()
    with HostilePeer({_HOSTILE_AT[subject]: _behaviours(subject)[name]}, _WELL) as peer:
        if subject.startswith("judge"):
            call, arguments = "ask_judge", {"port": peer.port, "writes": subject == "judge-writes"}
        else:
            call, arguments = "ask_pool", {"port": peer.port}
        [ending] = lab.ask(f"tests.faults.peer_tasks:{call}", arguments, timeout_s=PATIENCE_S)
    return _outcome(case, ending)


def _outcome(case: str, ending: Ending) -> Outcome:
    if ending.was_ended:
        return Outcome(case, "hung", f"no end within {PATIENCE_S:g} s")
    if ending.memory_mib > MOST_MEMORY_MIB:
        return Outcome(case, "hung", f"{ending.memory_mib} MiB of memory")
    if ending.traceback is not None or not isinstance(ending.value, dict):
        return Outcome(case, "unnamed", ending.message)
    if "named" in ending.value:
        return Outcome(case, "named", ending.value["named"][:300])
    return Outcome(case, "harmless" if ending.value["believable"] else "silent", str(ending.value["answer"])[:300])
