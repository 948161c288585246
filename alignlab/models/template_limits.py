"""Chat templates rendered within limits: a template is a program of its author's, and need not end.

A rendering that computes for too long, or fills memory, is stopped between two of its steps (`interruption`). A single
step that never ends cannot be stopped: it is refused before it is done (`check_template`, `template_sandbox`).
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase

from alignlab.errors import DataError
from alignlab.models.interruption import Interruption
from alignlab.models.template_sandbox import limit_chat_templates
from alignlab.models.template_sizes import FIX as _FIX

CPU_LIMIT_S = 10.0
"""Of one rendering: time of its thread on a core. A long chat takes a hundredth of a second."""
MEMORY_LIMIT_BYTES = 2**30
"""By which this process may grow while one chat is rendered."""
MAX_TEMPLATE_CHARS = 2**20
LARGEST_LITERAL = 10**6
_LOOK_S = 0.02
_Result = TypeVar("_Result")
limit_chat_templates()


def render_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return the text of `tokenizer.apply_chat_template`, rendered within the limits of this module.

    Args:
        options: as `apply_chat_template` takes them.

    Raises:
        DataError: the template is, computes or writes more than a limit allows.
        Exception: whatever the template raises.
    """
    check_template(tokenizer.get_chat_template(options.get("chat_template"), options.get("tools")))
    given = [dict(message) for message in messages]
    return str(within_limits(lambda: tokenizer.apply_chat_template(given, tokenize=False, **options)))


@functools.lru_cache
def check_template(template: str) -> None:
    """Refuse a template that is too long to be compiled, or in which one step may never end.

    Raises:
        DataError: with what it holds.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise DataError(
            f"a chat template must have at most {MAX_TEMPLATE_CHARS} characters, and has {len(template)}; {_FIX}"
        )
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:  # said, with its line, when it is rendered
        return
    for line, kind, text in tokens:
        if kind == "operator" and text == "**":
            raise DataError(f"line {line} of the chat template raises to a power (**), which need not end; {_FIX}")
        if kind in ("integer", "float") and _is_large(text, int if kind == "integer" else float):
            raise DataError(
                f"line {line} of the chat template holds the number {text[:40]}, and numbers must be at most "
                f"{LARGEST_LITERAL}: it may be how often something is done; {_FIX}"
            )


def _is_large(literal: str, kind: type[int] | type[float]) -> bool:
    digits = literal.replace("_", "")
    if len(digits) > 40:  # Python reads no number of thousands of digits
        return True
    return (int(digits, 0) if kind is int else float(digits)) > LARGEST_LITERAL


def within_limits(render: Callable[[], _Result]) -> _Result:
    """Return what a function returns; stop it where it computes for too long, or fills memory.

    Raises:
        DataError: it was stopped.
    """
    rendering = _Rendering()
    _watcher().add(rendering)
    try:
        return rendering.interruption.run(render)
    except Interruption.Interrupted:
        raise DataError(
            f"a chat must be rendered within {rendering.limit}, and the chat template has not ended by then; {_FIX}"
        ) from None
    finally:
        _watcher().remove(rendering)


class _Rendering:
    """One rendering of this thread."""

    def __init__(self) -> None:
        self.interruption = Interruption()
        self.limit = ""
        thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None
        self._held_bytes: int | None = None
        self._start = self._now()

    def _now(self) -> float:
        return time.monotonic() if self._clock is None else time.clock_gettime(self._clock)

    def look(self, resident_bytes: int) -> None:
        """Stop it if it is beyond a limit."""
        self._held_bytes = resident_bytes if self._held_bytes is None else self._held_bytes
        try:
            seconds = self._now() - self._start
        except OSError:  # its thread is gone, and so is the rendering
            return
        if seconds > CPU_LIMIT_S:
            self.limit = f"{CPU_LIMIT_S:g} s"
        elif resident_bytes - self._held_bytes > MEMORY_LIMIT_BYTES:
            self.limit = f"{MEMORY_LIMIT_BYTES / 2**30:g} GiB of memory"
        if self.limit:
            self.interruption.raise_now()


class _Watcher:
    """Looks at all renderings of this process from a thread of its own, which sleeps while there is none."""

    def __init__(self) -> None:
        self._renderings: set[_Rendering] = set()
        self._is_needed = threading.Event()
        threading.Thread(target=self._work, name="alignlab-template", daemon=True).start()

    def add(self, rendering: _Rendering) -> None:
        self._renderings.add(rendering)
        self._is_needed.set()

    def remove(self, rendering: _Rendering) -> None:
        self._renderings.discard(rendering)

    def _work(self) -> None:
        while self._is_needed.wait():
            time.sleep(_LOOK_S)
            renderings = self._renderings.copy()
            if not renderings:
                self._is_needed.clear()
                renderings = self._renderings.copy()  # one may have begun meanwhile
                if renderings:
                    self._is_needed.set()
            resident = _resident_bytes() if renderings else 0
            for rendering in renderings:
                rendering.look(resident)


@functools.cache
def _watcher_of(process: int) -> _Watcher:
    return _Watcher()


def _watcher() -> _Watcher:
    """The watcher of this process, which may be the fork of another."""
    return _watcher_of(os.getpid())


def _resident_bytes() -> int:
    """Memory that this process has in use; 0 where that is not known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
