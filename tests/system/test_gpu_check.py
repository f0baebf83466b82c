"""The GPU check as it runs without a GPU: its small form, its refusal, and that a wrong number fails it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.places import ROOT


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tests" / "gpu" / "check.sh"), *arguments]
    # Only the standard library and the five packages that the script names may be needed.
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_small_check_passes_on_a_cpu_and_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = check("--small", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["device"] == "cpu"
    assert report["torch"] == torch.__version__
    checks = {line["name"]: line for line in report["numerics"]}
    assert len(checks) == 20
    assert all(line["passed"] and line["error"] <= line["limit"] for line in checks.values())
    # Losses must not be equal because nothing was computed twice: bfloat16 really is coarser.
    assert checks["gradient, bf16"]["error"] > 100 * checks["gradient, float32"]["error"] > 0
    assert [row["step"] for row in report["steps"]] == [
        "official",
        "ours",
        "ours, compiled",
        "ours, compiled, cached",
    ]
    assert all(row["seconds"] > 0 and row["pairs_per_second"] > 0 for row in report["steps"])
    assert report["pcm"][0].keys() == {"rows", "columns", "eigh_ms", "pcm_ms"}
    assert report["left_out"] == []
    assert "| tiny | ours, compiled | 16 |" in done.stdout


def test_full_check_needs_a_gpu(tmp_path: Path) -> None:
    done = check(str(tmp_path / "figures.json"))
    assert done.returncode == 2
    assert done.stderr == "error: torch sees no CUDA device; run this on a GPU, or with --small on a CPU\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def numerics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("bench", "gpu"):
        monkeypatch.syspath_prepend(str(ROOT / "tests" / folder))
    return importlib.import_module("numerics")


def test_a_wrong_feature_fails_the_check(numerics: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_text = numerics.encode_text

    def slightly_wrong(model: Any, tokens: Any) -> Tensor:
        features = encode_text(model, tokens)
        return features if features.dtype == torch.float64 else features * (1 + 1e-4)

    monkeypatch.setattr(numerics, "encode_text", slightly_wrong)
    failed = [check["name"] for check in numerics.numerics("cpu") if not check["passed"]]
    assert failed == ["text features, float32"]
