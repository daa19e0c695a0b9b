from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError
from spolia.parts.white import White, WhitePool


def network(classes: int = 3, channels: int = 3, seed: int = 0, trained: bool = True) -> nn.Sequential:
    draws = torch.Generator().manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, classes),
    )
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draws))
        if trained:
            made[1].running_mean.copy_(torch.randn(4, generator=draws))
            made[1].running_var.copy_(0.5 + torch.rand(4, generator=draws))
    return made


def white(name: str = "a", **given) -> White:
    module = given.pop("module", None) or network(seed=len(name))
    return White(name, module, **({"shape": (3, 8, 8), "classes": ("cat", "dog", "cow")} | given))


def findings(*experts: White) -> list[tuple[str, str]]:
    return [(f.level, f.what) for f in WhitePool(experts).audit().findings]


def test_a_sound_pool_has_nothing_to_tell():
    audit = WhitePool([white("a"), white("b")]).audit()
    assert not audit.findings and audit.ways == (3, 3) and audit.norms == (1, 1)
    audit.raise_if_any("broken", "suspect", "note")


def broken_weights() -> nn.Module:
    made = network()
    with torch.no_grad():
        made[0].weight[0, 0, 0, 0] = torch.nan
    return made


def constant() -> nn.Module:
    made = network()
    with torch.no_grad():
        made[5].weight.zero_()
    return made


@pytest.mark.parametrize(
    ("expert", "level", "words"),
    [
        (lambda: white(module=network(trained=False)), "suspect", "never trained"),
        (lambda: white(module=constant()), "suspect", "the same answer"),
        (lambda: white(module=broken_weights()), "broken", "`0.weight` holds NaN"),
        (lambda: white(module=network(classes=4)), "broken", "4 outputs for 3 classes"),
        (lambda: white(module=network(channels=1)), "broken", "cannot take images [3, 8, 8]"),
        (lambda: white(classes=("cat", "dog", "cat")), "broken", "`cat` twice"),
        (lambda: white(std=(0.0,)), "broken", "std is 0"),
        (lambda: white(mean=(0.1, 0.2)), "broken", "2 values of mean for 3 channels"),
        (lambda: white(module=nn.Sequential(nn.Flatten(), nn.Linear(192, 3))), "note", "no batch norm"),
        (lambda: white(module=nn.Conv2d(3, 3, 3)), "broken", "gives [16, 3, 6, 6]"),
    ],
)
def test_each_bad_model_is_found_beside_sound_ones(expert, level, words):
    audit = WhitePool([white("sound"), expert(), white("sound too")]).audit()
    hits = [f for f in audit.findings if f.level == level and words in f.what]
    assert len(hits) == 1 and hits[0].place == 1 and hits[0].mend
    assert {f.place for f in audit.findings} == {1}
    if level != "note":
        with pytest.raises(SpoliaError, match="expert a"):
            audit.raise_if_any()
    else:
        audit.raise_if_any()


def test_all_findings_are_raised_at_once():
    with pytest.raises(SpoliaError) as told:
        WhitePool(
            [white("a", module=broken_weights()), white("b", module=network(trained=False))]
        ).audit().raise_if_any()
    assert len(told.value.problems) == 2


def test_two_experts_of_one_name_are_told():
    assert ("broken", "another expert has its name") in findings(white("a"), white("a"))


def test_a_given_module_is_copied_and_stays_in_its_mode():
    module = network().train()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    pool = WhitePool([white(module=module)])
    pool.audit()
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def test_classes_of_one_name_and_domain_are_one():
    pool = WhitePool(
        [
            white("a", classes=("x", "y", "z"), domain="d"),
            white("b", classes=("z", "x", "w"), domain="d"),
            white("c", classes=("x", "y", "z"), domain="e"),
        ]
    )
    assert pool.keys == [(0, 1, 2), (2, 0, 3), (4, 5, 6)]
    assert pool.names[:4] == ("d/x", "d/y", "d/z", "d/w") and pool.shared


def test_without_a_class_list_outputs_are_an_experts_own():
    pool = WhitePool([white("a", classes=None), white("b", classes=None)])
    assert not pool.shared and pool.keys == [(0, 1, 2), (3, 4, 5)]
    assert pool.names[3] == "b/output 0"
    assert [e.name for e in pool.without([0])] == ["b"]


def test_images_are_shown_in_each_experts_own_way():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grey = white(module=network(channels=1), shape=(1, 8, 8), mean=(0.5,), std=(0.25,)).shown(x)
    wanted = (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:] - 0.5) / 0.25
    assert torch.allclose(grey, wanted, atol=1e-6)  # fp32: a sum of three
    assert white(shape=(3, 8, 8)).shown(x[:, :1]).shape == x.shape
    assert white(shape=(3, 12, 12)).shown(x).shape == (2, 3, 12, 12)
    assert white(shape=(3, 4, 4)).shown(torch.full((1, 3, 8, 8), 0.3)).allclose(torch.tensor(0.3))


def test_kinds_are_equal_for_equal_architectures_alone():
    assert white("a").kind == white("bb").kind
    assert white("a").kind != white("a", module=network(classes=4)).kind
    strided = network()
    strided[0].stride = (2, 2)
    assert white("a").kind != white("a", module=strided).kind
    assert white("a").kind != white("a", mean=(0.5,)).kind


def test_a_lazy_expert_is_loaded_when_it_is_run():
    loads = []
    expert = white(module=lambda: loads.append(1) or network())
    assert not loads
    assert expert.ways == 3 and expert.ways == 3 and len(loads) == 1
    assert not expert.module().training and len(loads) == 2
