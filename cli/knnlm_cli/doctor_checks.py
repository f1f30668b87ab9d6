"""What a check of `knnlm doctor` finds, and how checks are run: one that breaks is a finding, not the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from knnlm_core.errors import KnnlmError


class Status(StrEnum):
    """How a check ended; the worst one is last."""

    OK = "ok"
    WARNING = "warning"  # works, but not as well as it could, or not for long
    FAILED = "failed"  # something that is needed does not work


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at; stable, for scripts.
        status: how it is.
        message: what was found, for people.
        next: what to do about it; None where there is nothing to do.
        facts: what was found, for scripts; JSON values.
    """

    name: str
    status: Status
    message: str
    next: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Probe(NamedTuple):
    """Something to be looked at: findings of one group, under one name should the probe itself break."""

    group: str
    name: str
    run: Callable[[], Check | Iterable[Check]]


def ok(name: str, message: str, **facts: Any) -> Check:
    """Nothing to do."""
    return Check(name, Status.OK, message, None, facts)


def warning(name: str, message: str, next_: str, **facts: Any) -> Check:
    """It works, but something should be done."""
    return Check(name, Status.WARNING, message, next_, facts)


def failed(name: str, message: str, next_: str, **facts: Any) -> Check:
    """It does not work until something is done."""
    return Check(name, Status.FAILED, message, next_, facts)


def findings(probe: Probe) -> Iterator[Check]:
    """What a probe finds; what it raises is a finding too, since the others still have something to say."""
    try:
        found = probe.run()
        yield from (found,) if isinstance(found, Check) else found
    except KnnlmError as error:
        yield failed(probe.name, error.message, "do what the message says", code=error.code)
    except Exception as error:  # of any class: libraries fail in their own ways, and that is what is being looked for
        told = str(error).strip().partition("\n")[0]
        yield failed(
            probe.name,
            f"{type(error).__name__}: {told}" if told else type(error).__name__,
            "this check could not be made: reinstall what it names, or report it as a defect",
            error=type(error).__name__,
        )


def worst(statuses: Iterable[Status]) -> Status:
    """The status of all together."""
    return max(statuses, key=list(Status).index, default=Status.OK)
