"""Hostile recipes of mergekit's form: values of another kind, slices without end, many documents, templates; and junk
in every parameter of every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spolia.runs.mergekit_settings import SPECS, Spec

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")

LINEAR = "merge_method: linear\nmodels:\n" + "".join(f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
SLICES = "merge_method: passthrough\nslices:\n- sources: [{model: ./a, layer_range: %s}]\n"
JUNK = (
    ".nan", ".inf", "-.inf", "1e400", "9" * 400, "9" * 5000, "[]", "{}", "x", "''", "null", "[[1]]", "[x, 1]",
    "[null]", "[.nan, 1]",
    "{filter: [], value: 1}", "{filter: ''}", "{value: x}", "[{filter: 5, value: 1}]", "[{value: []}]",
    "[1, {value: 1}]", "2026-11-21",
)  # fmt: skip


def document(name: str, *models: str) -> str:
    listed = "".join(f"- {{model: {m}, parameters: {{weight: 1}}}}\n" for m in models)
    return f"merge_method: linear\n{f'name: {name}' if name else ''}\nmodels:\n{listed}"


def ladder(steps: int) -> str:
    """Each document needs both of the step before: 2^steps ways to walk."""
    texts = [document("p0", "./a", "./b"), document("q0", "./a", "./b")]
    for n in range(1, steps):
        texts += [document(f"{side}{n}", f"p{n - 1}", f"q{n - 1}") for side in "pq"]
    return "---\n".join([*texts, document("", f"p{steps - 1}", "./nobody")])


REFUSED = {
    **{f"layers {text:.20}": SLICES % text for text in (
        "[0, 1000000000000]", "[0, 2]", "[-1, 1]", "[1, 0]", "[0, 0]", "[0.0, 1.0]", "[0]", "x", "[true, 1]",
        "[0, 1, 2]", "{}", "[]",
        "[x, y]", "5", "'[0, 1]'", "[0, " + "9" * 300 + "]", "[.nan, .inf]", "[[0], [1]]")},
    **{f"with {line:.40}": LINEAR + line + "\n" for line in (
        "dtype: __class__", "dtype: []", "dtype: int8", "dtype: 16", "out_dtype: [float16]", "out_dtype: {}",
        "dtype: true",
        "chat_template: ../../etc/passwd", "chat_template: 5", "chat_template: []",
        "chat_template: '{% for %} {{ }} x x x x x'",
        'chat_template: "{{ messages }} aaaaaaaaaaaaaaa \\ud800"', "chat_template: x", "chat_template: " + "x" * 5000,
        "x-spolia: []", "x-spolia: 5", "x-spolia: {seed: -1}", "x-spolia: {seed: x}", "x-spolia: {seed: true}",
        "x-spolia: {seed: 1.0}",
        "x-spolia: {strict: 1}", "x-spolia: {strict: []}", "x-spolia: {on_size_mismatch: x}",
        "x-spolia: {on_size_mismatch: []}",
        "x-spolia: {keep_padding: 2}", "x-spolia: {unknown: 1}", "base_model: []", "base_model: {}", "base_model: 5",
        "base_model: {model: []}",
        "base_model: ./nobody", "base_model: {model: {path: 5}}", "parameters: []", "parameters: 5",
        "parameters: {normalize: {}}",
        "parameters: {normalize: x}", "parameters: {unknown: 1}", "slices: []", "slices: 5", "modules: []",
        "modules: {}", "experts: []",
        "unknown: 1", "__class__: x", "spolia: 1", "merge_method: ties")},
    **{f"models: {text:.40}": f"merge_method: linear\nmodels: {text}\n" for text in (
        "[]", "{}", "5", "x", "./a", "[5]", "[null]", "[[]]", "[./a, ./b]", "[{}]", "[{model: null}]", "[{model: 5}]",
        "[{model: []}]",
        "[{model: {}}]", "[{model: {path: ./a, revision: []}}]", "[{model: {model: ./a}}]",
        "[{model: ./a, parameters: []}]",
        "[{model: ./a, parameters: 5}]", "[{model: ./a, parameters: {weight: 1}, unknown: 1}]",
        "[{model: ./a}, {model: ./a}]",
        "[{model: ./a, parameters: {weight: 1}}, {model: ../world/a, parameters: {weight: 1}}]",
        "[{model: {lora: ./b, model: ./a}}]",
        "[{model: {model: {path: ./a}, lora: []}}]", "[{model: ./a+./b, parameters: {weight: 1}}]")},
    **{f"slices: {text:.40}": f"merge_method: passthrough\nslices: {text}\n" for text in (
        "[]", "5", "[5]", "[{}]", "[{sources: []}]", "[{sources: 5}]", "[{sources: [5]}]",
        "[{sources: [{model: ./a, layer_range: 5}]}]",
        "[{sources: [{layer_range: [0, 1]}]}]",
        "[{sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 1]}]}]",
        "[{sources: [{model: ./a, layer_range: [0, 1]}], base_model: []}]",
        "[{sources: [{model: ./a, layer_range: [0, 1]}], unknown: 1}]")},
    **{f"modules: {text:.40}": f"merge_method: passthrough\nmodules: {text}\n" for text in (
        "5", "[]", "{}", "{a: 5}", "{a: {}}", "{a: {models: [], slices: []}}", "{a: {models: 5}}",
        "{nobody: {models: [{model: ./a}]}}",
        "{a: {slices: [{sources: [{model: ./a, layer_range: [0, 1]}]}]}}", "{'': 5}",
        "{1: {models: [{model: ./a}]}, 2: 5}")},
    **{f"method {text:.20}": LINEAR.replace("linear", text) for text in (
        "__import__('os')", "{a: 1}", "[]", "5", "x" * 5000, "Linear!", "''", "true", "task-arithmetic-x")},
    "600 mistakes": LINEAR.replace("weight: 1", "weight: [" + "x, " * 300 + "1]"),
    "a mixture of experts": "gate_mode: hidden\nexperts: []\nbase_model: ./a\n", "a search": "genome: {}\n",
    "a gradient of text": LINEAR.replace("weight: 1", "weight: [0.1, x]"),
    "an unfinished filter": LINEAR.replace("weight: 1", "weight: [{filter: nobody, value: 1}]"),
    "weights that cancel": LINEAR.replace("weight: 1", "weight: 1", 1).replace("./b, parameters: {weight: 1",
    "./b, parameters: {weight: -1"),
    "documents in a ring": "---\n".join((document("p", "./a", "q"), document("q", "./b", "p"), document("", "p",
    "./b"))),
    "a document of itself": "---\n".join((document("p", "p", "./b"), document("", "p", "./b"))),
    "a ladder of 2^40 ways": ladder(40),
    "101 documents": "---\n".join([*(document(f"p{n}", "./a", "./b") for n in range(100)), document("", "p1", "./b")]),
    "two results": "---\n".join((document("", "./a", "./b"), document("", "./a", "./b"))),
    "two of one name": "---\n".join((document("p", "./a", "./b"), document("p", "./a", "./b"), document("", "p",
    "./b"))),
    "a broken document behind a sound one": document("", "./a", "./b") + "---\nmerge_method: [",
    "a document that is a list": document("", "./a", "./b") + "---\n- 1\n",
    **{f"a document called {name!a:.20}": "---\n".join((document(name, "./a", "./b"), document("", name,
    "./b"))) for name in (
        "../../x", "'..'", "/etc/x", "a/b", "a+b", "'.'", "5", "[]", "{a: 1}", "true", "x" * 300, '"\\0"',
        '"\\ud800"', '"a\\nb"',
        '"\\e[2J"')},
}  # fmt: skip
AVERAGED = {
    "a gradient of 2 000 steps": LINEAR.replace("weight: 1", "weight: [" + "1, " * 1999 + "1]"),
    "300 filters": LINEAR.replace("weight: 1", "weight: [" + "{filter: nobody, value: 2}, " * 300 + "{value: 1}]"),
    "numbers in quotes": LINEAR.replace("weight: 1", "weight: '1'"),
    "a template of our own": LINEAR + "chat_template: '{{ messages | length }} {{ 7 * 7 }} xxxx'\n",
    "a template that would run code": LINEAR + "chat_template: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"\n",
    "a template without end": LINEAR + "chat_template: '{% for x in range(10**12) %}x{% endfor %}'\n",
    "no strictness": LINEAR + "x-spolia: {strict: false}\nunknown: 1\n",
    "a description of 100 000 letters": LINEAR + "x-spolia: {strict: false}\nnotes: " + "x" * 100_000 + "\n",
    "a seed of 70 bits": LINEAR + f"x-spolia: {{seed: {2**70}}}\n",
}  # fmt: skip
SLOW = {  # up to two seconds
    "600 mistakes", "a ladder of 2^40 ways", "101 documents", "fine: a gradient of 2 000 steps", "fine: 300 filters",
}  # fmt: skip
CASES = [(name, "refused", text) for name, text in REFUSED.items()]
CASES += [(f"fine: {name}", "averaged", text) for name, text in AVERAGED.items()]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("outcome", "text"),
    [pytest.param(o, t, id=ascii(n), marks=[pytest.mark.slow] if n in SLOW else []) for n, o, t in CASES],
)
def test_mergekit(outcome: str, text: str, judge_text: Callable[..., None]) -> None:
    judge_text(outcome, text, {})


def with_parameter(method: str, spec: Spec, name: str, value: str) -> str:
    """A recipe of the method that is sound but for `name`."""
    sound = dict.fromkeys((*spec.each, *spec.whole), "0.5") | {name: value}
    given = "\n".join(f"  {n}: {v}" for n, v in sound.items())
    models = "[{model: ./b}]" if spec.others[1] == 1 else "[{model: ./a}, {model: ./b}]"
    base = "" if spec.base == "member" else "base_model: ./base\n"
    return f"merge_method: {method}\n{base}models: {models}\nparameters:\n{given}\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", SPECS)
def test_every_parameter_with_junk_is_refused(method: str, sound: object, told: Callable[..., str | None]) -> None:
    from spolia.runs.mergekit import read_mergekit
    from spolia.runs.yamlmarks import load

    for name in (*SPECS[method].each, *SPECS[method].whole):
        for value in JUNK:
            text = with_parameter(method, SPECS[method], name, value)
            message = told(lambda text=text: read_mergekit(load(text, "r.yaml"), folder=sound))  # type: ignore[arg-type]
            assert message is not None and len(message) < 5000, (name, value)


def test_there_are_enough() -> None:
    assert len(CASES) >= 150
