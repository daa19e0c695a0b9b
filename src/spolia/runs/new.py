"""Commented recipes, written from a method's settings: one source for `spolia new` and for those in the package.

`python -m spolia.runs.new` writes the packaged ones again after a settings class or the catalog has changed.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, get_args

from spolia.catalog import METHODS, Method
from spolia.core.settings import PerModel
from spolia.data.digits import SIZES
from spolia.errors import SpoliaError
from spolia.runs.fields import describe_field, kind, yaml_value
from spolia.runs.packaged import FOLDER, example_command
from spolia.runs.schema import VERSION, Domain, Output
from spolia.runs.studies import STUDIES, module_of

WIDTH = 116


def recipe_text(method: Method, *, tiny: bool = False, file: str = "") -> str:
    """A recipe with every setting of `method` at its default, each with its meaning, range and origin above it.

    `tiny`: on real digits, for a first look. `file`: the name it will be saved under, empty for a packaged recipe.
    """
    parts = [_header(method, tiny, file), f"spolia: {VERSION}  # version of the recipe's form", _draws(method, tiny)]
    if method.family in STUDIES:
        parts += [module_of(method.family).problem_text(method, tiny), _method(method)]
        return "\n".join(parts) + "\n"
    parts += [_digits_pool(method) if tiny else _folders_pool(method), _method(method)]
    if not tiny:
        parts.append(_output())
    return "\n".join(parts) + "\n"


def write_recipe(method: Method, file: Path, *, tiny: bool = False) -> Path:
    """`recipe_text` to a new file."""
    try:
        with file.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(recipe_text(method, tiny=tiny, file=file.as_posix()))
    except FileExistsError:
        raise SpoliaError("the file exists", where=str(file), mend="choose another name, or delete it first") from None
    except OSError as error:
        raise SpoliaError(
            f"cannot be written: {error.strerror}", where=str(file), mend="choose another place"
        ) from None
    return file


def _header(method: Method, tiny: bool, file: str) -> str:
    study = method.family in STUDIES
    command = f"spolia run {file}" if file else example_command(method, tiny=tiny)
    if study:
        time, score, data = module_of(method.family).told(method, tiny)
    elif tiny:
        time = "under a minute on two cores"
        score = "measured by the run on held-out digits, beside each expert and the baselines"
        sees = f"{SIZES['validation']} of them a domain, without labels" if method.data else "none"
        data = f"scikit-learn's digits train the experts and test the result; the {method.family} itself sees {sees}"
    else:
        time = f"that of {method.cost}" + (
            "" if method.data else " of the models from disk; `spolia plan` estimates it"
        )
        score = "that of the experts is what to hope for; measure it with your own test data"
        given = f"{method.data} of every task, named under `tasks`; labelled test inputs to count on"
        data = given if method.data else "none: weights only, no inputs, no labels"
    lines = {
        "paper": method.paper,
        "command": command,
        "time": time,
        "score": score,
        "data": data,
        "origin": "each default's source stands in its line",
    }
    text = [f"# {method.name}: {method.summary}", *(f"# {key + ':':9}{value}" for key, value in lines.items())]
    if file:
        text += ["# editor:  spolia schema > spolia.schema.json", "# yaml-language-server: $schema=spolia.schema.json"]
    return "\n".join([*text, ""])


def _draws(method: Method, tiny: bool) -> str:
    study = method.family in STUDIES
    repeats = "repeats with seeds seed, seed+1, …; more give an interval"
    if not (tiny or study):
        repeats = "repeats; models on disk take 1"
    learns = study or (tiny and bool(method.data) and method.family == "merge")  # differs from seed to seed
    count = (3 if tiny else 5) if study else 3 if learns else 1
    return f"seed: 0  # every random draw follows from it; whole number\nseeds: {count}  # {repeats}"


def _folders_pool(method: Method) -> str:
    cls = method.settings_class()
    lines = ["", "pool:  # paths are relative to this file; `{name: code, path: ./code}` names a model"]
    if cls.base == "required":
        lines.append("  base: ./base  # the model that the experts started from")
    elif cls.base == "optional":
        lines.append("  # base: ./base  # optional: the model that the experts started from")
    folders = "[./math]" if cls.experts[1] == 1 else "[./math, ./code]"
    lines.append(f"  experts: {folders}  # {_span(*cls.experts)}, folders of safetensors")
    if method.data:
        kinds = ".npz, .tsv, .csv, .jsonl, .txt, a folder of images a class, or {dataset: NAME, split: PART}"
        lines.append(f"  tasks:  # by expert; {kinds}")
        lines += [f"    {name}: {{unlabelled: ./{name}.npz, test: ./{name}-test.npz}}" for name in ("math", "code")]
    return "\n".join(lines)


def _span(fewest: int, most: int | None) -> str:
    if most is None:
        return f"{fewest} or more"
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _digits_pool(method: Method) -> str:
    most = method.settings_class().experts[1]
    known = get_args(Domain)
    domains = known[: min(4, most or 4)]
    return "\n".join(
        [
            "",
            "pool:",
            "  source: digits  # real scans that come inside scikit-learn; no download",
            f"  # one expert is trained for each; also: {', '.join(name for name in known if name not in domains)}",
            f"  domains: {yaml_value(domains)}",
        ]
    )


def _method(method: Method) -> str:
    lines = ["", "method:", f"  name: {method.name}"]
    for name, field in method.settings_class().model_fields.items():
        text = describe_field(name, field)
        source = f"; default: {text.source}" if text.source else ""
        lines += _comment(f"{text.help} ({text.wants}{source})")
        empty = not field.is_required() and field.default == ""
        default = '""' if empty else _default(field.annotation, text.default)
        lines.append(f"  {name}: {default}")
    return "\n".join(lines)


def _default(annotation: Any, default: str) -> str:
    """Numbers keep all their digits; text that YAML would read as something else is quoted."""
    if annotation != PerModel and "one of" in kind(annotation) and not default.replace("_", "").isalnum():
        return f'"{default}"'
    return default


def _output() -> str:
    lines = ["", "output:"]
    values = Output().model_dump(mode="json")
    for name, field in Output.model_fields.items():
        text = describe_field(name, field)
        lines += _comment(text.help)
        lines.append(f"  {name}: {yaml_value(values[name])}")
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  # ", subsequent_indent="  #   ")


def _write_packaged() -> None:
    for method in METHODS:
        (FOLDER / method.family).mkdir(parents=True, exist_ok=True)
        for tiny, end in ((False, ""), (True, "-tiny")):
            file = FOLDER / method.family / f"{method.name}{end}.yaml"
            file.write_text(recipe_text(method, tiny=tiny), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    _write_packaged()
