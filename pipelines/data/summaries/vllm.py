"""Summaries by vLLM, through `ray.data.llm`: batches of a dataset pass through engines, each on its own GPUs.

Tests cover the configuration, which Ray validates, and the path of rows through Ray's stages with a fake engine. It
has not been run with vLLM on a GPU.
"""

from typing import Any

from ray.data import Dataset
from ray.data.llm import Processor, build_processor

from pipelines.data.summaries.settings import Vllm
from pipelines.data.vllm_engine import vllm_config

INSTEAD = "strategy chat, or strategy endpoint with a server"


def vllm_summaries(rows: Dataset, settings: Vllm, engines: int = 1) -> Dataset:
    """Unchecked summaries of captions; empty where the engine rejected the row.

    Args:
        rows: `key` and `caption`, both strings.
        settings: model and prompt.
        engines: number of engines; each uses tensor_parallel_size x pipeline_parallel_size GPUs.

    Returns:
        `key` and `summary`, in any order; evaluated lazily.

    Raises:
        CheckpointError: the directory of the model does not exist.
        ConfigError: vLLM is not installed, or an engine argument is wrong.
    """
    return vllm_processor(settings, engines)(rows).map(_key_and_summary)


def vllm_processor(settings: Vllm, engines: int = 1) -> Processor:
    """Stages of Ray Data from rows of `key` and `caption` to rows of `key` and `summary`.

    Ray must be running, with the GPUs of each engine and a free CPU for each stage around it. A row that the engine
    rejects, for example because its prompt is too long, does not end the job: it is returned without a summary and
    with the reason in `__inference_error__`.

    Raises:
        CheckpointError: the directory of the model does not exist.
        ConfigError: vLLM is not installed, or an engine argument is wrong.
    """
    # Detokenizing is a separate stage, on CPUs.
    sampling = {"temperature": 0.0, "max_tokens": settings.max_new_tokens, "detokenize": False}

    def request(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": settings.messages(row["caption"]), "sampling_params": sampling}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"key": row["key"], "summary": row["generated_text"]}

    return build_processor(
        vllm_config(settings, engines, INSTEAD),
        preprocess=request,
        postprocess=answer,
        builder_kwargs={"chat_template_kwargs": settings.template_options},
    )


def _key_and_summary(row: dict[str, Any]) -> dict[str, Any]:
    return {"key": row["key"], "summary": row.get("summary") or ""}
