from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spolia.errors import SpoliaError
from spolia.runs.classifiers import classifiers
from spolia.zoo.conv2 import Conv2
from spolia.zoo.conv4 import Conv4
from spolia.zoo.resnet import ResNet
from spolia.zoo.resnet10 import SmallResNet

CLASSES = ["husky", "beagle", "boxer"]


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def seen(module: nn.Module) -> nn.Module:
    """With statistics, as after training."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=draws())
    return module.eval()


def conv(classes: int = 3, width: int = 4) -> nn.Module:
    return seen(Conv4(classes, width=width, size=32, generator=draws()))


def write(folder: Path, text: str) -> Path:
    (folder / "pool.yml").write_text(text)
    return folder / "pool.yml"


def test_ten_lines_make_a_pool(tmp_path):
    save_file(conv().state_dict(), tmp_path / "dogs.safetensors")
    torch.save({"state_dict": conv(2).state_dict()}, tmp_path / "birds.pth")
    description = write(
        tmp_path,
        """
size: 32
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
network: {model_type: spolia_conv4, hidden_size: 4}
experts:
  - {path: dogs.safetensors, classes: [husky, beagle, boxer]}
  - {path: birds.pth, name: birds, classes: [wren, robin]}
""",
    )
    pool = classifiers(description)
    assert [(e.name, e.classes) for e in pool] == [("dogs", tuple(CLASSES)), ("birds", ("wren", "robin"))]
    audit = pool.audit()
    assert not audit.findings and audit.ways == (3, 2) and pool.shape == (3, 32, 32)
    x = torch.rand(2, 3, 32, 32, generator=draws())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        assert torch.allclose(pool[0].logits(pool[0].module(), x), conv()((x - mean) / std), atol=1e-5)  # fp32


def test_every_kind_of_network_from_a_folder_with_its_config(tmp_path):
    made = {
        "conv4": conv(),
        "conv2": seen(Conv2(4, channels=3, size=32, generator=draws())),
        "resnet-10": seen(SmallResNet(10, 4, 3, generator=draws())),
        "resnet-8": seen(ResNet(8, 4, 3, generator=draws())),
    }
    for name, module in made.items():
        (tmp_path / name).mkdir()
        save_file(module.state_dict(), tmp_path / name / "model.safetensors")
        config = (
            module.config() | {"id2label": {"0": f"{name} a", "1": "b", "2": "c"}}
            if name != "conv2"
            else module.config()
        )
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    pool = classifiers({"experts": str(tmp_path)})
    assert [e.name for e in pool] == sorted(made)
    pool.audit().raise_if_any()
    x = torch.rand(2, 3, 32, 32, generator=draws())
    with torch.no_grad():
        for expert in pool:
            assert torch.allclose(expert.logits(expert.module(), x), made[expert.name](x), atol=1e-5)  # fp32
    assert pool[1].classes == ("conv4 a", "b", "c") and pool[0].classes is None


def test_a_function_of_yours_builds_what_no_config_tells(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    save_file(module.state_dict(), tmp_path / "mine.safetensors")
    description = {"size": 8, "experts": [{"path": str(tmp_path / "mine.safetensors"), "classes": ["a", "b"]}]}
    pool = classifiers(description, build=lambda name: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))
    x = torch.rand(2, 3, 8, 8, generator=draws())
    with torch.no_grad():
        assert torch.equal(pool[0].logits(pool[0].module(), x), module(x))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experts: []\nsizes: 32", "did you mean `size`"),
        ("size: 32", "`experts` is missing"),
        ("experts: [{path: a.safetensors, clases: [x]}]", "did you mean `classes`"),
        ("experts: [{path: not-there.safetensors}]", "there is no"),
        ("experts: not-there", "is no folder"),
        ("experts: [{path: a.safetensors}, {path: a.safetensors}]", "2 experts are called `a`"),
        ("experts: .", "holds no checkpoints"),
    ],
)
def test_a_bad_description_is_told_with_its_cure(tmp_path, text, words):
    if "no checkpoints" not in words:
        save_file(conv().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(SpoliaError) as told:
        classifiers(write(tmp_path, text))
    assert words in str(told.value) and "pool.yml" in str(told.value) and all(p.mend for p in told.value.problems)


def test_bad_files_are_found_by_the_audit_each_with_its_cause(tmp_path):
    save_file(conv().state_dict(), tmp_path / "narrow.safetensors")
    torch.save(conv(), tmp_path / "pickled.pt")  # a whole module: code
    state = conv(width=8).state_dict()
    del state["blocks.2.norm.weight"]
    save_file(state, tmp_path / "lost.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    told = {"network": {"model_type": "spolia_conv4", "hidden_size": 8}, "experts": str(tmp_path)}
    audit = classifiers(told).audit()
    said = {f.expert: f.what for f in audit.findings if f.level == "broken"}
    assert set(said) == {"narrow", "pickled", "lost", "cut"}
    assert "[4, 3, 3, 3], its architecture has [8, 3, 3, 3]" in said["narrow"]
    assert "any code" in said["pickled"] and "lacks blocks.2.norm.weight" in said["lost"]
    assert all(f.mend for f in audit.findings)
