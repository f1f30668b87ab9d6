"""``POST /v1/score``."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from knnlm_core.windows import check_window
from knnlm_server.api.schemas.common import Body, DocumentIds, KnnBody, ListOfTokenIds, NonEmpty, Texts, TokenIds

MAX_TEXTS = 4096
DEFAULT_WINDOW = 1024


class Windows(NamedTuple):
    """See `rolling_windows`."""

    window: int
    stride: int


class ScoreBody(Body):
    """``POST /v1/score``."""

    model: str | None = Field(default=None, description="`<lm>` or `<lm>@<datastore>`.")
    input: NonEmpty | Texts | ListOfTokenIds = Field(description="Texts, or lists of token ids.")
    knn: KnnBody | None = None
    per_token: bool = Field(default=False, description="Report every token.")
    exclude_documents: DocumentIds = Field(default=[], description="Ids of documents whose entries must not be found.")
    window: int | None = Field(default=None, description="Tokens per window; 1024 by default, or the LM's context.")
    stride: int | None = Field(
        default=None, description="Tokens scored per window after the first; half the window by default."
    )

    def windows(self, max_length: int) -> Windows:
        """How texts are cut for an LM with a context of ``max_length`` tokens.

        Raises: InvalidParameter: window or stride is out of bounds.
        """
        window = self.window if self.window is not None else min(DEFAULT_WINDOW, max_length)
        stride = self.stride if self.stride is not None else max(1, window // 2)
        check_window(window, stride, max_length)
        return Windows(window, stride)

    def texts(self) -> list[str | TokenIds]:
        """The texts, one entry each."""
        return [self.input] if isinstance(self.input, str) else list(self.input)
