"""A stand-in for vLLM, which needs a GPU to be installed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STAND_IN = '''
"""As much of vLLM as ray.data.llm calls: an engine that answers with the end of its prompt, and refuses long ones."""

import dataclasses
import sys
import types
from types import SimpleNamespace


@dataclasses.dataclass
class AsyncEngineArgs:
    model: str
    runner: str
    max_model_len: int = 40
    enable_log_requests: bool = True
    tensor_parallel_size: int = 1
    distributed_executor_backend: str = "ray"

    def create_engine_config(self):
        scheduler, parallel = SimpleNamespace(max_num_seqs=4), SimpleNamespace(pipeline_parallel_size=1)
        return SimpleNamespace(scheduler_config=scheduler, parallel_config=parallel)


@dataclasses.dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    detokenize: bool
    structured_outputs: object


class AsyncLLMEngine:
    @classmethod
    def from_engine_args(cls, arguments, stat_loggers):
        engine = cls()
        engine.longest = arguments.max_model_len
        return engine

    async def generate(self, request_id, prompt, sampling_params, lora_request):
        tokens = prompt["prompt_token_ids"]
        if len(tokens) > self.longest:
            raise ValueError("the prompt is too long")
        assert sampling_params.temperature == 0 and not sampling_params.detokenize
        images = (prompt.get("multi_modal_data") or {}).get("image", [])
        assert all(image.startswith("data:image/jpeg;base64,") for image in images)
        answer = SimpleNamespace(token_ids=tokens[-sampling_params.max_tokens :], text="", logprobs=None)
        yield RequestOutput(tokens, [answer])

    async def do_log_stats(self):
        pass

    def shutdown(self):
        pass


class RequestOutput:
    finished, metrics, prompt_logprobs = True, None, None

    def __init__(self, prompt_token_ids, outputs):
        self.prompt_token_ids, self.outputs = prompt_token_ids, outputs


def module(name, **values):
    sys.modules[name] = made = types.ModuleType(name)
    made.__dict__.update(values)
    return made


__path__ = []
outputs = module("vllm.outputs", RequestOutput=RequestOutput, PoolingRequestOutput=type("Pooled", (), {}))
module("vllm.inputs", TokensPrompt=dict, TextPrompt=dict)
for name in ("vllm.v1", "vllm.v1.metrics", "vllm.entrypoints"):
    module(name)


@dataclasses.dataclass
class ModelConfig:
    model: str
    dtype: str


async def parse_chat_messages_async(messages, model_config, content_format):
    """Images leave the messages, as they do in vLLM."""
    images, conversation = [], []
    for message in messages:
        parts = [dict(part) for part in message["content"]]
        images += [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        text = " ".join("<image>" if part["type"] == "image_url" else part["text"] for part in parts)
        conversation.append({"role": message["role"], "content": text})
    return conversation, {"image": images}, None


module("vllm.config", ModelConfig=ModelConfig)
module("vllm.entrypoints.chat_utils", parse_chat_messages_async=parse_chat_messages_async)
module("vllm.v1.metrics.ray_wrappers", RayPrometheusStatLogger=object)
'''


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in instead of vLLM, here and in processes that are started from here."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(hidden)


def write_word_model(directory: Path, words: str, template: str) -> str:
    """A directory with all that the stages around the engine read of a model, whose tokens are words. No weights are
    loaded."""
    import transformers  # here, because this module is imported by every test run
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<unk>", "</s>", *words.split()]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    transformers.LlamaConfig(vocab_size=len(vocabulary), num_hidden_layers=1).save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"")
    return str(directory)
