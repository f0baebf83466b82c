"""ECCV Caption (arXiv 2204.03359): COCO's captions with the matches that people and models found among them.

The matches are files of the package `eccv-caption`, which are read without importing it: it computes means only, and
intervals need the figures of every query.
"""

import importlib.util
import json
from collections.abc import Mapping, Set
from pathlib import Path

from longclip.errors import ConfigError, DataError
from pipelines.evaluation.questions.annotations import Annotations
from pipelines.evaluation.questions.matches import MatchedRetrieval
from pipelines.evaluation.questions.rows import Row

PACKAGE = "eccv_caption"


def matches_directory() -> Path:
    """Directory of the package's files.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError("ECCV Caption needs the matches in the package eccv-caption: pip install 'longclip[eccv]'")
    return Path(spec.origin).parent / "data"


def eccv_caption(annotations: Annotations) -> MatchedRetrieval:
    """COCO's `captions_val2014.json`, of which the 25,000 captions of the package's test split are read."""
    candidates = _matches("original_image_to_caption")
    path, text = annotations.text("captions_val2014.json")
    try:
        content = json.loads(text)
        files = {str(image["id"]): image["file_name"] for image in content["images"]}
        texts = {str(item["id"]): item["caption"] for item in content["annotations"]}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{annotations.field}: '{path}' is not an annotation file of COCO's captions: {error}"
        ) from error
    caption_ids = {
        image: [caption for caption in sorted(captions, key=int) if caption in texts]
        for image, captions in candidates.items()
        if image in files
    }
    rows = [Row(image, files[image], [texts[key] for key in keys]) for image, keys in caption_ids.items() if keys]
    to_text, to_image = (_matches(f"eccv_{name}") for name in ("image_to_caption", "caption_to_image"))
    return MatchedRetrieval(rows, caption_ids, to_text, to_image)


def _matches(name: str) -> Mapping[str, Set[str]]:
    content = json.loads((matches_directory() / f"{name}.json").read_text())
    return {key: {str(match) for match in matches} for key, matches in content.items()}
