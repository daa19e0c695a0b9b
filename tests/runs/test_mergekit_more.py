"""mergekit's methods beyond the first ten, from its YAML to merged folders: numbers, names, defaults, who takes part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spolia.errors import SpoliaError
from spolia.runs.mergekit import read_mergekit
from spolia.runs.mergekit_settings import SPECS
from spolia.runs.request import MergeRequest
from spolia.runs.verbs import merge_recipe
from spolia.runs.yamlmarks import load

BASE = torch.tensor([[1, -1, 0.5], [0, 2, -0.5]])
DELTAS = {
    "A": torch.tensor([[0.4, -0.2, 0.1], [0.3, -0.6, 0.05]]),
    "B": torch.tensor([[-0.1, -0.3, 0.2], [0.5, 0.4, -0.15]]),
    "C": torch.tensor([[0.2, 0.1, -0.4], [-0.05, 0.3, 0.25]]),
}
# recipe -> (method, models with their weights, base_model?, parameters, what mergekit's operators gave, row by row)
GOLDEN: dict[str, tuple[str, dict[str, float | None], bool, dict[str, Any], list[float]]] = {
    "sce": ("sce", {"A": None, "B": None, "C": None}, True, {}, [1.32895, -1.24636, 0.1, 0.39271, 2.36107, -0.37895]),
    "sce, half": (
        "sce", {"A": None, "B": None, "C": None}, True, {"select_topk": 0.5}, [1, -1, 0.1, 0.3989, 2.36406, -0.5],
    ),
    "nuslerp": ("nuslerp", {"A": 0.75, "B": 0.25}, False, {}, [1.28972, -1.24034, 0.63293, 0.35474, 1.67246, -0.50659]),
    "nuslerp, rows": (
        "nuslerp", {"A": 0.75, "B": 0.25}, False, {"nuslerp_flatten": False},
        [1.28262, -1.23294, 0.6291, 0.35008, 1.65036, -0.5001],
    ),
    "nuslerp, columns": (
        "nuslerp", {"A": 0.75, "B": 0.25}, False, {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        [1.28487, -1.23027, 0.62566, 0.35318, 1.6577, -0.50055],
    ),
    "nuslerp, base": (
        "nuslerp", {"A": 0.75, "B": 0.25}, True, {}, [1.34044, -1.3123, 0.67645, 0.48875, 1.59083, -0.51326],
    ),
    "multislerp": (
        "multislerp", {"A": 0.5, "B": 0.3, "C": 0.2}, False, {"eps": 1e-8},
        [1.27141, -1.2067, 0.5468, 0.29387, 1.89639, -0.47886],
    ),
    "multislerp, base": (
        "multislerp", {"A": 1, "B": 0.6, "C": 0.4}, True, {"normalize_weights": True},
        [1.39782, -1.30493, 0.51214, 0.53474, 1.8383, -0.4211],
    ),
    "karcher": (
        "karcher", {"A": None, "B": None, "C": None}, False, {"max_iter": 10, "tol": 1e-5},
        [1.22548, -1.16843, 0.47983, 0.25169, 2.0614, -0.45804],
    ),
    "model_stock": (
        "model_stock", {"A": None, "B": None, "C": None}, True, {},
        [0.84132, -0.87305, 0.53174, -0.23803, 1.96826, -0.54761],
    ),
    "model_stock, rows": (
        "model_stock", {"A": None, "B": None, "C": None}, True, {"filter_wise": True},
        [0.89965, -0.91972, 0.52007, -0.31724, 1.9577, -0.56345],
    ),
    "nearswap": ("nearswap", {"A": None}, True, {"t": 0.1}, [1.1, -1.1, 0.6, 0.1, 1.9, -0.45]),
    "arcee_fusion": ("arcee_fusion", {"A": None}, True, {}, [1, -1, 0.5, 0.3, 1.4, -0.5]),
    "ram": ("ram", {"A": None, "B": None, "C": None}, True, {}, [1.16667, -1.13333, 0.46667, 0.25, 2.03333, -0.45]),
    "ram, epsilon": (
        "ram", {"A": None, "B": None, "C": None}, True, {"epsilon": 0.15}, [1.3, -1.25, 0.4, 0.4, 2.03333, -0.25],
    ),
    "ramplus_tl": (
        "ramplus_tl", {"A": None, "B": None, "C": None}, True, {"epsilon": 0.15, "r": 0.1, "alpha": 0.2},
        [1.3, -1.25, 0.4, 0.4, 2.03333, -0.245],
    ),
    "passthrough": ("passthrough", {"A": None}, False, {}, [1.4, -1.2, 0.6, 0.3, 1.4, -0.45]),
    "passthrough, scaled": ("passthrough", {"A": None}, False, {"scale": 2}, [2.8, -2.4, 1.2, 0.6, 2.8, -0.9]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, delta in {"base": torch.zeros(2, 3), **DELTAS}.items():
        write_model(root / name, {"layers.0.w": BASE + delta, "head.w": BASE + delta}, {"num_hidden_layers": 1})
    return root


@pytest.fixture
def read(folder: Path) -> Callable[[str], MergeRequest]:
    return lambda text: read_mergekit(load(text, "r.yml"), folder=folder)


@pytest.fixture
def refusal(read: Callable[[str], MergeRequest]) -> Callable[[str], str]:
    def refusal(text: str) -> str:
        with pytest.raises(SpoliaError) as caught:
            read(text)
        return str(caught.value)

    return refusal


def warned(request: MergeRequest) -> str:
    return "\n".join(str(warning) for warning in request.warnings)


@pytest.mark.parametrize("name", GOLDEN)
def test_same_numbers_from_the_same_file(name: str, folder: Path) -> None:
    method, weights, with_base, parameters, want = GOLDEN[name]
    models = [
        {"model": m, **({"parameters": {"weight": w}} if w is not None else {})} for m, w in reversed(weights.items())
    ]
    if method in ("nearswap", "arcee_fusion", "model_stock"):
        models.insert(0, {"model": "base"})  # as such files do; it is no expert
    if method == "nuslerp":
        models.reverse()  # the second model's share is t
    recipe = {"merge_method": method, "models": models, **({"base_model": "base"} if with_base else {})}
    slug = name.replace(", ", "-")
    (folder / f"{slug}.yml").write_text(yaml.safe_dump({**recipe, "parameters": parameters}, sort_keys=False))
    out = Path(merge_recipe(folder / f"{slug}.yml", folder / f"out-{slug}"))  # type: ignore[arg-type]
    merged = load_file(out / "model.safetensors")
    for tensor in ("layers.0.w", "head.w"):
        # 2e-5: the numbers are given with five decimals, and both sides round to fp32 on the way
        torch.testing.assert_close(merged[tensor], torch.tensor(want).view(2, 3).float(), rtol=0, atol=2e-5)


def test_every_method_of_mergekit_is_read() -> None:
    theirs = (
        "linear slerp nuslerp multislerp karcher passthrough task_arithmetic ties dare_ties dare_linear breadcrumbs"
    )
    theirs += " breadcrumbs_ties della della_linear model_stock nearswap arcee_fusion sce ram ramplus_tl"
    assert set(theirs.split()) == SPECS.keys()


# defaults and names


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("merge_method: nuslerp\nmodels: [{model: A}, {model: B}]\nparameters: {weight: 1}", {"scope": "tensor"}),
        (
            "merge_method: multislerp\nmodels: [{model: A}, {model: B}]\n"
            "parameters: {weight: 1, normalize_weights: false}",
            {"normalize": False, "eps": 1e-8, "weight": (1.0, 1.0)},
        ),
        ("merge_method: karcher\nmodels: [{model: A}]", {"max_iter": 10, "tol": 1e-5, "weight": 1.0}),
        (
            "merge_method: model_stock\nbase_model: base\nmodels: [{model: A}, {model: B}]",
            {"clamp": False, "least_product": 1e-6, "scope": "tensor"},
        ),
        ("merge_method: sce\nbase_model: base\nmodels: [{model: A}]", {"density": 1.0, "floor": 1e-6}),
        ("merge_method: ram\nbase_model: base\nmodels: [{model: A}]", {"epsilon": 1e-5}),
        (
            "merge_method: ramplus_tl\nbase_model: base\nmodels: [{model: A}]",
            {"epsilon": 1e-5, "boost": 0.1, "cap": 0.2, "scope": "tensor"},
        ),
        ("merge_method: passthrough\nmodels: [{model: A, parameters: {scale: 0.5}}]", {"scale": (0.5,)}),
    ],
)  # fmt: skip
def test_what_is_not_said_is_mergekits(read: Any, text: str, want: dict[str, Any]) -> None:
    got = read(text).settings_for("head.w").model_dump()
    assert want.items() <= got.items()


def test_parameters_may_follow_the_layers_and_filters(read: Any) -> None:
    request = read(
        "merge_method: nearswap\nbase_model: base\nmodels: [{model: A}]\n"
        "parameters: {t: [{filter: head, value: 0.5}, {value: 0.25}]}"
    )
    assert [request.settings_for(name).t for name in ("head.w", "layers.0.w")] == [0.5, 0.25]


def test_a_share_above_one_is_all_with_a_warning(read: Any) -> None:
    request = read("merge_method: sce\nbase_model: base\nmodels: [{model: A}]\nparameters: {select_topk: 2}")
    assert request.settings_for("head.w").density == 1 and "select_topk 2 keeps everything" in warned(request)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "merge_method: ram\nbase_model: base\nmodels: [{model: A, parameters: {epsilon: 0.1}}]",
            "`epsilon` belongs to the whole merge",
        ),
        ("merge_method: nearswap\nbase_model: base\nmodels: [{model: A}]", "`t` is not set"),
        ("merge_method: nearswap\nbase_model: base\nmodels: [{model: A}]\nparameters: {t: -1}", "`t` for `head.w`"),
        ("merge_method: nuslerp\nmodels: [{model: A}, {model: B}]", "`weight` of `A` is not set"),
        (
            "merge_method: multislerp\nmodels: [{model: A}, {model: B}]\n"
            "parameters: {weight: [{filter: head, value: 0}, {value: 1}]}",
            "the weights sum to zero",
        ),
        (
            "merge_method: nuslerp\nmodels: [{model: A}, {model: B}]\nparameters: {weight: 1, nuslerp_flaten: 1}",
            "did you mean `nuslerp_flatten`?",
        ),
        ("merge_method: sce\nbase_model: base\nmodels: [{model: A}]\nparameters: {select_topk: -1}", "is a share"),
    ],
)
def test_wrong_parameters_are_told(refusal: Any, text: str, told: str) -> None:
    assert told in refusal(text)


def test_a_weight_that_nobody_reads_is_told(read: Any) -> None:
    request = read("merge_method: karcher\nmodels: [{model: A, parameters: {weight: 1}}]")
    assert "`weight` changes nothing in `karcher`" in warned(request)


# who takes part


def test_karcher_takes_the_base_as_one_more(read: Any) -> None:
    for models, want in (("[{model: A}]", ["A", "base"]), ("[{model: base}, {model: A}]", ["base", "A"])):
        request = read(f"merge_method: karcher\nbase_model: base\nmodels: {models}")
        assert [e.name for e in request.experts] == want
        assert request.base is None and request.donor.name == "base"


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_of_an_arc_is_where_changes_start(read: Any, method: str) -> None:
    text = f"merge_method: {method}\nmodels: [{{model: A}}, {{model: B}}, {{model: base}}]\nparameters: {{weight: 1}}\n"
    request = read(f"{text}base_model: base")
    assert [e.name for e in request.experts] == ["A", "B"] and request.base.name == "base"
    plain = f"merge_method: {method}\nmodels: [{{model: A}}, {{model: B}}]\nparameters: {{weight: 1}}"
    assert read(plain).base is None


def test_passthrough_copies_one_model(read: Any) -> None:
    request = read("merge_method: passthrough\nbase_model: base\nmodels: [{model: base}]")
    assert [e.name for e in request.experts] == ["base"] and request.base is None
    request = read("merge_method: passthrough\nbase_model: base\nmodels: [{model: A}]")
    assert [e.name for e in request.experts] == ["A"] and request.donor.name == "base"
    assert "`base` lends only config and tokenizer" in warned(request)


@pytest.mark.parametrize(
    ("method", "models", "base", "told"),
    [
        ("nuslerp", "ABC", False, "takes 2 (a base may stand beside them); found 3"),
        ("nuslerp", "AB", "A", "found 1"),
        ("multislerp", "A", False, "takes 2 or more (a base may stand beside them); found 1"),
        ("model_stock", "A", "base", "takes 2 or more beside the base; found 1 others"),
        ("model_stock", "AB", False, "`model_stock` needs a base"),
        ("nearswap", "AB", "base", "takes 1 beside the base; found 2 others"),
        ("arcee_fusion", "AB", "base", "takes 1 beside the base; found 2 others"),
        ("passthrough", "AB", False, "takes 1; found 2"),
        ("sce", "AB", False, "`sce` needs a base"),
        ("ram", "A", "A", "only the base is listed"),
    ],
)
def test_numbers_of_models(refusal: Any, method: str, models: str, base: str | bool, told: str) -> None:
    listed = ", ".join(f"{{model: {name}}}" for name in models)
    given = {"nuslerp": "{weight: 1}", "multislerp": "{weight: 1}", "nearswap": "{t: 1}"}.get(method, "{}")
    start = f"base_model: {base}\n" if base else ""
    assert told in refusal(f"merge_method: {method}\n{start}models: [{listed}]\nparameters: {given}")
