"""The model card of a merged folder: README.md with the metadata that model hubs read. Made offline, names only."""

from __future__ import annotations

import json
import re
from typing import Any

from spolia.reports import words
from spolia.reports.folder import rows
from spolia.reports.ledger import Table, main_table
from spolia.reports.tables import escape_markdown, to_markdown

# An absolute path: /a/b, ~/a, file:///a, C:\a or \\host\a; the last group of each pattern is its last part.
_ROOT = r"(?:file://)?(?:~?/|~\\|[A-Za-z]:[/\\]|\\\\)[/\\]*"
_STOP = r"\s'\"`,;:)\]}>"
_PATH = re.compile(rf"(?:(?<![\w/.~@+:-])|(?<=:)(?!//)){_ROOT}(?:[^{_STOP}/\\]+[/\\]+)*([^{_STOP}/\\]+)[/\\]*")
_QUOTED = re.compile(rf"([\"']){_ROOT}[^\"'\n]*?([^/\\\"'\n]+)[/\\]*\1")
_END = r"(?=[ \t]*(?:[,}\]]|$|[ \t]#))"
_IN_YAML = re.compile(rf"(?m)(^[ \t]*|[:-][ \t]+|[,{{\[][ \t]*){_ROOT}[^\n,}}\]#]*?([^/\\\n,}}\]#]+?)[/\\]*{_END}")
_CLASSES = (
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMaskedLM",
    "ForImageClassification",
)


def render_card(facts: dict[str, Any]) -> str:
    """README.md for a merged folder.

    `facts`: name, method, summary, paper; base {name, path, license?} or None; experts [{name, path?, license?}];
    dtype, parameters, tensors; recipe (text), recipe_name; data {phase: text}; results (ledger form) or None; seed,
    versions, warnings, limits; config (what config.json holds) where the folder has one. Anything may be missing.
    No path of this machine is told.
    """
    sections = [
        f"# {_line(_title(facts))}",
        _what(facts),
        _how(facts),
        _results(facts),
        _data(facts),
        _limits(facts),
        _licence(facts),
        _load(facts),
        _citation(facts),
    ]
    return "\n\n".join([_front(facts), *(s for s in sections if s)]) + "\n"


def public_name(value: Any) -> str:
    """What a model may be called outside this machine: `owner/name` stays, any other path is its last part."""
    plain = words.name(value, 200).replace("\\", "/").rstrip("/")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", plain):
        return plain
    return plain.rpartition("/")[2] or "model"


def without_paths(value: Any) -> str:
    """`value` with every absolute path in it cut to its last part."""
    return _PATH.sub(r"\1", _QUOTED.sub(r"\1\2\1", words.text(value, 60_000)))


def _title(facts: dict[str, Any]) -> str:
    return public_name(facts.get("name") or "merged model")


def _models(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(role, name, licence) of the base and the experts; the licence is empty where it is not known."""
    base, experts = facts.get("base"), facts.get("experts") or []
    entries = [("base", base)] if isinstance(base, dict) else []
    entries += [("expert", expert) for expert in experts if isinstance(expert, dict)]
    return [(role, public_name(e.get("name") or e.get("path")), words.name(e.get("license"))) for role, e in entries]


def _inherited(facts: dict[str, Any]) -> str:
    """The one licence of all models, or empty: several, or an unknown one, is for a person to settle."""
    licences = {licence.lower() for _, _, licence in _models(facts)}
    return licences.pop() if len(licences) == 1 else ""


def _front(facts: dict[str, Any]) -> str:
    import yaml

    method = words.name(facts.get("method"))
    front: dict[str, Any] = {}
    owned = list(dict.fromkeys(name for _, name, _ in _models(facts) if "/" in name))
    if owned:  # a bare name would be somebody else's model on a hub
        front |= {"base_model": owned, "base_model_relation": "merge"}
    front["library_name"] = "transformers" if _transformers(facts) else "safetensors"
    front["tags"] = ["merge", "spolia", *([method] if method else [])]
    if _inherited(facts):
        front["license"] = _inherited(facts)
    scores = _scores(facts)
    if scores:
        front["model-index"] = [{"name": _title(facts), "results": scores}]
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000) + "---"


def _transformers(facts: dict[str, Any]) -> bool:
    """Whether the folder's config is one that transformers reads: our own networks have one too."""
    config = facts.get("config")
    return bool(config) and not (isinstance(config, dict) and str(config.get("model_type")).startswith("spolia_"))


def _scores(facts: dict[str, Any]) -> list[dict[str, Any]]:
    table, method = _table(facts), words.name(facts.get("method"))
    line = next((line for line in table.lines if line.method == method), None) if table else None
    if not table or not line:
        return []
    return [
        {
            "task": {"type": "other", "name": task},
            "dataset": {"type": task, "name": task},
            "metrics": [{"type": table.metric, "name": table.heading, "value": round(cell.mean, 4)}],
        }
        for task, cell in zip(table.columns, line.cells, strict=True)
        if cell and words.finite(cell.mean)
    ]


def _line(value: Any) -> str:
    return escape_markdown(without_paths(words.name(value, 1000)))


def _named(name: str) -> str:
    return f"`{name.replace('`', '')}`"


def _bullets(entries: Any) -> str:
    return "\n".join(f"- {_line(entry)}" for entry in entries)


def _code(value: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", value)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{value.strip()}\n{fence}"


def _what(facts: dict[str, Any]) -> str:
    models = _models(facts)
    experts = [_named(name) for role, name, _ in models if role == "expert"]
    base = next((_named(name) for role, name, _ in models if role == "base"), "")
    said = f"A merge of {len(experts)} model{'s' * (len(experts) != 1)}"
    said += f" ({', '.join(experts)})" if experts else ""
    said += f" on the base {base}" if base else ""
    said += f", made with {_line(facts['method'])}" if facts.get("method") else ""
    said += f": {_line(facts['summary'])}." if facts.get("summary") else "."
    count, tensors = words.number(facts.get("parameters")), words.number(facts.get("tensors"))
    stored = [f"{count:,.0f} parameters"] if words.finite(count) else []
    stored += [f"{tensors:,.0f} tensors"] if words.finite(tensors) else []
    stored += [f"stored as {_line(facts['dtype'])}"] if facts.get("dtype") else []
    return "## What this is\n\n" + said + (f"\n\n{', '.join(stored)}." if stored else "")


def _how(facts: dict[str, Any]) -> str:
    source = words.text(facts.get("recipe"), 60_000)
    for model in (facts.get("base"), *(facts.get("experts") or [])):
        if isinstance(model, dict) and model.get("path") and model.get("name"):
            source = source.replace(str(model["path"]), public_name(model["name"]))
    source = without_paths(_IN_YAML.sub(r"\1\2", source))
    versions = words.inline(facts["versions"]) if facts.get("versions") else ""
    told = [f"recipe {_line(public_name(facts['recipe_name']))}"] if facts.get("recipe_name") else []
    told += [f"seed {_line(facts['seed'])}"] if facts.get("seed") is not None else []
    told += [_line(versions)] if versions else []
    parts = [f"{', '.join(told)[:1].upper()}{', '.join(told)[1:]}."] if told else []
    parts += [_code(source, "yaml")] if source.strip() else []
    return "## How it was made\n\n" + "\n\n".join(parts) if parts else ""


def _results(facts: dict[str, Any]) -> str:
    table = _table(facts)
    if not table:
        return "## Results\n\nThis merge has not been measured."
    notes = facts["results"].get("notes")
    return f"## Results\n\n{to_markdown(table).strip()}" + (f"\n\n{_line(notes)}" if notes else "")


def _table(facts: dict[str, Any]) -> Table | None:
    """The main table of the results, its names without paths; None where nothing was measured."""
    results = facts.get("results")
    if not isinstance(results, dict):
        return None
    named = [{**row, **{key: without_paths(row[key]) for key in ("method", "task")}} for row in rows(results)]
    table = main_table({"rows": named})
    return table if table.lines else None


def _data(facts: dict[str, Any]) -> str:
    data = facts.get("data")
    if not isinstance(data, dict) or not data:
        return "## Data touched\n\nNot stated."
    return "## Data touched\n\n" + _bullets(
        f"{words.name(phase)}: {words.inline(text)}" for phase, text in data.items()
    )


def _limits(facts: dict[str, Any]) -> str:
    entries = [words.inline(entry) for key in ("limits", "warnings") for entry in facts.get(key) or []]
    entries.append("A merge keeps the faults of the models it is made of; test it for your use before you rely on it.")
    return "## Limits\n\n" + _bullets(entries)


def _licence(facts: dict[str, Any]) -> str:
    models = _models(facts)
    lines = _bullets(f"{name} ({role}): {licence or 'unknown'}" for role, name, licence in models)
    if not models:
        said = "The licences of the models are unknown. Check them before you share this model."
    elif _inherited(facts):
        said = f"All models it is made of are under {escape_markdown(_inherited(facts))}; so is this one."
    elif all(licence for _, _, licence in models):
        said = "The models it is made of are under different licences. This model must satisfy all of them."
    else:
        said = "The licence of at least one model is unknown. Check it before you share this model."
    return f"## Licence\n\n{said}" + (f"\n\n{lines}" if lines else "")


def _load(facts: dict[str, Any]) -> str:
    folder, config = _title(facts), facts.get("config")
    if _transformers(facts):
        named = config.get("architectures") if isinstance(config, dict) else None
        first = str(named[0]) if isinstance(named, list) and named else ""
        first = first.replace("LMHeadModel", "ForCausalLM")  # what GPT-2's class is called
        auto = "AutoModel" + next((kind for kind in _CLASSES if first.endswith(kind)), "")
        code = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({json.dumps(folder)})"
    else:
        code = (
            "from pathlib import Path\n\nfrom safetensors.torch import load_file\n\nweights = {}\n"
            f'for file in sorted(Path({json.dumps(folder)}).glob("*.safetensors")):\n    weights |= load_file(file)'
        )
    return "## How to load it\n\n" + _code(code, "python")


def _citation(facts: dict[str, Any]) -> str:
    paper = words.name(facts.get("paper"), 400)
    if not paper:
        return ""
    link = re.search(r"arXiv:? ?(\d{4}\.\d{4,5})", paper)
    doi = re.search(r"doi:(10\.\S+)", paper)
    address = f"https://arxiv.org/abs/{link[1]}" if link else f"https://doi.org/{doi[1]}" if doi else ""
    return f"## Citation\n\nThe method: {escape_markdown(paper)}" + (f" <{address}>" if address else "") + "."
