"""Time and peak memory of one piece of work, each in a fresh child process, so that one cannot help or hurt another."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_rss_mb() -> float:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """Fastest of some runs after one that is not counted (for a single repeat, that run counts)."""
    if repeats > 1:
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def in_child(script: str, *arguments: str) -> dict[str, Any]:
    """Run this benchmark again as a child that measures one thing and prints it as its last line of JSON."""
    command = [sys.executable, script, "--child", *arguments]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return row


def gemm_gflops(repeats: int = 5) -> float:
    """This machine's float32 matrix product peak, 2048 x 2048."""
    import torch

    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best_seconds(lambda: a @ a, repeats) / 1e9


def machine() -> dict[str, Any]:
    """What was measured on, and when."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "machine": f"{os.cpu_count()} cores of {model}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "gemm_gflops_fp32": round(gemm_gflops(), 1),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
