"""What a run's times are counted under."""

from __future__ import annotations

from spolia.core.journal import Journal
from spolia.runs.lifecycle import phase_seconds


def test_a_phase_within_another_counts_once():
    journal = Journal()
    journal.seconds = {
        "seed 0 fine-tune upright / look": 2.0,
        "seed 0 fine-tune upright": 5.0,
        "seed 1 fine-tune upright": 4.0,
        "seed 0 surgery / fit / look": 1.0,
        "seed 0 surgery / fit": 3.0,
        "seed 0 surgery": 3.5,
        "report": 0.25,
    }
    assert phase_seconds(journal) == {"fine-tune": 9.0, "surgery": 3.5, "report": 0.25}
