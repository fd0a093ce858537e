"""Shows the progress of a run: a live bar for each phase on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from abflax.runtime.reporter import Reporter

_PLAIN_SECONDS = 10.0


class RichReporter(Reporter):
    """Shows one line per phase: label, bar, epochs, loss, test error, images/s, time left.

    Args:
      console: the output. If it is not a terminal, a plain line appears at most every ten seconds,
        and one at the end of each phase.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            _Summary(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=20,
        )
        self._task: Any = None
        self._fields: dict[str, Any] = {}

    @contextmanager
    def shown(self) -> Iterator[RichReporter]:
        """Shows the bars while the context lasts."""
        if not self._console.is_terminal:
            yield self
            return
        with self._bars:
            yield self

    def phase(self, label: str, name: str, steps: int, done: int, epochs: int) -> None:
        """Starts a bar."""
        self._fields = {"epochs": epochs, "epoch": 0.0, "loss": None, "measured": "", "rate": 0.0}
        # While initialising the classifier is untrained, and its error says nothing.
        self._fields["shown"] = "agreement" if name == "initialise" else "error"
        if name == "initialise":
            self._fields["measured"] = "classifier not trained yet"
        self._label, self._total = f"{label}  {name}", steps
        self._done = done
        self._started = self._printed = time.perf_counter()
        self._images, self._timed, self._busy = 0, 0, 0.0
        self._last: float | None = None
        if self._console.is_terminal:
            description = f"[bold]{label}[/bold]  {name:<10}"
            self._task = self._bars.add_task(
                description, total=steps, completed=done, **self._fields
            )

    def steps(self, count: int, images: int, epoch: float, loss: float | None) -> None:
        """Advances the bar."""
        now = time.perf_counter()
        self._done += count
        if self._last is not None:  # the rate excludes compilation and evaluation
            self._images += images
            self._timed += count
            self._busy += now - self._last
            self._fields["rate"] = self._images / max(self._busy, 1e-9)
        self._last = now
        self._fields["epoch"] = epoch
        if loss is not None:
            self._fields["loss"] = loss
        self._show()

    def evaluated(self, entry: dict[str, Any]) -> None:
        """Shows the newest test error; while initialising, the layers' mean agreement."""
        measured = entry.get("test_error")
        if self._fields["shown"] == "agreement":
            shares = entry.get("agreement", {}).values()
            measured = statistics.fmean(shares) if shares else None
        self._fields["loss"] = entry["loss"]
        if measured is not None:
            self._fields["measured"] = f"{self._fields['shown']} {100 * measured:.2f} %"
        self._fields["epoch"] = entry["epoch_of_phase"]
        self._last = None
        self._show()

    def finished(self, note: str = "") -> None:
        """Ends the bar."""
        if note:
            self._console.print(note, style="dim", highlight=False)
            return
        seconds = time.perf_counter() - self._started
        if self._console.is_terminal:
            self._bars.update(self._task, seconds=seconds, **self._fields)
        else:
            self._line(f"done in {seconds:.0f} s")

    def _show(self) -> None:
        if self._console.is_terminal:
            self._bars.update(self._task, completed=self._done, **self._fields)
        elif time.perf_counter() - self._printed > _PLAIN_SECONDS:
            self._printed = time.perf_counter()
            left = "compiled"
            if self._timed:
                seconds = self._busy / self._timed * (self._total - self._done)
                left = f"{_duration(seconds)} left"
            self._line(left)

    def _line(self, end: str) -> None:
        text = f"{self._label}  {self._done}/{self._total}  {_describe(self._fields)}  {end}"
        self._console.print(text, highlight=False, soft_wrap=True)


class _Summary(ProgressColumn):
    """The text to the right of the bar."""

    def render(self, task: Task) -> Text:
        text = _describe(task.fields)
        if task.finished:
            return Text(f"{text}  {_duration(task.fields.get('seconds', task.elapsed or 0))}")
        left = task.time_remaining
        return Text(f"{text}  {_duration(left)} left" if left is not None else f"{text}  compiling")


def _describe(fields: dict[str, Any]) -> str:
    """Formats the numbers of one phase that are known."""
    parts = (
        f"epoch {fields['epoch']:.1f}/{fields['epochs']}",
        "" if fields["loss"] is None else f"loss {fields['loss']:.3g}",
        fields["measured"],
        f"{fields['rate']:,.0f} images/s" if fields["rate"] else "",
    )
    return "  ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
