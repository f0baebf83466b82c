"""What people have: images with captions in any of the usual layouts, read in pieces."""

from pipelines.data.sources.choose import open_source
from pipelines.data.sources.settings import SourceSettings

__all__ = ["SourceSettings", "open_source"]
