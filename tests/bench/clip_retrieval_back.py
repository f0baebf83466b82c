"""clip-retrieval's own index and back end, as processes of an environment that has it and nothing of ours.

    PYTHON clip_retrieval_back.py index EMBEDDINGS INDEX     clip-retrieval index: autofaiss chooses the structure
    PYTHON clip_retrieval_back.py back INDEX MODEL PORT      clip-retrieval back, on loopback and not on all addresses

PYTHON is of an environment in which were installed: torch, torchvision, "clip-retrieval==2.45.0", "numpy<2",
"transformers<5", "setuptools<82".
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
import loadable_torchvision  # noqa: F401  before clip_retrieval
from clip_retrieval.clip_back import clip_back
from clip_retrieval.clip_index import clip_index
from flask import Flask


def main(command: str, folder: str, *rest: str) -> None:
    """See above."""
    if command == "index":
        clip_index(folder, *rest)
        return
    model, port = rest
    indices = Path(folder) / "indices.json"
    indices.write_text(json.dumps({"images": folder}))
    run = Flask.run

    def on_loopback(app: Flask, host: str, port: int, debug: bool) -> None:
        run(app, "127.0.0.1", port, debug)

    with patch.object(Flask, "run", on_loopback):
        clip_back(
            str(indices),
            int(port),
            clip_model=f"hf_clip:{model}",
            use_jit=False,
            enable_mclip_option=False,
            provide_aesthetic_embeddings=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
