"""Chat templates: the prompt each built-in name writes, and where a template ends up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spolia.errors import SpoliaError
from spolia.runs.mergekit import read_mergekit
from spolia.runs.mergekit_templates import TEMPLATES
from spolia.runs.merging import run_merge
from spolia.runs.yamlmarks import load

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Sum."},
]
SYSTEM = [{"role": "system", "content": "Be short."}]
# The prompt formats as their models' cards print them.
PROMPTS = {
    "alpaca": (
        "### Instruction:\nHi\n\n### Response:\nYes?</s>\n\n### Instruction:\nSum.\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
        "Be short.\n\n",
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nSum.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "",
        "<|im_start|>system\nBe short.<|im_end|>\n",
    ),
    "exaone": (
        "[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Sum.\n[|assistant|]",
        "[|system|][|endofturn|]\n",
        "[|system|]Be short.[|endofturn|]\n",
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSum.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>",
    ),
}  # fmt: skip


def render(template: str, messages: list[dict[str, str]], prompt: bool = True) -> str:
    """As transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"messages": messages, "add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
    return environment.from_string(template).render(**values)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name):
    body, without, with_system = PROMPTS[name]
    assert render(TEMPLATES[name], CHAT) == without + body
    assert render(TEMPLATES[name], SYSTEM + CHAT) == with_system + body
    whole, told = render(TEMPLATES[name], CHAT[:2], prompt=False), render(TEMPLATES[name], CHAT[:1])
    assert whole.startswith(told)  # what the model is asked to go on with is what it was trained on


def test_the_prompt_of_mistral():
    assert render(TEMPLATES["mistral"], CHAT) == "<s>[INST] Hi [/INST] Yes?</s>[INST] Sum. [/INST]"
    assert render(TEMPLATES["mistral"], SYSTEM + CHAT[:1]) == "<s>[INST] Be short.\n\nHi [/INST]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in "ABCDE":
        write_model(root / name, {"w": torch.ones(2)}, {"model_type": "llama"})
    (root / "A" / "chat_template.jinja").write_text("{{ messages }} of A")
    (root / "A" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ old }}", "bos_token": "<s>"}))
    for name in "BC":
        (root / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }} of two"}))
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ messages }} of two"}]
    (root / "D" / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    return root


def read(folder: Path, template: str, models: str = "A"):
    listed = ", ".join(f"{{model: {name}}}" for name in models)
    text = f"merge_method: linear\nmodels: [{listed}]\nparameters: {{weight: 1}}\nchat_template: {template}\n"
    return read_mergekit(load(text, "r.yml"), folder=folder)


def test_a_template_takes_the_place_of_the_donors(folder, tmp_path):
    out = run_merge(read(folder, "chatml"), tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}


def test_without_the_key_all_stays(folder, tmp_path):
    request = read(folder, "null")
    out = run_merge(request, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }} of A" and request.chat_template is None
    assert "chat_template" in json.loads((out / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("models", "want"),
    [
        ("A", "{{ messages }} of A"),
        ("ABC", "{{ messages }} of two"),
        ("EABCD", "{{ messages }} of two"),
        ("AB", "{{ messages }} of A"),  # equally common: the first of the file
        ("BA", "{{ messages }} of two"),
        ("E", None),
    ],
)
def test_auto_is_the_commonest(folder, models, want):
    request = read(folder, "auto", models)
    assert request.chat_template == want
    assert (want is None) == ("none of the models has a chat template" in "\n".join(map(str, request.warnings)))


def test_a_text_is_taken_as_it_is(folder):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert read(folder, f"'{text}'").chat_template == text
    assert read(folder, "'{% generation %}{{ messages }}{% endgeneration %}'").chat_template is not None


@pytest.mark.parametrize(
    ("template", "word", "cure"),
    [
        ("chat_ml", "no chat template is called `chat_ml`", "did you mean `chatml`?"),
        ("'{{ messages }}'", "no chat template", "20 characters"),
        ("a long text without any braces at all", "no chat template", "a {"),
        ("3", "must be text", "chatml"),
        ("'{% for m in messages %}{{ m }}'", "not valid Jinja, line 1", "mend"),
    ],
)
def test_refused_with_line_and_cure(folder, template, word, cure):
    with pytest.raises(SpoliaError) as caught:
        read(folder, template)
    message = str(caught.value)
    assert "r.yml:4 chat_template" in message and word in message and cure in message
