"""Where a token's neighbours stand: its trace names the places, and a search after its context has their text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from knnlm_client import AsyncClient, Neighbor, TraceNeighbor
from knnlm_playground.completing import Wish
from knnlm_playground.tokens import Generated

CONTEXT_CHARS = 240
_MOST = 100  # neighbours that the API reports per context


class Excerpt(NamedTuple):
    """A neighbour's token in its document."""

    before: str
    token: str
    after: str


async def read_excerpts(
    client: AsyncClient, wish: Wish, tokens: Sequence[Generated], index: int
) -> list[Excerpt | None]:
    """The text around each neighbour of a token, None where it is not to be had.

    Where the token's neighbours were followed and not searched, they stand behind those of the last search, and the
    text around those is looked at too.

    Raises: KnnlmClientError: the server does not answer.
    """
    neighbors = tokens[index].trace.neighbors
    if not neighbors:
        return []
    asked = wish.choice.searched()
    prompt = (await client.tokenize(wish.prompt, model=asked.model)).tokens
    ids = [token.trace.token_id for token in tokens]
    contexts = [[*prompt, *ids[:at]] for at in _searches(tokens, index)]
    found = await client.neighbors(contexts, model=asked.model, knn=asked.knn, limit=_MOST, context_chars=CONTEXT_CHARS)
    passages = [neighbor for result in found.results for neighbor in result.neighbors]
    return [excerpt(neighbor, passages) for neighbor in neighbors]


def excerpt(neighbor: TraceNeighbor, passages: Iterable[Neighbor]) -> Excerpt | None:
    """Cut a neighbour's surroundings out of the first passage that holds its characters."""
    start, end = neighbor.char_start, neighbor.char_end
    if start is None or end is None:
        return None
    for passage in passages:
        if (passage.datastore, passage.document_id) != (neighbor.datastore, neighbor.document_id):
            continue
        if passage.char_start is None or passage.text is None:
            continue
        before, after = passage.before or "", passage.after or ""
        text, first = before + passage.text + after, passage.char_start - len(before)
        if first <= start and end <= first + len(text):
            return Excerpt(text[: start - first], text[start - first : end - first], text[end - first :])
    return None


def _searches(tokens: Sequence[Generated], index: int) -> list[int]:
    """The token's own place, and that of the last search before it if its neighbours come from there."""
    if not tokens[index].trace.followed:
        return [index]
    searched = [at for at in range(index) if tokens[at].trace.searched]
    return [index, *searched[-1:]]
