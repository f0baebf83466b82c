"""Summaries by vLLM, through `ray.data.llm`: batches of a dataset pass through engines, each on its own GPUs.

Tests cover the configuration, which Ray validates, and the path of rows through Ray's stages with a fake engine. It
has not been run with vLLM on a GPU.
"""

import dataclasses
import difflib
import importlib.util
from typing import Any

from pydantic import ValidationError
from ray.data import Dataset
from ray.data.llm import Processor, build_processor, vLLMEngineProcessorConfig

from longclip.errors import ConfigError
from pipelines.data.summaries.model_loading import model_source
from pipelines.data.summaries.settings import Vllm


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
        vllm_config(settings, engines),
        preprocess=request,
        postprocess=answer,
        builder_kwargs={"chat_template_kwargs": settings.template_options},
    )


def vllm_config(settings: Vllm, engines: int = 1) -> vLLMEngineProcessorConfig:
    """Configuration of the engines, validated by Ray and against the arguments of the installed vLLM.

    Raises:
        CheckpointError: the directory of the model does not exist.
        ConfigError: vLLM is not installed, or an engine argument is wrong.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "strategy vllm needs vLLM and a GPU: pip install 'longclip[vllm]'; or use strategy chat, or strategy"
            " endpoint with a server"
        )
    import vllm  # takes many seconds, and is optional

    model = settings.model or ""
    if "://" not in model:  # Ray downloads URIs itself
        model = model_source("vllm.model", model)
    known = [field.name for field in dataclasses.fields(vllm.AsyncEngineArgs)]
    for name in settings.engine_kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see the engine arguments in vLLM's documentation"
            raise ConfigError(f"vllm.engine_kwargs: vLLM's engine has no argument '{name}'; {hint}")
    try:
        return vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=dict(settings.engine_kwargs),  # Ray modifies it
            concurrency=engines,
            batch_size=settings.batch_size,
            accelerator_type=settings.accelerator_type,
            should_continue_on_error=True,
        )
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(f"vllm: Ray rejects the settings: {reasons}; fix them") from error


def _key_and_summary(row: dict[str, Any]) -> dict[str, Any]:
    return {"key": row["key"], "summary": row.get("summary") or ""}
