"""Progress of a training: a live display on a terminal, one line a step elsewhere, always on stderr."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "informative_frac": ("informative", "{:.2f}"),
    "loss": ("loss", "{:.4f}"),
    "kl": ("KL", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "completion_tokens": ("length", "{:.1f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "eval/greedy": ("held-out greedy", "{:.3f}"),
    "eval/sampled": ("held-out sampled", "{:.3f}"),
}
"""Label and format of each metric that is shown, in the order of the display."""
RARE = ("eval/", "kl")
"""Prefixes of metrics that are not measured at every step: their last value stays on the display."""
TREND = ("reward", "loss")
"""The first of these metrics that a training has is drawn as a row of bars."""
SPARKS = "▁▂▃▄▅▆▇█"
TREND_STEPS = 40
RECENT_STEPS = 20


class TrainingProgress:
    """Display of the step, the metrics, the phase and the time left of a training.

    Args:
        total_steps: number of steps of the whole training.
        title: text before the steps.
        done_steps: number of steps that earlier starts of a resumed run have done.
        enabled: False shows nothing (on other ranks than the first).
        console: where to show; default: stderr.
        on_phase: called whenever a phase begins.

    Attributes:
        num_phases: number of phases that have begun.
        phase_seconds: duration of each phase of the last step.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        done_steps: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        on_phase: Callable[[], object] = lambda: None,
    ) -> None:
        self.phase_seconds: dict[str, float] = {}
        self._total, self._done, self._title = total_steps, done_steps, title
        self._enabled = enabled
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._phases: list[str] = []
        self.num_phases = 0
        self._on_phase = on_phase
        self._failed_phase: str | None = None
        self._phase_sums: dict[str, float] = {}
        self._metrics: Mapping[str, float] = {}
        self._trend: deque[float] = deque(maxlen=TREND_STEPS)
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._started = self._last = time.perf_counter()

    def __enter__(self) -> Self:
        self._started = self._last = time.perf_counter()
        if self._enabled and self._console.is_terminal:
            # Standard output is not redirected: the run's result is written there.
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase ("generate", "score", "update") while this context runs, and measure its duration."""
        start = time.perf_counter()
        self._phases.append(name)
        self.num_phases += 1
        self._failed_phase = None
        self._on_phase()
        try:
            yield
        except BaseException:
            self._failed_phase = self._phases[0]
            raise
        finally:
            self._phases.pop()
            self._phase_sums[name] = self._phase_sums.get(name, 0.0) + time.perf_counter() - start

    @property
    def current_phase(self) -> str:
        """Outermost phase that runs, or the one that has just failed; may be read from any thread."""
        phases = tuple(self._phases)
        return phases[0] if phases else self._failed_phase or "between phases"

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step that is done."""
        end = time.perf_counter()
        self._durations.append(end - self._last)
        self._last, self._done = end, step
        self.phase_seconds, self._phase_sums = self._phase_sums, {}
        self._metrics = {**{k: v for k, v in self._metrics.items() if k.startswith(RARE)}, **metrics}
        trend = next((metrics[name] for name in TREND if name in metrics), None)
        if trend is not None:
            self._trend.append(trend)
        if self._enabled and self._live is None:
            self._print(self._line(metrics))

    def note(self, text: str) -> None:
        """Print a line above the display."""
        if self._enabled:
            self._print(text)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the pace of the last steps; None before the first."""
        if not self._durations:
            return None
        return sum(self._durations) / len(self._durations) * (self._total - self._done)

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _line(self, metrics: Mapping[str, float]) -> str:
        title = f"{self._title} " if self._title else ""
        values = "".join(f"  {label} {value}" for label, value in shown(metrics))
        phases = "".join(f"  {name} {seconds:.1f}s" for name, seconds in self.phase_seconds.items())
        return f"{title}step {self._done}/{self._total}{values}{phases}  left {clock(self.seconds_left)}"

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 1))
        elapsed = clock(time.perf_counter() - self._started)
        head.add_row(
            Text(f"{self._title} step {self._done}/{self._total}".strip(), style="bold"),
            ProgressBar(total=self._total, completed=self._done, width=30),
            Text(f"{elapsed} gone, {clock(self.seconds_left)} left"),
            Text(self._phases[-1] if self._phases else "", style="cyan"),
        )
        cells = shown(self._metrics)
        body = Table.grid(padding=(0, 2))
        body.add_row(*[Text(label, style="dim") for label, _ in cells])
        body.add_row(*[Text(value, style="bold") for _, value in cells])
        spent = "  ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phase_seconds.items())
        return Group(head, body, Text(f"{sparkline(self._trend)}  {spent}".strip(), style="green"))


def shown(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return label and text of the metrics that the display shows, in its order."""
    return [(label, form.format(metrics[name])) for name, (label, form) in SHOWN.items() if name in metrics]


def clock(seconds: float | None) -> str:
    """Return a duration as h:mm:ss or m:ss; `?` for None."""
    if seconds is None:
        return "?"
    total_minutes, remainder_s = divmod(round(seconds), 60)
    hours, minutes = divmod(total_minutes, 60)
    return f"{hours}:{minutes:02d}:{remainder_s:02d}" if hours else f"{minutes}:{remainder_s:02d}"


def sparkline(values: deque[float]) -> str:
    """Return the finite values as a row of bars, scaled from the least to the greatest of them."""
    finite = [value for value in values if abs(value) < float("inf")]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in finite)
