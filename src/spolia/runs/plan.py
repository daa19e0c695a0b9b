"""A plan: what a run would do, what data each phase touches, what it costs and leaves behind. Known before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Phase:
    """One step of a run."""

    name: str
    does: str
    data: str  # what data it touches
    trained: str = "nothing"
    frozen: str = ""
    writes: str = ""


@dataclass
class Input:
    """One model that goes in."""

    name: str
    path: str
    role: str  # base | expert
    tensors: int
    bytes: int
    dtypes: dict[str, int]


@dataclass
class Plan:
    """What a run would do. Sizes in bytes, time in seconds with the basis of the estimate."""

    title: str
    method: str
    phases: list[Phase] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    peak_memory_bytes: int = 0
    disk_needed_bytes: int = 0
    disk_free_bytes: int = 0
    seconds: float = 0.0
    time_basis: str = ""
    cost: dict[str, float] = field(default_factory=dict)  # what the time is made of, see runs/cost.py
    files: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is done without being asked

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_html_(self) -> str:
        from spolia.core.shown import html_text
        from spolia.runs.describe import plan_text

        return html_text(plan_text(self.to_dict()))
