"""Settings of the losses that compare features: which modules of the student go with which of the teacher."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError


class Sites(Settings):
    """Modules whose outputs are compared, by name, in pairs."""

    student_sites: tuple[str, ...] = setting((), "modules of the student, by name", source="our choice")
    teacher_sites: tuple[str, ...] = setting((), "modules of the teacher, one for each", source="our choice")

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.student_sites) != len(self.teacher_sites):
            raise ValueError(f"{len(self.student_sites)} student_sites for {len(self.teacher_sites)} teacher_sites")
        return self

    def pairs(self, where: str) -> tuple[tuple[str, str], ...]:
        """(student's, teacher's) module names; SpoliaError where there are none."""
        if not self.student_sites:
            mend = "student_sites=['layer2'], teacher_sites=['layer2']: names as in model.named_modules()"
            raise SpoliaError("no modules are named", where=where, mend=mend)
        return tuple(zip(self.student_sites, self.teacher_sites, strict=True))
