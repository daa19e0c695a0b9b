"""The command as a person meets it: start-up without torch, exit codes, errors in three parts, the right stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spolia import __version__, catalog, cli
from spolia.errors import SpoliaError
from spolia.runs import doctor
from spolia.runs.describe import columns, plan_text

HEAVY = ("torch", "matplotlib", "jinja2", "rich", "transformers", "sklearn", "safetensors.torch")


def spolia(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.slow
def test_looking_around_imports_nothing_heavy(tmp_path):
    """One process says everything, one after the other: what the first brought in would show in all that follow."""
    said = [
        ["--help"], [], ["list"], ["list", "sign", "--json"], ["show", "ties"], ["show", "slerp", "--json"],
        ["new", "ties"], ["schema"], ["run", "--help"], ["run", "merge/tis"], ["plan", "merge/ties", "method.lrr=3"],
        ["merge", "none.yml", "out"], ["import", "--help"], ["import", "none.pt", "-o", "out"],
        ["link"], ["link", "demo", "--help"], ["sweep", "--help"], ["ui", "--help"], ["push", "--help"],
    ]  # fmt: skip
    program = (
        "import json, sys\nfrom spolia.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n        main(arguments)\n    except SystemExit as end:\n        code = end.code or 0\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if heavy or code not in (0, 2): sys.exit(f'{arguments} ends with {code} and brings in {heavy}')"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, json.dumps(said)], capture_output=True, text=True, cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    assert list(tmp_path.iterdir()) == []


def test_list_is_grouped_and_whole(capsys):
    code, out, err = spolia(capsys, "list")
    assert (code, err) == (0, "")
    assert out.startswith("merge: ")
    for method in catalog.METHODS:
        assert any(line.split()[0] == method.name for line in out.splitlines() if line.startswith("  "))
        assert method.paper in out


def test_list_finds_by_word_and_by_near_name(capsys):
    assert "task_arithmetic" in spolia(capsys, "list", "unlearn")[1]
    assert "task_arithmetic" in spolia(capsys, "list", "task", "arithmetc")[1]
    found = json.loads(spolia(capsys, "list", "davari", "--json")[1])
    assert {row["name"] for row in found} == {"breadcrumbs", "breadcrumbs_ties"}
    code, out, err = spolia(capsys, "list", "quantum")
    assert (code, out) == (2, "")
    assert "`quantum`" in err


@pytest.mark.parametrize("method", catalog.METHODS, ids=lambda m: m.name)
def test_show_names_every_setting_with_its_source(capsys, method):
    code, out, _ = spolia(capsys, "show", method.name)
    assert code == 0
    for name, field in method.settings_class().model_fields.items():
        row = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert field.json_schema_extra["source"] in row
    assert f"spolia run {method.family}/{method.name}-tiny" in out


def test_new_writes_a_recipe_once(capsys, tmp_path):
    file = tmp_path / "my.yaml"
    assert spolia(capsys, "new", "ties", "-o", str(file))[0] == 0
    assert f"spolia run {file}" in file.read_text()
    code, _, err = spolia(capsys, "new", "ties", "-o", str(file))
    assert code == 2
    assert "exists" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "tis"], ["`tis`", "did you mean `ties`?"]),
        (["lst"], ["No such command 'lst'", "list"]),
        (["run", "merge/ties-tiny", "--frsh"], ["--frsh", "--fresh"]),
        (["run", "merge/tis"], ["merge/tis", "did you mean `merge/ties`?"]),
        (["run", "merge/ties-tiny", "method.densty=1"], ["override method.densty", "did you mean `density`?"]),
        (["plan", "merge/ties-tiny", "method.densty=1", "sed=2"], ["2 problems", "`density`", "`seed`"]),
        (["merge", "merge/ties", "out", "--chunk-memory", "5X"], ["--chunk-memory", "`5X`", "5GB"]),
        (["report", "nowhere"], ["nowhere", "no such folder"]),
        (["report", ".", "--to", "htm"], ["`htm`", "`html`"]),
        (["import", "none.pt", "-o", "out"], ["none.pt", "no such file"]),
        (["import", "none.pt"], ["--out"]),
        (["link", "demo", " "], ["there is no text", "spolia link demo"]),
        (["new", "ties", "-o", "no/such/folder.yaml"], ["no/such/folder.yaml", "cannot be written"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_a_mistake_ends_with_2_and_its_cure_on_stderr(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = spolia(capsys, *arguments)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert list(tmp_path.iterdir()) == []


def test_our_mistake_ends_with_1_and_its_trace_only_on_demand(capsys, monkeypatch):
    def broken(_: str) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(catalog, "search", broken)
    code, _, err = spolia(capsys, "list")
    assert code == 1
    assert "ZeroDivisionError: oops" in err
    assert "mistake of its own" in err
    assert "--debug" in err
    assert "Traceback" not in err
    for arguments in (["--debug", "list"], ["list", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            cli.main(arguments)


def test_a_refusal_of_the_system_is_not_our_mistake(capsys, monkeypatch):
    def full(_: str) -> None:
        raise OSError(28, "No space left on device", "/out")

    monkeypatch.setattr(catalog, "search", full)
    code, _, err = spolia(capsys, "list")
    assert code == 2
    assert "/out: No space left on device" in err


def test_debug_shows_the_trace_of_a_users_mistake_too(capsys):
    with pytest.raises(SpoliaError):
        cli.main(["show", "tis", "--debug"])


def test_an_interrupted_run_ends_with_130_and_the_command_to_go_on(capsys, monkeypatch):
    from spolia.runs import verbs

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "run", interrupted)
    code, _, err = spolia(capsys, "run", "merge/ties-tiny", "--fresh", "pool.domains=[upright, turned]")
    assert code == 130
    assert err.splitlines()[-1].strip() == "spolia run merge/ties-tiny 'pool.domains=[upright, turned]'"


def test_what_is_typed_reaches_the_verb(capsys, monkeypatch, tmp_path):
    from spolia.runs import verbs

    seen = {}

    def record(path, out, **options):
        seen.update(options, path=path, out=out)
        return Path(out)

    monkeypatch.setattr(verbs, "merge_recipe", record)
    arguments = [
        "merge",
        "my.yml",
        str(tmp_path),
        "--max-shard-size",
        "1GiB",
        "--threads",
        "3",
        "--seed",
        "5",
        "--overwrite",
    ]
    code, out, _ = spolia(capsys, *arguments, "--quiet", "--json")
    assert code == 0
    assert json.loads(out) == {"out": str(tmp_path)}
    assert (seen["path"], seen["max_shard_size"], seen["chunk_memory"]) == ("my.yml", 2**30, 10**9)
    assert (seen["threads"], seen["seed"], seen["overwrite"], seen["progress"]) == (3, 5, True, None)


def test_import_hands_on_what_is_typed_and_tells_what_it_left_out(capsys, monkeypatch):
    from spolia.runs import importing

    seen = []
    told = {
        "folder": "out", "tensors": 5, "architecture": "CLIPModel", "left out": ["a\x1b[2J", "b", "c", "d"], "assumed": [],
    }  # fmt: skip

    def record(*places, **options):
        seen.append((*places, options))
        return told

    monkeypatch.setattr(importing, "import_model", record)
    plain = {"text": False, "projection": True, "quick_gelu": None, "heads": None, "overwrite": False}
    assert spolia(capsys, "import", "x.pt", "-o", "out") == (
        0, "imported model: out\n  CLIPModel, 5 tensors\n  left out: 4, as a\\x1b[2J, b, c, …\n", "",
    )  # fmt: skip
    words = ["--text", "--no-projection", "--no-quick-gelu", "--heads", "3", "--overwrite", "--json"]
    code, out, _ = spolia(capsys, "import", "x.pt", "--out", "out", *words)
    assert (code, json.loads(out)) == (0, told)
    asked = {"text": True, "projection": False, "quick_gelu": False, "heads": 3, "overwrite": True}
    assert seen == [("x.pt", Path("out"), plain), ("x.pt", Path("out"), asked)]


@pytest.mark.slow
def test_import_writes_a_folder_once(capsys, tmp_path):
    import torch

    from spolia.core.checkpoint import read_tensors

    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (16,), "embeddings.patch_embedding.weight": (16, 3, 4, 4),
        "embeddings.position_embedding.weight": (5, 16), "encoder.layers.0.mlp.fc1.weight": (32, 16),
        "encoder.layers.0.mlp.fc1.bias": (32,), "encoder.layers.0.mlp.fc2.weight": (16, 32),
        "encoder.layers.0.mlp.fc2.bias": (16,),
    }  # fmt: skip
    norms = ("pre_layrnorm", "post_layernorm", "encoder.layers.0.layer_norm1", "encoder.layers.0.layer_norm2")
    sizes |= {f"{norm}.{part}": (16,) for norm in norms for part in ("weight", "bias")}
    for name in "qkv":
        sizes |= {f"encoder.layers.0.self_attn.{name}_proj.{p}": s for p, s in (("weight", (16, 16)), ("bias", (16,)))}
    sizes |= {"encoder.layers.0.self_attn.out_proj.weight": (16, 16), "encoder.layers.0.self_attn.out_proj.bias": (16,)}
    clip = {f"vision_model.{name}": torch.randn(size) for name, size in sizes.items()}
    clip["visual_projection.weight"] = torch.randn(12, 16)
    torch.save(clip | {"x": torch.ones(1)}, tmp_path / "x.pt")
    typed = ["import", str(tmp_path / "x.pt"), "-o", str(tmp_path / "clip"), "--heads", "2"]
    code, text, err = spolia(capsys, *typed)
    assert code == 0, err
    assert f"imported model: {tmp_path / 'clip'}\n" in text and "left out: 1, as x" in text and "QuickGELU" in err
    made = read_tensors(tmp_path / "clip")
    assert made.keys() == clip.keys() and all(torch.equal(made[name], tensor) for name, tensor in clip.items())
    code, _, err = spolia(capsys, *typed)
    assert code == 2 and "--overwrite" in err


def test_version(capsys):
    assert spolia(capsys, "--version")[:2] == (0, f"spolia {__version__}\n")


@pytest.mark.slow
def test_completion_offers_methods_recipes_and_settings(tmp_path):
    def offered(words: str) -> str:
        environment = {
            **os.environ,
            "_SPOLIA_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        program = "from spolia.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        return done.stdout

    assert "breadcrumbs_ties" in offered("spolia show bre")
    assert "merge/ties-tiny" in offered("spolia run merge/ti")
    assert "method.density=" in offered("spolia run merge/ties-tiny method.d")


def test_doctor_leaves_nothing_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "PROBE_BYTES", 2**20)
    code, out, _ = spolia(capsys, "doctor", "--json")
    assert code == 0
    names = {finding["name"] for finding in json.loads(out)}
    assert {"python", "torch", "torchvision", "disk", "memory", "cores", "network"} <= names
    assert list(tmp_path.iterdir()) == []


# --- what is printed -------------------------------------------------------------------------------------------------


def test_columns_wrap_to_the_screen_and_lose_nothing():
    rows = [("ties", "a long sentence about what it does " * 3, "Yadav et al.")]
    wide, narrow = columns(("name", "does", "paper"), rows), columns(("name", "does", "paper"), rows, 60)
    assert len(wide.splitlines()) == 2
    assert max(map(len, narrow.splitlines())) <= 60
    assert sorted(narrow.split()) == sorted(wide.split())


PHASE = {"name": "merge", "does": "trim", "data": "none", "trained": "nothing", "frozen": "", "writes": "result/"}
EXPERT = {"name": "math", "path": "/m", "role": "expert", "tensors": 3, "bytes": 10**9, "dtypes": {"bfloat16": 3}}
PLAN = {
    "title": "ties merge of 2 experts", "method": "ties", "tensors": 3, "dtypes": {"bfloat16": 3}, "bytes_in": 3e9,
    "phases": [PHASE], "inputs": [EXPERT], "bytes_out": 10**9, "peak_memory_bytes": 10**8, "disk_needed_bytes": 10**9,
    "disk_free_bytes": 10**10, "seconds": 100.0, "time_basis": "disk at 200 MB/s", "files": ["out/model.safetensors"],
    "seeds": [0], "warnings": ["mind the gap"],
}  # fmt: skip


def test_a_plan_tells_everything_it_holds():
    text = plan_text(PLAN)
    for word in (
        "ties merge",
        "trim",
        "math",
        "/m",
        "3 bfloat16",
        "3 GB",
        "100 MB",
        "2 min",
        "200 MB/s",
        "out/model",
        "mind",
    ):
        assert word in text


@pytest.mark.slow
def test_a_sentence_goes_through_noise(capsys):
    code, out, _ = spolia(capsys, "link", "demo", "Text through noise.", "--esn0", "12", "--json")
    assert code == 0 and {read["text"] for read in json.loads(out)["reads"]} == {"Text through noise."}
    code, out, _ = spolia(capsys, "link", "demo", "Text through noise.", "--esn0", "12")
    assert code == 0 and out.count("right") == 5
