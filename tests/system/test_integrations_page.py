"""Every example of docs/integrations.md, unchanged: the exports, then the code that reads them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longclip.checkpoint import save_checkpoint
from longclip.export import main as export
from tests.support.consumers import open_clip_folder
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.tiny_pipelines import PIPELINES, long_clip_for

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
PUBLISHED = {  # what the examples load from a hub, and the tiny pipeline that takes its place
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD 1.x",
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "black-forest-labs/FLUX.1-dev": "Flux",
}
NOT_RUN = "# in a clone of beichenzbc/Long-CLIP"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


EXPORTS = [line for block in blocks("bash") for line in block.splitlines() if "longclip.export my-longclip" in line]
EXAMPLES = [block for block in blocks("python") if not block.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what the examples find: a checkpoint, a photo, exports, and pipelines under their hub names."""
    folder = tmp_path_factory.mktemp("page")
    save_checkpoint(long_clip_for("SD 1.x"), folder / "my-longclip", {})
    (folder / "photo.jpg").write_bytes(picture(size=(90, 70), image_format="JPEG"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in EXPORTS:
            assert export(shlex.split(line)[3:]) == 0
        for name, kind in PUBLISHED.items():
            PIPELINES[kind]().save_pretrained(folder / name)
        yield folder


def test_page_has_an_example_for_every_format() -> None:
    assert len(EXPORTS) == 5
    assert len(blocks("python")) == len(EXAMPLES) + 1


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, workplace: Path) -> None:
    code, paths = EXAMPLES[number], [str(ROOT)]
    if "open_clip" in code:
        paths += [str(open_clip_folder()), str(ROOT / "tests" / "support")]
        code = f"import loadable_torchvision\n{code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
