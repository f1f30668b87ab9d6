"""What a server serves at its start: what it served before, unless it is told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from knnlm_core.datastore import layout
from knnlm_core.errors import DatastoreConflict, DatastoreError
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.serving import Serving, check_aliases

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asks for, over what the file of state remembers.

    Attributes:
        load: names to load; without any, all that are published but for those that were unloaded.
        aliases: alias → name.
        default: name or alias that requests use which name no datastore.
    """

    load: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None


def restore(registry: Registry, wishes: Wishes, before_each: Callable[[str], None]) -> None:
    """Load what is to be served. What was asked for must load; anything else that does not is logged and left out.

    Args:     before_each: gets each name before it is loaded; may raise to end the start.
    Raises:   DatastoreError, InvalidParameter: of what was asked for.
    """
    serving = _wished(registry, wishes)  # checked before anything is loaded, in force once everything is
    for name in wishes.load or _remembered(registry):
        before_each(name)
        try:
            _load(registry, name, serving)
        except DatastoreError as error:
            if wishes.load:
                raise
            logger.error("datastore skipped name=%s code=%s %s", name, error.code, error.message)
    wished = [*wishes.aliases.values(), *([wishes.default] if wishes.default is not None else [])]
    for name in wished:
        registry.status(serving.resolve(name))
    if wished:
        registry.relabel(_wished(registry, wishes))


def _wished(registry: Registry, wishes: Wishes) -> Serving:
    """What is served, with the aliases and the default asked for."""
    serving = registry.serving
    taken = {*serving.names, *registry.published()} if wishes.aliases else set()
    for alias, name in wishes.aliases.items():
        check_aliases([alias], taken)
        serving = serving.with_alias(alias, layout.check_name(serving.resolve(name)))
    return serving if wishes.default is None else serving.with_default(layout.check_name(wishes.default))


def _remembered(registry: Registry) -> list[str]:
    known = registry.serving.names
    unloaded = {name for name, served in known.items() if not served.loaded}
    return sorted({*registry.published(), *known} - unloaded)


def _load(registry: Registry, name: str, serving: Serving) -> None:
    meant = serving.resolve(name)
    if meant != name and name in registry.published():
        raise DatastoreConflict(f"{name!r} is published, but here it is an alias of {meant!r}")
    served = serving.names.get(meant)
    registry.load(meant, None if served is None or served.follows_current else served.version)
