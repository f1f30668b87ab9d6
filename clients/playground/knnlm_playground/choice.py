"""What a visitor chose to answer with: a language model, datastores, and how to retrieve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from knnlm_client import KnnOptions

_OF_A_SEARCH = ("k", "temperature", "lmbda")


class Asked(NamedTuple):
    """The fields of a request that say how to retrieve."""

    model: str
    knn: KnnOptions


@dataclass(frozen=True, slots=True)
class Choice:
    """A language model, and the datastores that it is mixed with.

    Attributes:
        datastores: names; none for the language model alone.
        default: the datastore that the server uses where a request names none.
        knn: what differs from the datastores' calibration.
    """

    model: str
    datastores: tuple[str, ...]
    default: str | None
    knn: KnnOptions

    def mixed(self, **more: object) -> Asked:
        """To answer as chosen."""
        if not self.datastores:
            return self.alone(**more)
        return Asked(_named(self.model, self.datastores), self.knn.model_copy(update=more))

    def searched(self) -> Asked:
        """To look up neighbours; when to search is not asked there, and neither is how λ is set."""
        given = {name: value for name in _OF_A_SEARCH if (value := getattr(self.knn, name)) is not None}
        return Asked(_named(self.model, self.datastores), KnnOptions.model_validate(given))

    def alone(self, **more: object) -> Asked:
        """To answer by the language model alone; a server with a default datastore must be told never to search it."""
        names = self.datastores or ((self.default,) if self.default is not None else ())
        if not names:
            return Asked(self.model, KnnOptions.model_validate(more))
        asked = self.searched().knn.model_copy(update={"gate": "never", **more})
        return Asked(_named(self.model, names), asked)


def _named(model: str, datastores: tuple[str, ...]) -> str:
    return f"{model}@{'+'.join(datastores)}" if datastores else model
