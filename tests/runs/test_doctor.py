"""The doctor knows the traps, names a cure for each, and leaves nothing behind."""

from __future__ import annotations

import pytest

from spolia.runs import doctor


@pytest.mark.parametrize(
    ("versions", "name", "state", "cure"),
    [
        ({}, "torch", "problem", "pip install torch"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "torchvision", "problem", "pip uninstall torchvision"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, "torchvision", "fine", ""),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, "torchvision", "fine", ""),
        ({"torch": "2.13.0+cpu"}, "scikit-learn", "note", "spolia[digits]"),
    ],
)
def test_doctor_knows_the_traps(tmp_path, monkeypatch, versions, name, state, cure):
    monkeypatch.setattr(doctor, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(doctor, "installed", versions.get)
    finding = next(f for f in doctor.examine(tmp_path) if f.name == name)
    assert finding.state == state
    assert cure in finding.cure
    assert finding.cure or finding.state == "fine"
