"""A small CLIP in the layouts that conversion starts from."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from longclip.checkpoint import save_checkpoint
from longclip.weights.reading import convert_checkpoint
from tests.support.weights import State, openai_state


@pytest.fixture(scope="module")
def openai() -> State:
    return openai_state()


@pytest.fixture(scope="module")
def hugging_face_dir(openai: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("huggingface")
    save_file(openai, folder / "openai.safetensors")
    save_checkpoint(convert_checkpoint(folder / "openai.safetensors"), folder / "clip", {})
    return folder / "clip"
