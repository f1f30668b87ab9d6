"""What finding and mixing came to in one step, over all its rows: for metrics and spans, not for the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knnlm_core.mixture import Found, Timings


@dataclass(slots=True)
class Mixing:
    """Adds up over the depths of drafts and over the parts of prompts.

    Attributes:
        timings: None where no row has a datastore.
        distances: squared L2 to the nearest entry of each drawn token for which there was one.
        lambdas: λ of the same tokens.
    """

    timings: Timings | None = None
    distances: list[float] = field(default_factory=list)
    lambdas: list[float] = field(default_factory=list)

    def add_timings(self, timings: Timings) -> None:
        """Seconds of some rows more."""
        before = self.timings
        self.timings = timings if before is None else before.plus(*timings)

    def add_drawn(self, found: Found) -> None:
        """What was found for rows from which tokens were drawn."""
        self.add_timings(found.timings)
        nearest = found.neighbors.distances.amin(dim=1).tolist()
        for distance, lmbda in zip(nearest, found.lmbda.tolist(), strict=True):
            if distance < math.inf:
                self.distances.append(distance)
                self.lambdas.append(lmbda)


def wait_for(tensor: Tensor) -> None:
    """Until a GPU has made it: whatever needs it next, a search above all, would be charged with the waiting."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
