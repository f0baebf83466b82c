"""What all summarizers with a model share: how it is loaded, and how texts are put into batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from longclip.errors import CheckpointError, LongClipError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")


def model_source(field: str, model: str) -> str:
    """A model's directory as every process finds it, or its hub name.

    Raises:
        CheckpointError: the directory is not there, or holds no safetensors: other weights can run code when loaded.
    """
    path = Path(model).expanduser()
    looks_like_path = path.is_absolute() or model.startswith(".") or model.count("/") > 1
    if not path.is_dir():
        if looks_like_path:
            kind = "is a file, not a directory" if path.is_file() else "does not exist"
            raise CheckpointError(f"{field}='{model}' {kind}; give a Hugging Face model directory or a hub name")
        return model
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{field}='{model}' holds no safetensors weights; save the model with save_pretrained()")
    return str(path.absolute())


@contextmanager
def reading(field: str, model: str) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub client raise inside the block into one line: CheckpointError."""
    try:
        yield
    except LongClipError:
        raise
    except Exception as error:  # they share no base class
        reason = one_line(error)
        raise CheckpointError(f"{field}='{model}' cannot be read: {reason or type(error).__name__}") from error


def load_model(kind: Any, field: str, model: str) -> Any:
    """A model of an Auto class, ready for inference: on a GPU in bfloat16 where there is one, else in float32."""
    has_gpu = torch.cuda.is_available()
    with reading(field, model):
        # No `trust_remote_code`, here or anywhere: a summary is not worth running what comes with the weights.
        loaded = kind.from_pretrained(model, use_safetensors=True, dtype=torch.bfloat16 if has_gpu else torch.float32)
    return loaded.to("cuda" if has_gpu else "cpu").eval()


def in_batches(
    items: Sequence[Item], batch_size: int, length: Callable[[Item], int], run: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """`run` over batches of items of similar length, which need little padding; results in the order of the items.

    The longest come first: if a batch does not fit into memory, it is the first one.
    """
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    results: dict[int, Result] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        results.update(zip(indices, run([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]
