"""The answer of `POST /v1/neighbors`."""

from __future__ import annotations

from knnlm_client.responses.common import ResponsePart, TraceNeighbor


class Neighbor(TraceNeighbor):
    """One retrieved entry in the text that it comes from.

    Attributes:
        token_id: the entry's value, which it proposes as the next token.
        text: the source's characters `char_start` … `char_end`, between `before` and `after`; None where the
            datastore does not know them.
    """

    token_id: int
    before: str | None = None
    text: str | None = None
    after: str | None = None


class NextToken(ResponsePart):
    """What comes next with which probability: p = λ p_knn + (1 − λ) p_lm."""

    token_id: int
    token: str
    p_knn: float
    p_lm: float
    p: float


class NeighborsResult(ResponsePart):
    """What is retrieved after one context.

    Attributes:
        tokens: length of the context.
        neighbors: nearest first; of several datastores with a λ each, by weight.
        next_tokens: those of the largest p_knn.
    """

    index: int
    tokens: int
    neighbors: list[Neighbor]
    next_tokens: list[NextToken]


class NeighborsResponse(ResponsePart):
    """The answer of `POST /v1/neighbors`; the results are in the order of the input."""

    object: str
    model: str
    system_fingerprint: str | None
    results: list[NeighborsResult]
