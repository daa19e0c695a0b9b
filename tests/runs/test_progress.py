"""Progress: a line every ten seconds, JSON by the second, or a bar."""

from __future__ import annotations

import json
import sys

from spolia.runs import progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_says_a_line_every_ten_seconds(capsys):
    clock = Clock()
    plain = progress.PlainProgress(clock)
    plain.start("train", 100)
    for second in range(1, 31):
        clock.now = float(second)
        plain.advance(2, loss=0.5)
    plain.finish()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 5  # the start, three times ten seconds, the end
    assert lines[1] == "train: 20% of 100 steps, 10 s, 40 s left, loss 0.5"
    assert lines[-1] == "train: 60% of 100 steps, 30 s, loss 0.5"


def test_json_progress_is_json_by_the_second(capsys):
    clock = Clock()
    told = progress.JsonProgress(clock)
    told.start("merge", 10, "B")
    for tenth in range(1, 11):
        clock.now = tenth / 5
        told.advance(1)
    told.finish()
    rows = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [row["done"] for row in rows] == [0, 5, 10, 10]
    assert [row["ended"] for row in rows] == [False, False, False, True]


def test_a_bar_survives_its_whole_life(capsys):
    bar = progress.RichProgress()
    bar.advance(1)  # before any phase: nothing
    bar.start("merge", 3, "B")
    bar.advance(1, loss=0.25)
    bar.start("check", 1)
    bar.advance(1)
    bar.finish()
    assert "merge" in capsys.readouterr().err


def test_quiet_is_silent_and_a_pipe_is_plain(monkeypatch):
    assert progress.choose(quiet=True) is None
    assert progress.choose(quiet=True, json=True) is None
    assert isinstance(progress.choose(json=True), progress.JsonProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress.choose(), progress.PlainProgress)
