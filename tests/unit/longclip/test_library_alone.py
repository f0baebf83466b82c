"""The library without Ray and the other packages of the extras: imports, conversion, the loop of docs/training.md."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from longclip.checkpoint import new_model, save_checkpoint
from tests.support.places import ROOT
from tests.support.tiny_clip import tiny_config
from tests.support.weights import openai_state

IMPORT_ALL = """
import importlib, pkgutil, sys
import longclip

assert not {"torch", "transformers"} & sys.modules.keys(), "importing the library must be light"
for module in pkgutil.walk_packages(longclip.__path__, "longclip."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
for name in longclip.__all__:
    getattr(longclip, name)
"""
CONVERT = "import sys; from longclip.convert import main; sys.exit(main(sys.argv[1:]))"
SMALL = {
    "EPOCHS, BATCH_SIZE, LOADERS = 6, 256, 8": "EPOCHS, BATCH_SIZE, LOADERS = 20, 48, 0",
    "LEARNING_RATE, WARMUP_STEPS = 1e-6, 200": "LEARNING_RATE, WARMUP_STEPS = 2e-3, 2",
}


def run_without_extras(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "no_ray.py", script, *map(str, arguments)],
        cwd=script.parent,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_everything_but_the_index_imports_without_extras(tmp_path: Path) -> None:
    script = tmp_path / "import_all.py"
    script.write_text(IMPORT_ALL)
    result = run_without_extras(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "longclip.index pyarrow\n"


def test_conversion_needs_no_extra(tmp_path: Path) -> None:
    torch.save(openai_state(), tmp_path / "clip.pt")
    (tmp_path / "convert.py").write_text(CONVERT)
    result = run_without_extras(tmp_path / "convert.py", tmp_path / "clip.pt", tmp_path / "out", "--stretch")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "77 -> 248 positions" in result.stdout


@pytest.mark.parametrize("command", ["convert", "export"])
def test_help_is_printed_without_importing_torch(command: str) -> None:
    code = (
        f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from longclip import {command} as c;"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{code} c.main(['--help'])"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"python -m longclip.{command}" in result.stdout


def documented_loop() -> str:
    """The training script of docs/training.md, with settings for a tiny model."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def train(" in block]
    for setting, small in SMALL.items():
        assert script.count(setting) == 1, setting
        script = script.replace(setting, small)
    return script


def test_the_documented_loop_trains_without_ray(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(new_model(tiny_config(77)), tmp_path / "base", {})
    (tmp_path / "images").mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
    for number in range(96):
        left, right = list(colours)[number % 4], list(colours)[number // 4 % 4]
        pixels = np.random.default_rng(number).normal(0, 9, (32, 32, 3))
        pixels += np.where(np.arange(32)[None, :, None] < 16, colours[left], colours[right])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        caption = f"A {left} half. The other half is {right}. " + "Nothing else is in the picture. " * 3
        (tmp_path / "images" / f"{number}.txt").write_text(caption)
    (tmp_path / "train.py").write_text(documented_loop())
    result = run_without_extras(tmp_path / "train.py", tmp_path / "base", tmp_path / "images", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    losses = [float(value) for value in re.findall(r" loss (\S+)", result.stdout)]
    assert len(losses) == 20
    assert losses[-1] < 0.75 * losses[0]
    model, base = CLIPModel.from_pretrained(tmp_path / "out"), CLIPModel.from_pretrained(tmp_path / "base")
    positions = [m.text_model.embeddings.position_embedding.weight for m in (model, base)]
    assert len(positions[0]) == CLIPTokenizer.from_pretrained(tmp_path / "out").model_max_length == 248
    assert torch.equal(positions[0][:20], positions[1][:20])
