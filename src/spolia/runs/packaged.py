"""The recipes that come with the package. Apart from recipe.py, so that completion does not wait for pydantic."""

from __future__ import annotations

from pathlib import Path

from spolia.catalog import Method

FOLDER = Path(__file__).parents[1] / "recipes"


def packaged() -> list[str]:
    """Their names: `merge/ties`, `merge/ties-tiny`, …"""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))


def example_command(method: Method, *, tiny: bool = False) -> str:
    """The command that runs the packaged recipe; of a method that looks at inputs, the one that starts a recipe."""
    if tiny:
        return f"spolia run {method.family}/{method.name}-tiny"
    if method.family not in ("merge", "surgery"):
        return f"spolia run {method.family}/{method.name}"
    if method.data:  # models alone do not make its recipe
        return f"spolia new {method.name} -o my.yaml"
    cls = method.settings_class()
    base = "pool.base=PATH " if cls.base == "required" else ""
    experts = "[PATH]" if cls.experts[1] == 1 else "[PATH, PATH]"
    return f"spolia run {method.family}/{method.name} {base}'pool.experts={experts}'"
