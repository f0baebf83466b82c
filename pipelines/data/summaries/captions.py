"""The caption of a row that is summarized."""

from typing import Any

from longclip.text.sentences import caption_text
from pipelines.data.sources.captions import caption_texts


def row_caption(cell: Any) -> tuple[str, str | None]:
    """The text of a caption cell, empty if it has none, and the problem with the cell, if any."""
    texts, problem = caption_texts(cell)
    return caption_text(texts[0] if len(texts) == 1 else texts).strip(), problem
