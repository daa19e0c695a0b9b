"""A loss inside another's settings: by name, with settings, written back; what is wrong is told with its place."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from spolia.core.settings import Settings, setting
from spolia.methods.distill.bases import Base, objective_of
from spolia.methods.distill.ctkd import Ctkd
from spolia.methods.distill.dkd import Dkd
from spolia.methods.distill.fitnets import Fitnets
from spolia.methods.distill.kd import Kd
from spolia.methods.distill.lskd import Lskd


class Holder(Settings):
    base: Base = setting("kd", "a loss", source="-", validate_default=True)


def test_a_base_is_read_and_written() -> None:
    assert Holder().base == Kd()
    assert Holder(base="dkd").base == Dkd()
    assert Holder(base={"name": "dkd", "beta": 2}).base == Dkd(beta=2.0)
    assert Holder(base=Kd(alpha=1.0)).base == Kd(alpha=1.0)
    deep = Holder(base={"name": "lskd", "base": {"name": "ctkd", "base": "dkd"}})
    assert deep.base == Lskd(base=Ctkd(base=Dkd()))
    for holder in (Holder(base="dkd"), deep):
        assert Holder(**holder.model_dump(mode="json")) == holder
    assert Holder(base="dkd").model_dump(mode="json")["base"]["name"] == "dkd"
    Holder.model_json_schema()


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("kdd", "did you mean `kd`"),
        ({"beta": 2}, "none of its losses"),
        ({"name": "dkd", "betta": 2}, "betta"),
        ({"name": "dkd", "beta": -1}, "beta"),
        (3, "none of its losses"),
    ],
)
def test_what_is_wrong_is_named(base: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Holder(base=base)


def test_every_base_has_an_objective() -> None:
    sites = {"student_sites": ["a"], "teacher_sites": ["b"]}
    for name in ("kd", "dkd", "dist", "nkd", "lskd", "mlkd", "ctkd", "rkd", "fitnets", "attention"):
        more = sites if name in ("fitnets", "attention") else {}
        objective = objective_of(Holder(base={"name": name, **more}).base)
        assert objective.views == (2 if name == "mlkd" else 1)
    assert objective_of(Fitnets(**sites)).taps == (("a", "b"),)
