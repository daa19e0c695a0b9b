"""What this machine can do and what stands in the way: findings with cures. No network; torch only with `deep`."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import spolia
from spolia.runs.environment import cores, installed, memory_bytes
from spolia.runs.sizes import show_size

PROBE_BYTES = 64 * 10**6
SLOW_DISK = 100e6  # bytes a second; below it a merge waits for the disk, not for the processor
EXTRAS = (
    ("transformers", "llm", "loads and generates with merged language models, and checks that results load back"),
    ("scikit-learn", "digits", "the demo and every -tiny recipe"),
    ("httpx", "api", "asks and serves experts over HTTP, and shows runs in the browser"),
    ("datasets", "data", "loads data sets by name"),
    ("sacrebleu", "text", "BLEU of texts that went through a link"),
    ("sionna-no-rt", "comms", "the LDPC code of 5G for links"),
    ("huggingface_hub", "hub", "reads models from the hub by name, and pushes them there"),
    ("optuna", "tune", "searches settings: sweep --search"),
    ("submitit", "slurm", "sweeps as jobs of Slurm"),
    ("ray", "ray", "sweeps on a Ray cluster"),
)


@dataclass(frozen=True)
class Finding:
    """`state`: fine, note (works, could be better), problem (something will fail)."""

    name: str
    state: Literal["fine", "note", "problem"]
    found: str
    cure: str = ""


def examine(folder: Path | None = None, *, deep: bool = False) -> list[Finding]:
    """Findings about this machine; the write speed is that of `folder` (default: the current one)."""
    findings = [
        Finding("python", "fine", platform.python_version()),
        Finding("spolia", "fine", spolia.__version__),
        *_torch(),
        *(_extra(package, extra, use) for package, extra, use in EXTRAS),
        Finding("cores", "fine", str(cores())),
        _memory(),
        _disk(folder or Path.cwd()),
        _network(),
    ]
    if deep:
        findings.append(_torch_itself())
    return findings


def findings_data(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def findings_text(findings: list[Finding]) -> str:
    """One line a finding, its cure below."""
    name = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8}{finding.name:{name}}  {finding.found}")
        if finding.cure:
            lines.append(f"{'':8}{'':{name}}  mend: {finding.cure}")
    return "\n".join(lines)


def _torch() -> list[Finding]:
    torch, vision = installed("torch"), installed("torchvision")
    if torch is None:
        return [Finding("torch", "problem", "not installed", "pip install torch")]
    card = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    cpu_only = torch.endswith("+cpu")
    if cpu_only and card:
        cure = "install a CUDA build of torch; merging from disk does not need it"
        findings = [Finding("torch", "note", f"{torch}: a build without CUDA on a machine with an NVIDIA card", cure)]
    else:
        findings = [Finding("torch", "fine", torch + (" (no CUDA)" if cpu_only else ""))]
    if vision is None:
        findings.append(Finding("torchvision", "fine", "not installed; nothing needs it yet"))
    elif cpu_only and not vision.endswith("+cpu"):
        what = f"{vision}: built for CUDA, beside a torch that is not; importing it, or what imports it, fails"
        cure = "pip uninstall torchvision, or install its CPU build from where torch came"
        findings.append(Finding("torchvision", "problem", what, cure))
    else:
        findings.append(Finding("torchvision", "fine", vision))
    return findings


def _extra(package: str, extra: str, use: str) -> Finding:
    version = installed(package)
    if version:
        return Finding(package, "fine", f"{version}: {use}")
    return Finding(package, "note", f"not installed: {use}", f"pip install 'spolia[{extra}]'")


def _memory() -> Finding:
    total = memory_bytes()
    if total is None:
        return Finding("memory", "note", "unknown on this system", "keep output.chunk_memory well below it")
    return Finding("memory", "fine", show_size(total))


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free < 2 * PROBE_BYTES:
        cure = "make room, or work in another folder"
        return Finding("disk", "problem", f"{show_size(free)} free in {folder}", cure)
    try:
        speed = _write_speed(folder)
    except OSError as error:
        cure = "work in a folder that you may write to"
        return Finding("disk", "problem", f"{folder} cannot be written: {error.strerror}", cure)
    found = f"writes {show_size(speed)}/s, {show_size(free)} free in {folder}"
    if speed < SLOW_DISK:
        return Finding("disk", "note", found, "write results to a local disk; merges wait for this one")
    return Finding("disk", "fine", found)


def _write_speed(folder: Path) -> float:
    """Bytes a second, flushed to the disk. The file is gone afterwards, also when this is interrupted."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".spolia-doctor-") as file:
        start = time.perf_counter()
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES // len(block) * len(block) / (time.perf_counter() - start)


def _network() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("network", "fine", "HF_HUB_OFFLINE is set; spolia works without a network anyway")
    return Finding("network", "fine", "not needed and not tried; set HF_HUB_OFFLINE=1 to keep other packages off it")


def _torch_itself() -> Finding:
    """Imports torch, which costs seconds."""
    try:
        import torch
    except Exception as error:  # a broken build fails with OSError or RuntimeError as well
        return Finding("torch import", "problem", f"fails: {error}", "install torch again")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return Finding("torch import", "fine", f"works; device {device}, {torch.get_num_threads()} threads")
