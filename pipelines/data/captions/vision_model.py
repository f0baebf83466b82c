"""Captions by a vision-language model in the worker, through transformers."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from longclip.errors import CheckpointError, ConfigError, one_line
from pipelines.common.chat_endpoint import Completion
from pipelines.data.captions.drafts import Ask, Draft
from pipelines.data.captions.piece import CaptionJob, PieceWork
from pipelines.data.captions.settings import Transformers
from pipelines.data.model_loading import load_model, model_source, reading

FIELD = "transformers.model"


class VisionModel:
    """A model that answers conversations about an image."""

    def __init__(self, settings: Transformers) -> None:
        """
        Raises:
            CheckpointError: the model cannot be read, is of another kind, or has no chat template.
        """
        self.settings = settings
        source = checked_source(settings)
        with reading(FIELD, source):
            self.processor = AutoProcessor.from_pretrained(source)
        # Generation continues the prompt, so padding must be on the other side.
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:  # common, and harmless: masks hide the padding
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.model = load_model(AutoModelForImageTextToText, FIELD, source)
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.processor.tokenizer.eos_token_id} - {None}

    @torch.inference_mode()
    def __call__(self, drafts: Sequence[Draft]) -> list[Completion]:
        """The reply to each draft's conversation.

        Raises:
            ConfigError: the processor cannot make inputs of the conversations.
        """
        try:
            inputs = self.processor.apply_chat_template(
                [_conversation(draft) for draft in drafts],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,  # captions and metadata must not write the tokens of images
                processor_kwargs={"padding": True},
                **self.settings.template_options,
            ).to(self.model.device, self.model.dtype)
        except Exception as error:  # a template, or the code of a processor, can raise any exception
            raise ConfigError(
                f"{FIELD}='{self.settings.model}': its processor rejects the conversation: {one_line(error, 200)};"
                " check transformers.template_options, or use another model"
            ) from error
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=self.settings.max_new_tokens,
            num_beams=1,
            do_sample=False,
            # Greedy decoding ignores the sampling defaults of a model, but warns about them.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        return [
            self._completion(text, count, row.tolist())
            for text, count, row in zip(texts, prompt_tokens, tokens, strict=True)
        ]

    def _completion(self, text: str, prompt_tokens: int, tokens: list[int]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        count = len(tokens) if end is None else end + 1
        return Completion(text, "length" if end is None else "stop", prompt_tokens, count)


class AskVisionModel:
    """Asks the model about the rows of pieces; each process loads it once."""

    def __init__(self, job: CaptionJob, spend: Any) -> None:
        """See `AskEndpoint`."""
        self.job, self.spend = job, spend
        self._model: VisionModel | None = None

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Ask about all rows of a piece; see `pipelines.data.work_units.UnitTask` and `PieceWork.result`.

        Raises:
            CheckpointError, ConfigError: see `VisionModel`.
        """
        settings = self.job.settings.transformers
        if self._model is None:
            self._model = VisionModel(settings)
        work = PieceWork(self.job, number, unit)
        work.stopped = self.spend(work.tokens_before)
        drafts = (draft for number, row in work.unanswered() if (draft := work.draft(number, row)))
        pending: list[Draft] = []
        # Drafts whose reply cannot be used are in the next batch again.
        while not work.stopped and (batch := [*pending, *itertools.islice(drafts, settings.batch_size - len(pending))]):
            replies = self._model(batch)
            for draft, reply in zip(batch, replies, strict=True):
                work.answer(draft, reply)
                work.stopped = self.spend((reply.prompt_tokens or 0) + (reply.completion_tokens or 0)) or work.stopped
            pending = [draft for draft in batch if isinstance(draft.step, Ask)]
        return work.result()


def checked_source(settings: Transformers) -> str:
    """Path or hub name of a model of the right kind, without loading weights.

    Raises:
        CheckpointError: it cannot be read, is of another kind, or has no chat template.
    """
    source = model_source(FIELD, settings.model or "")
    with reading(FIELD, source):
        config = AutoConfig.from_pretrained(source)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise CheckpointError(
                f"{FIELD}='{settings.model}' is a '{config.model_type}' model, not a vision-language model such as"
                " LLaVA, Qwen-VL or SmolVLM"
            )
        processor = AutoProcessor.from_pretrained(source)
        if not getattr(processor, "chat_template", None):
            raise CheckpointError(f"{FIELD}='{settings.model}' has no chat template; give an instruction-tuned model")
    return source


def _conversation(draft: Draft) -> list[dict[str, Any]]:
    """A draft's conversation as chat templates of vision-language models take it."""
    image = Image.open(io.BytesIO(draft.image))
    (role, text), *others = draft.conversation()
    first = {"role": role, "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}
    return [first, *({"role": role, "content": [{"type": "text", "text": text}]} for role, text in others)]
