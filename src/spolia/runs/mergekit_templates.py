"""Chat templates: the name of a common prompt format, a Jinja text, or the one most of the models have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from spolia.errors import did_you_mean
from spolia.runs.mergekit_settings import Check
from spolia.runs.request import ModelRef, distinct
from spolia.runs.yamlmarks import Path as Place

_AT: Place = ("chat_template",)
_SHORTEST = 20  # characters; a shorter text is a misspelt name
# Each writes the prompt format that its models were trained on, and nothing else.
TEMPLATES = {
    "alpaca": (
        "{%- if messages[0].role == 'system' %}{% set preamble = messages[0].content | trim %}"
        "{% else %}{% set preamble = 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.' %}{% endif %}"
        "{{- preamble + '\\n\\n' }}"
        "{%- for message in messages if message.role != 'system' %}"
        "{%- if message.role == 'assistant' %}"
        "{{- '### Response:\\n' + message.content | trim + eos_token + '\\n\\n' }}"
        "{%- else %}{{- '### Instruction:\\n' + message.content | trim + '\\n\\n' }}{% endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{%- if messages[0].role != 'system' %}{{- '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{%- for message in messages %}"
        "{{- '[|' + message.role + '|]' + message.content }}"
        "{{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{- bos_token }}"
        "{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{- bos_token }}"
        "{%- set ns = namespace(system='') %}"
        "{%- for message in messages %}"
        "{%- if message.role == 'system' %}{% set ns.system = message.content + '\\n\\n' %}"
        "{%- elif message.role == 'user' %}"
        "{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}{% set ns.system = '' %}"
        "{%- else %}{{- ' ' + message.content + eos_token }}{% endif %}"
        "{%- endfor %}"
    ),
}


def read_template(value: dict[str, Any], models: list[ModelRef], check: Check) -> str | None:
    """The template to write; None leaves the donor's as it is. `models` in the file's order."""
    asked = value.get("chat_template")
    if asked is None:
        return None
    known = ("auto", *TEMPLATES)
    if not isinstance(asked, str):
        check.error(_AT, "`chat_template` must be text", f"write one of {', '.join(known)}, or a Jinja template")
        return None
    if asked in TEMPLATES:
        return TEMPLATES[asked]
    if asked == "auto":
        return _commonest(models, check)
    if len(asked) < _SHORTEST or "{" not in asked:
        near = did_you_mean(asked, known)
        mend = f"{near}; a Jinja template has {_SHORTEST} characters or more, and a {{" if "\n" not in asked else near
        check.error(_AT, f"no chat template is called `{asked[:40]}`", mend)
        return None
    return asked if _sound(asked, check) else None


def _sound(text: str, check: Check) -> bool:
    """Whether Jinja can read it. Tags that only transformers knows are let pass."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)  # only parsed, never run
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" in str(error) or "unknown tag 'endgeneration'" in str(error):
            return True
        check.error(_AT, f"not valid Jinja, line {error.lineno}: {error.message}", "mend the template")
        return False
    return True


def _commonest(models: list[ModelRef], check: Check) -> str | None:
    """The template that most models have; of equally common ones the first in the file."""
    found = [text for ref in distinct(models) if (text := template_of(ref.path)) is not None]
    if not found:
        check.warn(_AT, "none of the models has a chat template: none is written", f"name one: {', '.join(TEMPLATES)}")
        return None
    counts = Counter(found)  # in order of first appearance, which `max` keeps
    best = max(counts, key=counts.__getitem__)
    if len(counts) > 1:
        check.warn(_AT, f"{len(counts)} templates differ; {counts[best]} of {len(found)} models have the one taken")
    return best


def template_of(path: Path) -> str | None:
    """A model's own template, from its file or its tokenizer's config."""
    folder = path if path.is_dir() else path.parent
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                continue
            value = json.loads((folder / name).read_bytes()).get("chat_template")
            if isinstance(value, list):  # several, by name
                named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
                value = named.get("default", next(iter(named.values()), None))
            if isinstance(value, str):
                return value
    except (OSError, ValueError, AttributeError):
        pass
    return None
