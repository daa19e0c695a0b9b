"""The parts of benchmarks/merge.py that need numpy or torch, each run as a process of its own.

merge_work.py make FOLDER SIZE COUNT SEED     sharded bf16 checkpoints in Llama layout: base, expert-1 … expert-COUNT
merge_work.py copy OUT BYTES FILE...          the floor: read every file once, write BYTES once; standard library only
merge_work.py compare KIND OURS PEER BASE DENSITY GAMMA EXPERT...     how two results differ, as JSON
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

# hidden, feed-forward, layers, heads, key-value heads, vocabulary
SIZES = {
    "quick": (128, 344, 2, 4, 2, 1024),  # 0.6 M parameters: does everything run?
    "small": (512, 1408, 8, 8, 4, 32000),  # 56 M parameters, 0.11 GB
    "normal": (1024, 2816, 16, 16, 8, 32000),  # 254 M parameters, 0.51 GB in bf16
    "double": (1536, 4096, 16, 24, 12, 32000),  # 514 M parameters, 1.03 GB; its largest tensor grows as well
}
SHARDS = 3
BASE_SPREAD = 0.02  # Llama's initializer_range
CHANGE_SPREAD = 3e-4  # 12 % of the bf16 weights do not change, 8 % of the changes equal the threshold at density 0.2


def layout(size: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of an untied Llama, in file order."""
    hidden, inner, layers, heads, key_heads, vocabulary = SIZES[size]
    keys = hidden // heads * key_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def config(size: str) -> dict[str, object]:
    hidden, inner, layers, heads, key_heads, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make(folder: str, size: str, count: str, seed: str) -> None:
    """Write the base and `count` experts, expert = base + normal noise, both rounded to bf16."""
    import numpy as np

    def rounded(x: np.ndarray) -> np.ndarray:  # fp32 -> bf16 bits, to nearest even
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    shapes = layout(size)
    models = [Path(folder, name) for name in ("base", *(f"expert-{k + 1}" for k in range(int(count))))]
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    shards, done = {}, 0
    for name, shape in shapes.items():
        shards[name] = f"model-{min(done * SHARDS // total, SHARDS - 1) + 1:05d}-of-{SHARDS:05d}.safetensors"
        done += 2 * math.prod(shape)
    for model in models:
        model.mkdir(parents=True, exist_ok=True)
        for shard in dict.fromkeys(shards.values()):
            _write_header(model / shard, {name: shapes[name] for name in shapes if shards[name] == shard})
        index = {"metadata": {"total_size": total}, "weight_map": shards}
        (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (model / "config.json").write_text(json.dumps(config(size), indent=1))
    for i, (name, shape) in enumerate(shapes.items()):
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        noise = np.random.default_rng([int(seed), i])
        base = rounded(noise.standard_normal(shape, dtype=np.float32) * np.float32(BASE_SPREAD) + np.float32(mean))
        weights = (base.astype(np.uint32) << 16).view(np.float32)
        for k, model in enumerate(models):
            change = np.random.default_rng([int(seed), i, k])
            bits = base
            if k:
                bits = rounded(weights + change.standard_normal(shape, dtype=np.float32) * np.float32(CHANGE_SPREAD))
            with (model / shards[name]).open("ab") as file:
                bits.tofile(file)


def _write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def copy(out: str, size: str, *files: str) -> None:
    """Read every file through one reused 4 MiB buffer and write `size` bytes: what no merge can do without."""
    buffer, left = bytearray(4 << 20), int(size)
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for file in files:
        source = os.open(file, os.O_RDONLY)
        while count := os.readv(source, [buffer]):
            while left and count:
                written = os.write(target, memoryview(buffer)[: min(left, count)])
                left, count = left - written, count - written
        os.close(source)
    os.close(target)


def compare(kind: str, ours: str, peer: str, base: str, density: str, gamma: str, *experts: str) -> None:
    """Print how `ours` differs from `peer`, element by element over the whole model. By KIND:

    rounding  `different`, the share of elements that are not the same bf16 number; `beyond`, the share more than one
              bf16 step apart and further than fp32 sums of these inputs can err
    cut       the same away from ties at a cut: elements whose magnitude of change equals the smallest or the largest
              one kept, where either answer is right; `tied` is their share
    variance  as cut, for the elements whose variance over the experts is next to the largest that is dropped
    random    two draws are never equal: `kept` is the largest difference, over matrices, of the share of elements that
              changed; `norm` that of the L1 norm of the change, relative
    """
    a, b, zero, trained = _open(ours), _open(peer), _open(base), [_open(folder) for folder in experts]
    if set(a) != set(b):
        raise SystemExit(f"tensors differ: {sorted(set(a) ^ set(b))[:5]}")
    total = different = beyond = tied = 0
    kept = norm = 0.0
    for name in sorted(a):
        x, y = a[name](), b[name]()
        if x.shape != y.shape or x.dtype != y.dtype:
            raise SystemExit(f"{name}: {x.dtype} {tuple(x.shape)} against {y.dtype} {tuple(y.shape)}")
        total += x.numel()
        if kind == "random":
            if x.dim() < 2:
                continue  # too few elements for a share to be steady
            start = zero[name]().float()
            change, other = x.float() - start, y.float() - start
            kept = max(kept, abs((change != 0).float().mean().item() - (other != 0).float().mean().item()))
            norm = max(norm, abs(change.abs().mean().item() / other.abs().mean().item() - 1))
            continue
        steps = (_order(x) - _order(y)).abs()
        start, tensors = zero[name]().float(), [model[name]().float() for model in trained]
        if kind == "cut" or kind == "variance":
            cuts = [float(share) for share in (density, gamma)]
            free = _tie_free(start, tensors, *cuts) if kind == "cut" else _apart(tensors, cuts[0])
            tied += steps.numel() - int(free.sum())
            steps = steps * free
        error = sum((tensor.abs() for tensor in tensors), start.abs()) * 2**-22  # four roundings of fp32
        different += int((steps > 0).sum())
        beyond += int(((steps > 1) & ((x.float() - y.float()).abs() > error)).sum())
    if kind == "random":
        print(json.dumps({"kept": kept, "norm": norm}))
    else:
        print(json.dumps({"different": different / total, "beyond": beyond / total, "tied": tied / total}))


def _open(folder: str) -> dict:
    """Tensor name -> function that reads it."""
    from safetensors import safe_open

    readers = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        file = safe_open(path, "pt")
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            readers[name] = lambda file=file, name=name: file.get_tensor(name)
    return readers


def _order(x):
    """bf16 numbers as integers in the same order, so that neighbours differ by one."""
    import torch

    bits = x.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _tie_free(base, trained, density: float, gamma: float):
    """True where no expert's change sits exactly on a cut. Cuts are per tensor, counts rounded down."""
    import torch

    free = torch.ones_like(base, dtype=torch.bool)
    n = base.numel()
    top = int(gamma * n)
    bottom = n - int(density * n) - top
    for expert in trained:
        size = (expert - base).abs()
        for rank in {bottom + 1, n - top} if gamma else {bottom + 1}:  # 1 is the smallest
            free &= size != size.flatten().kthvalue(rank).values
    return free


def _apart(trained, density: float):
    """True where the variance over the experts is not that of the cut, up to fp32's error."""
    import numpy as np
    import torch

    variance = torch.stack(trained).double().var(0, unbiased=False).flatten()
    kept = int(density * int(variance.count_nonzero()))
    if kept == 0:
        return torch.ones_like(trained[0], dtype=torch.bool)
    cut = float(np.partition(variance.numpy(), variance.numel() - kept)[variance.numel() - kept])
    return ((variance - cut).abs() > 1e-5 * cut).view(trained[0].shape)


if __name__ == "__main__":
    {"make": make, "copy": copy, "compare": compare}[sys.argv[1]](*sys.argv[2:])
