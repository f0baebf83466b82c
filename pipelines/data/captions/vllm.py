"""Captions by vLLM, through `ray.data.llm`: the rows of all pieces pass through the engines in one stream.

A reply that cannot be used is sent back in the next round. Tests cover the configuration, which Ray validates, and the
path of rows through Ray's stages with a fake engine. It has not been run with vLLM on a GPU.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.data.llm import Processor, build_processor

from longclip.errors import one_line
from pipelines.common.chat_endpoint import Completion
from pipelines.data.captions.drafts import Ask, Draft, data_uri, next_step
from pipelines.data.captions.journal import Journal
from pipelines.data.captions.piece import CaptionJob, PieceWork
from pipelines.data.captions.settings import CaptionSettings, Vllm
from pipelines.data.vllm_engine import vllm_config
from pipelines.data.work_units import MAX_BLOCKS

INSTEAD = "strategy transformers, or strategy endpoint with a server"
Rows = dict[int, dict[int, str]]
"""Reasons by piece and row."""


def ask_vllm(
    job: CaptionJob, plan: Sequence[dict[str, Any]], pending: Sequence[int], spend: Callable[[int], bool]
) -> tuple[Rows, bool]:
    """Ask about all rows of the pending pieces; replies go to the journals.

    Args:
        job: what is asked.
        plan: all pieces.
        pending: numbers of the unfinished ones.
        spend: counts tokens; whether the job has used all that it may.

    Returns:
        Rows that the engines rejected, and whether the job stopped because it has used all its tokens.
    """
    rejected: Rows = defaultdict(dict)
    processor = vllm_processor(job.settings)
    journals = {number: Journal(job.journals, number) for number in pending}
    wanted: dict[int, list[int] | None] = dict.fromkeys(pending)
    for _ in range(job.settings.checks.attempts):
        pieces = [{"piece": json.dumps([number, plan[number], rows])} for number, rows in wanted.items()]
        if not pieces:
            break
        rows = ray.data.from_items(pieces, override_num_blocks=min(len(pieces), MAX_BLOCKS)).flat_map(ReadDrafts(job))
        again: dict[int, list[int]] = defaultdict(list)
        for row in processor(rows).iter_rows():
            number, row_number, before = json.loads(row["key"])
            if problem := row["__inference_error__"]:
                rejected[number][row_number] = f"the engine rejects the row: {one_line(problem, 200)}"
                continue
            replies = [Completion(**values) for values in [*before, json.loads(row["reply"])]]
            journals[number].add(row_number, len(before), replies[-1])
            if isinstance(next_step(replies, job.settings.checks), Ask):
                again[number].append(row_number)
            if spend((replies[-1].prompt_tokens or 0) + (replies[-1].completion_tokens or 0)):
                return rejected, True
        wanted = dict(again)
    return rejected, False


class ReadDrafts:
    """Reads the rows of a piece that the engines have to be asked about."""

    def __init__(self, job: CaptionJob) -> None:
        self.job = job

    def __call__(self, row: dict[str, str]) -> list[dict[str, Any]]:
        """`key` (number of the piece and the row, and the replies so far), `image` and `conversation` of each row."""
        piece, unit, wanted = json.loads(row["piece"])
        work = PieceWork(self.job, piece, unit)
        drafts = (work.draft(number, row) for number, row in work.unanswered() if wanted is None or number in wanted)
        return [_item(piece, draft) for draft in drafts if draft]


class CloseJournals:
    """Closes the journal of a piece when the engines have answered."""

    def __init__(self, job: CaptionJob, rejected: Rows, stopped: bool) -> None:
        self.job, self.rejected, self.stopped = job, rejected, stopped

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """See `pipelines.data.work_units.UnitTask` and `PieceWork.result`."""
        work = PieceWork(self.job, number, unit)
        rejected = self.rejected.get(number, {})
        for row_number, row in work.unanswered():
            if row_number in rejected:
                work.fail(row_number, rejected[row_number])
            elif work.draft(row_number, row) and not self.stopped:
                work.fail(row_number, "the engine lost the row")
            elif self.stopped and row_number not in work.failed:
                work.stopped = True
        return work.result()


def vllm_processor(settings: CaptionSettings) -> Processor:
    """Stages of Ray Data from rows of `ReadDrafts` to rows of `key`, `reply` and `__inference_error__`.

    A row that the engine rejects, for example because its prompt is too long, has the reason in the last column.

    Raises:
        CheckpointError: the directory of the model does not exist.
        ConfigError: vLLM is not installed, or an engine argument is wrong.
    """
    vllm: Vllm = settings.vllm
    sampling = {"temperature": 0.0, "max_tokens": vllm.max_new_tokens, "detokenize": False}

    def request(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": _messages(row["image"], json.loads(row["conversation"])), "sampling_params": sampling}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        count = int(row["num_generated_tokens"])
        finish_reason = "length" if count >= vllm.max_new_tokens else "stop"
        reply = Completion(row["generated_text"], finish_reason, int(row["num_input_tokens"]), count)
        return {"key": row["key"], "reply": json.dumps(asdict(reply))}

    # The stage that decodes images parses the messages as vLLM's own server does.
    images = {"enabled": True, "chat_template_content_format": "openai"}
    return build_processor(
        vllm_config(vllm, settings.workers.count, INSTEAD, prepare_multimodal_stage=images),
        preprocess=request,
        postprocess=answer,
        builder_kwargs={"chat_template_kwargs": vllm.template_options},
    )


def _messages(image: bytes, conversation: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A conversation with its image; all contents are lists, which Arrow can hold in one column."""
    contents: list[list[dict[str, Any]]] = [[{"type": "text", "text": text}] for _, text in conversation]
    contents[0].insert(0, {"type": "image_url", "image_url": {"url": data_uri(image)}})
    return [{"role": role, "content": content} for (role, _), content in zip(conversation, contents, strict=True)]


def _item(number: int, draft: Draft) -> dict[str, Any]:
    before = [asdict(reply) for reply in draft.replies]
    return {
        "key": json.dumps([number, draft.row, before]),
        "image": draft.image,
        "conversation": json.dumps(draft.conversation()),
    }
