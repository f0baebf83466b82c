"""Exported models through the software that they were exported for: its embeddings of some texts and of a picture."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.export import export_checkpoint
from longclip.images import decode_image
from longclip.tokenizer import tokenize
from longclip.weights.onnx import IMAGE_GRAPH, TEXT_GRAPH
from tests.support.exported_models import TEXTS
from tests.support.pictures import picture

PICTURE = decode_image(picture(seed=3, size=(90, 70)))

Embeddings = dict[str, Tensor]
"""`text_embeds` of `TEXTS` and `image_embeds` of `PICTURE`."""


def our_embeddings(checkpoint: Checkpoint) -> Embeddings:
    """Our own, before normalisation, and the picture `processed` to `[3, S, S]`."""
    pixels = checkpoint.transform.normalize(torch.from_numpy(checkpoint.transform.resize(PICTURE)[None]))
    with torch.no_grad():
        return {
            "text_embeds": encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, TEXTS)),
            "image_embeds": encode_image(checkpoint.model, pixels),
            "processed": pixels[0],
        }


def assert_same_embeddings(actual: Embeddings, checkpoint: Checkpoint, atol: float = 1e-5) -> None:
    """Whether embeddings scaled to unit length are those that we compute."""
    expected = our_embeddings(checkpoint)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(unit(actual[name]), unit(expected[name]), rtol=0, atol=atol)


def open_clip_folder() -> Path:
    """Separate folder into which `make install` installs open_clip, whose torchvision may not match the torch."""
    folder = Path(sys.prefix) / "open_clip"
    if not folder.is_dir():
        reason = f"open_clip is not installed in {folder}; `make install` puts it there"
        if os.environ.get("LONGCLIP_REQUIRE_SYSTEM_PACKAGES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def from_open_clip(source: str, checkpoint: Checkpoint, folder: Path) -> Embeddings:
    """What open_clip makes of the weights at `source`, in a process of its own; see `through_open_clip.py`."""
    pixels = torch.from_numpy(checkpoint.transform.resize(PICTURE))
    pixel_values = checkpoint.transform.normalize(pixels[None])
    save_file({"pixel_values": pixel_values, "picture": pixels}, folder / "inputs.safetensors")
    script = Path(__file__).with_name("through_open_clip.py")
    command = [sys.executable, str(script), source, str(folder / "inputs.safetensors"), str(folder / "out.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(open_clip_folder())}  # behind the script's own folder
    done = subprocess.run(
        command, input=json.dumps(TEXTS), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


def through_open_clip(checkpoint: Checkpoint, folder: Path) -> Embeddings:
    """Its model and tokenizer on the directory, in `folder`, that export writes."""
    export_checkpoint(checkpoint, "open_clip", folder / "exported")
    return from_open_clip(f"local-dir:{folder / 'exported'}", checkpoint, folder)


def through_transformers(checkpoint: Checkpoint, folder: Path) -> Embeddings:
    """The classes of one tower with a projection."""
    save_checkpoint(checkpoint, folder / "clip", {})
    kinds = (CLIPTextModelWithProjection, CLIPVisionModelWithProjection)
    text, image = (kind.from_pretrained(folder / "clip") for kind in kinds)
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixel_values = our_embeddings(checkpoint)["processed"][None]
    with torch.no_grad():
        return {"text_embeds": text(**tokens).text_embeds, "image_embeds": image(pixel_values).image_embeds}


def through_sentence_transformers(checkpoint: Checkpoint, folder: Path) -> Embeddings:
    """Its own tokenization, image processing and normalisation as well."""
    export_checkpoint(checkpoint, "sentence-transformers", folder / "exported")
    model = SentenceTransformer(str(folder / "exported"), device="cpu")
    assert model.max_seq_length == checkpoint.context_length
    embeddings = {
        "text_embeds": model.encode(TEXTS, convert_to_tensor=True),
        "image_embeds": model.encode([PICTURE], convert_to_tensor=True),
    }
    for vectors in embeddings.values():
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    return embeddings


def through_onnxruntime(checkpoint: Checkpoint, folder: Path) -> Embeddings:
    """Both graphs; their embeddings have unit length."""
    export_checkpoint(checkpoint, "onnx", folder / "exported")
    given = {
        "text_embeds": (TEXT_GRAPH, {"input_ids": tokenize(checkpoint.tokenizer, TEXTS).input_ids.numpy()}),
        "image_embeds": (IMAGE_GRAPH, {"pixel_values": our_embeddings(checkpoint)["processed"][None].numpy()}),
    }
    results = {}
    for name, (graph, inputs) in given.items():
        (embeddings,) = InferenceSession(str(folder / "exported" / graph)).run([name], inputs)
        results[name] = torch.from_numpy(embeddings)
    return results


CONSUMERS: dict[str, tuple[Callable[[Checkpoint, Path], Embeddings], float]] = {
    "transformers": (through_transformers, 1e-5),
    "open_clip": (through_open_clip, 1e-5),
    "sentence-transformers": (through_sentence_transformers, 1e-5),
    "onnxruntime": (through_onnxruntime, 1e-4),
}
"""By name: how to get its embeddings, and how far they may be from ours."""
