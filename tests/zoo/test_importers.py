"""open_clip's checkpoints: read as data, whatever they hold; named as transformers names them, to the same features."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia.core import inert
from spolia.core.inert import read_inert
from spolia.errors import SpoliaError
from spolia.zoo.clip_names import expected_shapes, to_open_clip, to_transformers
from spolia.zoo.importers import clip_config, read_clip, read_head

WIDTH, LAYERS, HEADS, PATCH, SIZE, DIM, VOCABULARY, LONGEST = 24, 2, 3, 4, 8, 12, 40, 10
TOLERANCE = 2e-6  # features of size 1 through two blocks; sums of 24 to 96 fp32 products in another order


# --- a CLIP with open_clip's names, in plain PyTorch -----------------------------------------------------------------


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, gelu: type[nn.Module]):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", gelu()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, gelu: type[nn.Module]):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(WIDTH, gelu) for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, gelu: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(WIDTH), Tower(gelu), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, DIM) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, gelu: type[nn.Module] = QuickGELU):
        super().__init__()
        self.visual, self.transformer = Visual(gelu), Tower(gelu)
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LONGEST, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, DIM) / WIDTH**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("attn_mask", torch.full((LONGEST, LONGEST), -torch.inf).triu(1), persistent=False)

    def encode_text(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:count]
        x = self.ln_final(self.transformer(x, self.attn_mask[:count, :count]))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


class ImageEncoder(nn.Module):
    """As the papers' experts were saved: the model in a module, its text tower taken out, transforms beside it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.cache_dir = model, None
        self.train_preprocess = {"mean": (0.5,), "resize": QuickGELU()}
        del model.transformer


OWN = (QuickGELU, Block, Tower, Visual, OpenClip, ImageEncoder)


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the classes stand in modules that a reader could import; importing or building them fails loudly."""
    clip, papers = types.ModuleType("open_clip_of_old"), types.ModuleType("src_of_the_papers")
    for module in (clip, papers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for one in OWN:
        home = papers if one is ImageEncoder else clip
        setattr(home, one.__name__, one)
        monkeypatch.setattr(one, "__module__", home.__name__)
    yield


def a_clip(gelu: type[nn.Module] = QuickGELU, seed: int = 0) -> OpenClip:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = OpenClip(gelu).eval()
        with torch.no_grad():
            for parameter in made.parameters():  # norms and biases start at 1 and 0, which would hide a swap
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_clip_of_old", "src_of_the_papers"):
        monkeypatch.delitem(sys.modules, name)


FORMS = {
    "zip": lambda value, file: torch.save(value, file),
    "legacy": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "pickle": lambda value, file: file.write_bytes(pickle.dumps(value)),
}


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_module_is_read_without_its_classes(form: str, vanishing, monkeypatch, tmp_path: Path) -> None:
    model = ImageEncoder(a_clip())
    FORMS[form](model, tmp_path / "finetuned.pt")
    forget(monkeypatch)  # from here on nobody could build them
    found = read_inert(tmp_path / "finetuned.pt")
    state = model.state_dict()
    assert list(found.views) == list(state)
    assert all(torch.equal(found.tensor(name), state[name]) for name in state)
    assert found.kinds[""] == "src_of_the_papers.ImageEncoder"
    assert found.kinds["model.visual.transformer.resblocks.0.mlp.gelu"].endswith("QuickGELU")
    assert "open_clip_of_old" not in sys.modules


@pytest.mark.parametrize("form", FORMS)
def test_ties_views_types_and_empty_tensors(form: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    whole = torch.arange(24.0).view(4, 6)
    state = {
        "turned": whole.t(), "part": whole[1:3, 2:5], "half": whole.half(), "bf16": whole.bfloat16(),
        "count": torch.tensor(3), "none": torch.empty(0, 4), "flag": torch.tensor([True, False]), "net": net,
    }  # fmt: skip
    FORMS[form]({"state_dict": state, "epoch": 3, 7: "seven"}, tmp_path / "x.pt")
    found = read_inert(tmp_path / "x.pt")
    wanted = {f"state_dict.{name}": t for name, t in state.items() if isinstance(t, Tensor)}
    wanted |= {f"state_dict.net.{name}": t for name, t in net.state_dict().items()}
    assert sorted(found.views) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found.tensor(name), tensor) and found.tensor(name).dtype == tensor.dtype
    assert found.tensor("state_dict.turned").is_contiguous()


class Canary:
    """Every way in which a pickle can run something when it is loaded, each leaving a mark."""

    def __init__(self, marker: Path, way: str):
        self.marker, self.way = marker, way

    def __reduce_ex__(self, protocol: Any) -> Any:
        command = f"touch {self.marker}"
        ways = {
            "system": (os.system, (command,)),
            "eval": (eval, (f"__import__('os').system({command!r})",)),
            "partial": (__import__("functools").partial(os.system, command), ()),
            "setstate": (_Sets, (), str(self.marker)),
            "list": (_List, (), None, iter([str(self.marker)])),
            "dict": (_Dict, (), None, None, iter([("k", str(self.marker))])),
            "getattr": (getattr, (Path(self.marker), "touch")),
        }
        return ways[self.way]


class _Sets:
    def __setstate__(self, state: str) -> None:
        Path(state).touch()


class _List(list):
    def append(self, item: Any) -> None:
        Path(item).touch()

    def extend(self, items: Any) -> None:
        Path(next(iter(items))).touch()


class _Dict(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        Path(value).touch()


@pytest.fixture
def honest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traps stand in a module that can be imported, so that they would spring."""
    home = types.ModuleType("traps_of_the_test")
    monkeypatch.setitem(sys.modules, home.__name__, home)
    for one in (_Sets, _List, _Dict):
        setattr(home, one.__name__, one)
        monkeypatch.setattr(one, "__module__", home.__name__)


@pytest.mark.parametrize("way", ["system", "eval", "partial", "setstate", "list", "dict", "getattr"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_a_file_runs(form: str, way: str, honest, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    value = {"w": torch.ones(2), "evil": Canary(marker, way), "z": torch.zeros(3)}
    FORMS[form](value, tmp_path / "evil.pt")
    found = read_inert(tmp_path / "evil.pt")
    assert {"w", "z"} <= set(found.views) and torch.equal(found.tensor("z"), torch.zeros(3))
    assert not marker.exists()
    pickle.loads(pickle.dumps(value["evil"]))  # and the trap does spring where it is loaded without care
    assert marker.exists() or way == "getattr"


def test_a_trap_inside_a_storages_own_bytes(tmp_path: Path) -> None:
    """A plain pickle keeps a storage as bytes that hold pickles again."""
    marker = tmp_path / "ran"
    inner = io.BytesIO()
    torch.save({"evil": Canary(marker, "system")}, inner, _use_new_zipfile_serialization=False)

    class Loaded:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"w": Loaded()}))
    with pytest.raises(SpoliaError, match="something else"):
        read_inert(tmp_path / "evil.pt")
    assert not marker.exists()


def raw(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"garbage that is no pickle",
        raw(b"0"),  # takes from an empty stack
        raw(b"h\x05"),  # reads what was never kept
        raw(b"t"),  # a tuple without a mark
        raw(b"}q\x00X\x01\x00\x00\x00ah\x00s"),  # a mapping that holds itself
        raw(b"]q\x00", *[b"(h\x00h\x00lq\x00" for _ in range(3)], b"\x97"),  # asks for a buffer from outside
        raw(b"\x8a\xff" + b"\x01" * 10),  # a number cut short
        raw(b"B\xff\xff\xff\x7f" + b"x"),  # bytes that are not there
        raw(b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x"),  # more of them than fit into any memory
        raw(b"X\x02\x00\x00\x00ab", b"Q"),  # a storage that is a text
    ],
)
def test_damage_and_bombs_are_told(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(data)
    with pytest.raises(SpoliaError) as caught:
        read_inert(file)
    assert caught.value.problems[0].mend and str(file) in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_changed_in_a_file_it_is_read_or_told(form: str, tmp_path: Path) -> None:
    """Bytes written over others at random: tensors come out or a SpoliaError, nothing else, and nothing hangs."""
    FORMS[form](nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), tmp_path / "whole.pt")
    whole, draws = (tmp_path / "whole.pt").read_bytes(), torch.Generator().manual_seed(0)
    read = 0
    for turn in range(150):
        data = bytearray(whole)
        for place, value in torch.randint(0, 1 << 30, (1 + turn % 3, 2), generator=draws).tolist():
            data[place % len(data)] = value % 256
        (tmp_path / "x.pt").write_bytes(data)
        try:
            found = read_inert(tmp_path / "x.pt")
            read += len([found.tensor(name) for name in found.views]) > 0
        except SpoliaError as error:
            assert error.problems[0].mend
    assert read  # many single changes hit numbers or padding


def test_a_short_file_that_grows_without_bound_is_refused(tmp_path: Path) -> None:
    """Forty mappings, each with the next one twice: 2^40 paths, of which the walk takes a bounded number."""
    inner: Any = {"w": 1}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    (tmp_path / "x.pt").write_bytes(pickle.dumps(inner))
    with pytest.raises(SpoliaError, match="more than"):
        read_inert(tmp_path / "x.pt")


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_tensors_cannot_claim_what_is_not_there(form: str, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "x.pt"
    FORMS[form]({"w": torch.ones(1).expand(2_000_000)}, file)
    with pytest.raises(SpoliaError, match="reaches beyond"):
        read_inert(file)
    FORMS[form]({"w": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(SpoliaError):
        read_inert(file).tensor("w")


def test_a_torchscript_program_is_told(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/code/net.py", "pass")
        archive.writestr("x/data.pkl", raw(b"}"))
    with pytest.raises(SpoliaError, match="TorchScript"):
        read_inert(tmp_path / "x.pt")


def test_opcodes_are_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("spolia.core.opcodes.MOST_OPCODES", 100)
    (tmp_path / "x.pt").write_bytes(raw(b"N0" * 200, b"N"))
    with pytest.raises(SpoliaError, match="opcodes"):
        read_inert(tmp_path / "x.pt")
    assert inert.MOST_NODES > 10_000


# --- names -----------------------------------------------------------------------------------------------------------


def of_transformers(model: OpenClip, gelu: str = "quick_gelu") -> Any:
    """The same CLIP, built by transformers from the config that the importer writes."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_dict(config_of(model, gelu == "quick_gelu"))
    made = CLIPModel(config).eval()
    made.load_state_dict(to_transformers(model.state_dict()))
    return made


def config_of(model: OpenClip, quick: bool = True) -> dict[str, Any]:
    from spolia.zoo.importers import Found

    found = Found(to_transformers(model.state_dict()), heads=HEADS, text_heads=HEADS)
    return clip_config(found, quick_gelu=quick)


def test_both_directions_are_exact() -> None:
    state = a_clip().state_dict()
    theirs = to_transformers(state)
    back = to_open_clip(theirs)
    assert sorted(back) == sorted(state) and all(torch.equal(back[name], state[name]) for name in state)
    again = to_transformers(back)
    assert sorted(again) == sorted(theirs) and all(torch.equal(again[name], theirs[name]) for name in theirs)
    image = {name: t for name, t in state.items() if name.startswith("visual.") and name != "visual.proj"}
    assert sorted(to_open_clip(to_transformers(image))) == sorted(image)


@pytest.mark.parametrize("gelu", [QuickGELU, nn.GELU])
def test_the_same_features_from_both(gelu: type[nn.Module]) -> None:
    ours, theirs = a_clip(gelu), of_transformers(a_clip(gelu), "quick_gelu" if gelu is QuickGELU else "gelu")
    draws = torch.Generator().manual_seed(1)
    pictures = torch.randn(5, 3, SIZE, SIZE, generator=draws)
    tokens = torch.randint(0, VOCABULARY - 2, (4, LONGEST), generator=draws)
    for row, end in enumerate((3, 5, 7, LONGEST - 1)):  # a text ends with the largest token
        tokens[row, end] = VOCABULARY - 1
        tokens[row, end + 1 :] = 0
    with torch.no_grad():
        images = theirs.visual_projection(theirs.vision_model(pixel_values=pictures).pooler_output)
        texts = theirs.text_projection(theirs.text_model(input_ids=tokens).pooler_output)
        assert (images - ours.visual(pictures)).abs().max() < TOLERANCE
        assert (texts - ours.encode_text(tokens)).abs().max() < TOLERANCE
        wrong = of_transformers(a_clip(gelu), "gelu" if gelu is QuickGELU else "quick_gelu")
        other = wrong.visual_projection(wrong.vision_model(pixel_values=pictures).pooler_output)
    assert (other - images).abs().max() > 100 * TOLERANCE  # the test would see the wrong activation


def test_a_swap_of_queries_and_values_would_be_seen() -> None:
    ours, theirs = a_clip(), of_transformers(a_clip())
    attention = theirs.vision_model.encoder.layers[0].self_attn
    attention.q_proj, attention.v_proj = attention.v_proj, attention.q_proj
    pictures = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = theirs.visual_projection(theirs.vision_model(pixel_values=pictures).pooler_output)
        assert (images - ours.visual(pictures)).abs().max() > 100 * TOLERANCE


def test_shapes_and_config_come_from_the_tensors() -> None:
    model = a_clip()
    config = config_of(model)
    tensors = to_transformers(model.state_dict())
    assert expected_shapes(config["vision_config"], config["text_config"]) == {
        name: tuple(t.shape) for name, t in tensors.items()
    }
    sight = config["vision_config"]
    assert (sight["image_size"], sight["patch_size"], sight["num_attention_heads"]) == (SIZE, PATCH, HEADS)
    assert config["text_config"]["eos_token_id"] == VOCABULARY - 1
    assert config["logit_scale_init_value"] == pytest.approx(float(model.logit_scale.detach()))


# --- whole files -----------------------------------------------------------------------------------------------------


def test_an_expert_of_the_papers(vanishing, monkeypatch, tmp_path: Path) -> None:
    model = ImageEncoder(a_clip(nn.GELU))
    torch.save(model, tmp_path / "finetuned.pt")
    forget(monkeypatch)
    found = read_clip(tmp_path / "finetuned.pt")
    assert (found.heads, found.quick_gelu, found.eps) == (HEADS, False, 1e-5)
    assert len(found.tensors) == 8 + 16 * LAYERS and "logit_scale" not in found.tensors
    assert set(found.left_out) == {
        "model.positional_embedding", "model.text_projection", "model.logit_scale", "model.token_embedding.weight",
        "model.ln_final.weight", "model.ln_final.bias",
    }  # fmt: skip
    assert clip_config(found, quick_gelu=False)["architectures"] == ["CLIPVisionModelWithProjection"]
    with pytest.raises(SpoliaError, match="no text tower"):
        read_clip(tmp_path / "finetuned.pt", text=True)


def test_state_dicts_prefixes_and_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = a_clip().state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "x.pt")
    save_file(state, tmp_path / "x.safetensors")
    wanted = to_transformers(state)
    for file in ("x.pt", "x.safetensors"):
        found = read_clip(tmp_path / file, text=True)
        assert found.heads is None and found.quick_gelu is None  # a state dict does not tell
        assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted) and len(found.tensors) == len(
            wanted
        )
    assert "visual_projection.weight" not in read_clip(tmp_path / "x.pt", projection=False).tensors


def test_a_folder_of_transformers_and_its_image_tower(tmp_path: Path) -> None:
    whole = of_transformers(a_clip())
    whole.save_pretrained(tmp_path / "whole")
    found = read_clip(tmp_path / "whole")
    assert (found.heads, found.quick_gelu) == (HEADS, True) and any("text_model" in name for name in found.left_out)
    whole.vision_model.save_pretrained(tmp_path / "tower")  # as the hub's image towers are stored
    tower = read_clip(tmp_path / "tower").tensors
    assert sorted(tower) == sorted(name for name in found.tensors if name != "visual_projection.weight")
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    assert read_clip(tmp_path).heads == HEADS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("visual.conv1.weight"), "no tensor `visual.conv1.weight`"),
        (lambda s: s.pop("visual.class_embedding"), "no transformer"),
        (lambda s: s.pop("visual.transformer.resblocks.1.attn.in_proj_bias"), "lacks tensor"),
        (lambda s: s.update({"other.visual.conv1.weight": s["visual.conv1.weight"]}), "2 CLIPs"),
        (lambda s: s.update({"visual.proj": torch.ones(WIDTH)}), "which no CLIP has"),
        (
            lambda s: s.update({"visual.transformer.resblocks.0.attn.in_proj_weight": torch.ones(7, WIDTH)}),
            "no CLIP has",
        ),
        (lambda s: s.update({"visual.positional_embedding": torch.ones(7, WIDTH)}), "no square"),
        (lambda s: s.update({"visual.ln_pre.bias": torch.ones(WIDTH + 1)}), "ask for"),
        (lambda s: s.update({"visual.conv1.weight": torch.ones(WIDTH, 3, PATCH, PATCH + 1)}), "not square"),
    ],
)
def test_what_is_no_clip_is_told(change: Any, words: str, tmp_path: Path) -> None:
    state = dict(a_clip().state_dict())
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(SpoliaError) as caught:
        clip_config(read_clip(tmp_path / "x.pt"), quick_gelu=True, heads=HEADS)
    assert words in str(caught.value) and all(problem.mend for problem in caught.value.problems)


def test_heads_of_attention_are_asked_for_where_nothing_tells(tmp_path: Path) -> None:
    torch.save(a_clip().state_dict(), tmp_path / "x.pt")
    found = read_clip(tmp_path / "x.pt")
    with pytest.raises(SpoliaError, match="give the number of heads"):
        clip_config(found, quick_gelu=True)  # 24 is no multiple of 64
    with pytest.raises(SpoliaError, match="do not go together"):
        clip_config(found, quick_gelu=True, heads=5)
    assert clip_config(found, quick_gelu=True, heads=HEADS)["num_attention_heads"] == HEADS


def test_a_published_head(tmp_path: Path) -> None:
    head = nn.Linear(DIM, 4)
    nn.init.zeros_(head.bias)
    torch.save(head, tmp_path / "head.pt")
    assert torch.equal(read_head(tmp_path / "head.pt"), head.weight)
    nn.init.ones_(head.bias)
    torch.save(head, tmp_path / "head.pt")
    with pytest.raises(SpoliaError, match="bias"):
        read_head(tmp_path / "head.pt")
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "head.pt")
    with pytest.raises(SpoliaError, match="no single matrix"):
        read_head(tmp_path / "head.pt")
