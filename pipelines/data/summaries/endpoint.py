"""Summaries by a server with OpenAI-compatible chat completions."""

from collections.abc import Sequence

from pipelines.common.chat_endpoint import ChatEndpoint
from pipelines.data.summaries.settings import Endpoint


class EndpointSummaries:
    """Summaries by a server."""

    def __init__(self, settings: Endpoint) -> None:
        self.settings = settings
        self.endpoint = ChatEndpoint(settings, settings.max_new_tokens)

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption; empty where its request failed.

        Raises:
            ConfigError: see `ChatEndpoint.complete_all`.
        """
        return self.endpoint.complete_all([self.settings.messages(caption) for caption in captions])
