"""Progress of the training loop as plain lines, without a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from abflax.runtime import rich_reporter
from abflax.runtime.rich_reporter import RichReporter


@pytest.fixture
def lines(monkeypatch):
    """Returns a reporter that prints at every call while no time passes, and its output."""
    monkeypatch.setattr(rich_reporter, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(rich_reporter, "_PLAIN_SECONDS", -1.0)
    text = io.StringIO()
    live = RichReporter(Console(file=text, width=200))
    live.phase("kd seed 0", "classify", steps=8, done=2, epochs=2)
    return live, text


def test_a_line_says_where_the_run_is(lines):
    live, text = lines
    live.steps(1, 128, 0.25, None)
    live.steps(1, 128, 0.5, 1.25)
    first, second = text.getvalue().splitlines()
    assert first == "kd seed 0  classify  3/8  epoch 0.2/2  compiled"
    assert second.startswith("kd seed 0  classify  4/8  epoch 0.5/2  loss 1.25  ")
    assert second.endswith(" left")


def test_a_loss_that_is_not_known_yet_leaves_the_last_one(lines):
    """After a checkpoint the loss of no step is pending."""
    live, text = lines
    live.steps(1, 128, 0.25, 1.25)
    live.steps(1, 128, 0.5, None)
    assert "loss 1.25" in text.getvalue().splitlines()[1]


def test_an_evaluation_and_the_end(lines):
    live, text = lines
    live.evaluated({"test_error": 0.0898, "loss": 0.5, "epoch_of_phase": 1})
    live.finished()
    live.finished("kd seed 1 is finished already")
    _, end, note = text.getvalue().splitlines()
    assert "epoch 1.0/2  loss 0.5  error 8.98 %" in end and " done in 0 s" in end
    assert note == "kd seed 1 is finished already"


def test_while_the_classifier_is_untrained_its_error_is_not_shown(lines):
    live, text = lines
    live.phase("activation-boundary seed 0", "initialise", steps=8, done=0, epochs=2)
    live.steps(1, 128, 0.5, 7.0)
    live.evaluated({"test_error": 0.968, "loss": 6, "epoch_of_phase": 1, "agreement": {}})
    agreement = {"layer1": 0.75, "layer2": 0.875}
    live.evaluated({"test_error": 0.968, "loss": 5, "epoch_of_phase": 1, "agreement": agreement})
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[5] for line in lines] == 2 * ["classifier not trained yet"] + [
        "agreement 81.25 %"
    ]
