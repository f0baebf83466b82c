"""Captions as sources store them: texts, lists of texts, structs with a text, and conversations with a model."""

import json
from itertools import zip_longest
from typing import Any

from longclip.errors import DataError
from pipelines.data.sources.settings import CAPTION_NAMES, SourceSettings, first_known
from pipelines.data.sources.text_decoding import DEFAULT, MARK, decode_text

ANSWERING = ("gpt", "assistant", "model")
TEXT_NAMES = (*CAPTION_NAMES, "raw", "sentence", "value")
"""Names of the text in a list of structs, such as COCO's `{"raw": "A dog."}`."""


def caption_texts(cell: Any, encoding: str = DEFAULT) -> tuple[list[str], str | None]:
    """Texts of a caption cell, and the problem with it, if any.

    Args:
        cell: a text, a list of texts or of structs with a text, None, or a conversation whose first answer is the
            caption: turns with `from` and `value`, or `role` and `content`, as a list, its JSON or a struct of lists.
        encoding: of texts that are bytes.
    """
    cell = _conversation(cell)
    if cell is None:
        return [], "caption is missing"
    if _is_conversation(cell):
        cell = next((_content(turn) for turn in cell if _speaker(turn) in ANSWERING), None)
        if cell is None:
            return [], f"conversation has no answer of a model (a turn from {', '.join(ANSWERING)})"
    texts = []
    for value in cell if isinstance(cell, list) else [cell]:
        text = value
        if isinstance(text, dict):
            present = {name: field for name, field in text.items() if field is not None}
            text = present.get(first_known(None, TEXT_NAMES, present) or "")
            if text is None and first_known(None, TEXT_NAMES, value):
                continue  # its text is null
        if isinstance(text, bytes):
            try:
                text = decode_text(text, encoding)
            except DataError as error:
                return [], f"caption {error}"
        if isinstance(text, str):
            texts.append(text.removeprefix(MARK))
        elif value is not None:
            return [], f"caption is not a text but {type(value).__name__}"
    return texts, None


def side_captions(text: bytes | None, metadata: bytes | None, settings: SourceSettings) -> tuple[list[str], str | None]:
    """Captions of an image from the files that share its name, and the problem with them, if any.

    A .json file that is broken or has no caption does no harm if there is a text.

    Args:
        text: content of the text file, if there is one.
        metadata: content of the .json file, if there is one.
        settings: name of the JSON field, and encoding.
    """
    fields: Any = None
    problem = None
    if metadata is not None:
        try:
            fields = json.loads(decode_text(metadata, settings.encoding))
        except DataError as error:
            problem = f".json file {error}"
        except (ValueError, RecursionError) as error:
            problem = f".json file is not valid JSON: {error}"
    present = {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else {}
    name = first_known(settings.caption, CAPTION_NAMES, present)
    # img2dataset repeats the text in its .json file; a longer caption added later is only in that file.
    if name is not None and (text is None or settings.caption or name not in ("caption", "text", "txt")):
        captions, problem = caption_texts(present[name])
        if captions or text is None or settings.caption:
            return captions, problem
    if settings.caption is not None:
        return [], problem or f"sample has no caption '{settings.caption}', neither as a file nor in its .json file"
    if text is not None:
        return caption_texts(text, settings.encoding)
    if isinstance(fields, list):
        return caption_texts(fields)
    return [], problem or "sample has no caption"


def _conversation(cell: Any) -> Any:
    """A conversation as a list of turns, if a cell holds one in another form; otherwise the cell."""
    if isinstance(cell, str) and cell.lstrip().startswith("[") and '"' in cell:
        try:
            turns = json.loads(cell)
        except ValueError:
            return cell
        return turns if _is_conversation(turns) else cell
    if isinstance(cell, dict) and cell and all(isinstance(value, list) for value in cell.values()):
        # Lists next to the texts, such as COCO's numbers of sentences, may be shorter.
        return [dict(zip(cell, turn, strict=True)) for turn in zip_longest(*cell.values())]
    return cell


def _is_conversation(cell: Any) -> bool:
    turns = isinstance(cell, list) and cell and all(isinstance(turn, dict) for turn in cell)
    return bool(turns) and any(_speaker(turn) is not None for turn in cell)


def _speaker(turn: dict[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def _content(turn: dict[str, Any]) -> Any:
    """Text of a turn; that of the parts, if its content has several (`{"type": "text", "text": ...}`)."""
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str)) or None
    return content
