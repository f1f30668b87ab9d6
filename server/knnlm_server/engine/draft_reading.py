"""Reading datastores for drafts: where one cannot be read, its requests go on without, since drafts are not needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from knnlm_core.errors import KnnlmError
from knnlm_server.engine.request import CompletionRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read_for_drafts(
    requests: Sequence[CompletionRequest], read: Callable[[Sequence[int]], Sequence[T]], nothing: T
) -> list[T]:
    """What ``read`` finds for each of some requests, and ``nothing`` for one that it fails for, then and ever after.

    Whoever searches that datastore next learns of the failure; here it is told once a request.

    Args:
        requests: of the choices that something is read for; a request may stand here several times.
        read: given indices into ``requests``, returns as many results or raises KnnlmError.
    """
    asked = [i for i, request in enumerate(requests) if request.drafts]
    results = [nothing] * len(requests)
    if not asked:
        return results
    try:
        found = read(asked)
    except KnnlmError:
        pass
    else:
        for i, result in zip(asked, found, strict=True):
            results[i] = result
        return results
    for i in asked:  # one by one, to see whose datastore it is
        request = requests[i]
        try:
            if request.drafts:
                (results[i],) = read([i])
        except KnnlmError as error:
            request.drafts = False
            run = request.timeline.context.run
            run(logger.error, "no more drafts request=%s %s", request.request_id, error.message)
    return results
