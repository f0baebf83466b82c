"""Every `curl` command of the README and of docs/serving.md, unchanged, against a server."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from longclip.checkpoint import Checkpoint, checkpoint_id
from tests.support.live_api import running_api, scenes_api
from tests.support.places import ROOT
from tests.support.programs import needs_programs
from tests.support.scenes_index import library_image_embedding, scene, write_version

pytestmark = needs_programs("curl", packages="curl")

ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = [
    pytest.param(command, id=f"{page}-{number}")
    for page in ("README.md", "docs/serving.md")
    for number, command in enumerate(
        re.findall(rf"^curl [^\n]*{ADDRESS}.*?'$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
]
ANSWERS = {"/v1/search": "hits", "/v1/embeddings": "data", "/v1/classify": "data"}


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path
) -> Iterator[str]:
    """A server over some pictures with the columns that the examples filter by."""
    index = tmp_path_factory.mktemp("curl") / "index"
    pictures = [scene(seed)[0] for seed in range(3)]
    items = {
        "id": ["a", "b", "c"],
        "caption": ["", "", ""],
        "thumbnail": [b"", b"", b""],
        "year": [1980, 1995, 2001],
        "place": ["Oslo", "Bergen", "Oslo"],
    }
    vectors = {"image": library_image_embedding(tiny_checkpoint, *pictures)}
    write_version(index, 1, pa.table(items), vectors, checkpoint_id=checkpoint_id(tiny_checkpoint_dir))
    with running_api(scenes_api(tiny_checkpoint_dir, index, key=None)) as address:
        yield address


def test_every_verb_has_an_example() -> None:
    commands = [str(example.values[0]) for example in EXAMPLES]
    assert all(any(path in command for command in commands) for path in ANSWERS)


@pytest.mark.parametrize("command", EXAMPLES)
def test_example_is_answered(address: str, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, address)], capture_output=True, text=True, timeout=60, check=True
    )
    (key,) = [key for path, key in ANSWERS.items() if path in command]
    answer = json.loads(done.stdout)
    assert answer.get(key), answer
    if "filter" in command:
        assert {hit["id"] for hit in answer["hits"]} == {"b", "c"}
