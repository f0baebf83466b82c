"""Loading of Hugging Face models, and batching of their inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from longclip.errors import CheckpointError, LongClipError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")


def model_source(field: str, model: str) -> str:
    """Absolute path of a model directory, or the hub name as it is.

    Raises:
        CheckpointError: the directory does not exist or has no safetensors: other formats can run code when loaded.
    """
    path = Path(model).expanduser()
    looks_like_path = path.is_absolute() or model.startswith(".") or model.count("/") > 1
    if not path.is_dir():
        if looks_like_path:
            kind = "is a file, not a directory" if path.is_file() else "does not exist"
            raise CheckpointError(f"{field}='{model}' {kind}; give a Hugging Face model directory or a hub name")
        return model
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{field}='{model}' has no safetensors weights; save the model with save_pretrained()")
    return str(path.absolute())


@contextmanager
def reading(field: str, model: str) -> Iterator[None]:
    """Convert any error of transformers, safetensors or the hub client in the block to a one-line CheckpointError."""
    try:
        yield
    except LongClipError:
        raise
    except Exception as error:  # they have no common base class
        reason = one_line(error)
        raise CheckpointError(f"{field}='{model}' cannot be read: {reason or type(error).__name__}") from error


def load_model(kind: Any, field: str, model: str) -> Any:
    """Load a model of an Auto class for inference: in bfloat16 on a GPU if there is one, else in float32."""
    has_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if has_gpu else torch.float32
    with reading(field, model):
        # Never `trust_remote_code`: code from a model repository is not run.
        network = kind.from_pretrained(model, use_safetensors=True, dtype=dtype)
    return network.to("cuda" if has_gpu else "cpu").eval()


def in_batches(
    items: Sequence[Item], batch_size: int, length: Callable[[Item], int], run: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """Results of `run` over batches of items of similar length, to reduce padding, in the order of the items.

    The longest items come first, so that a batch that does not fit in memory fails at once.
    """
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    results: dict[int, Result] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        results.update(zip(indices, run([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]
