"""Keys of known tokens from the engine's thread, for whoever waits for them on another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from knnlm_core.errors import KnnlmError
from knnlm_core.windows import WindowSizes
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.learning import LearnRequest


class _ReencodeRequest(LearnRequest):
    kind: ClassVar[str] = "reencode"  # as metrics call it


def reencode(
    engine: Engine, dim: int, texts: Sequence[NDArray[np.int32]], windows: WindowSizes
) -> list[NDArray[np.float32]]:
    """(T − 1, D) keys of each text, by the path that builds; waits while the engine makes them between its steps.

    Raises: Overloaded, ShuttingDown, EngineFailure: as `Engine.submit`, or it failed on the way.
    """
    ended = threading.Event()
    outcome: list[KnnlmError | None] = []

    def end(error: KnnlmError | None) -> None:
        outcome.append(error)
        ended.set()

    request = _ReencodeRequest("reencode", texts, windows, end)
    engine.submit(request)
    ended.wait()
    if (error := outcome[0]) is not None:
        raise error
    return [request.keys(text, dim) for text in range(len(texts))]
