"""What a server serves, as a value: versions, aliases and default, as they survive a restart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from knnlm_core.datastore.layout import is_name
from knnlm_core.datastore.manifest import Count, Digest16
from knnlm_core.errors import DatastoreConflict, DatastoreNotFound, InvalidParameter

MAX_ALIASES = 32  # of one name


class Labels(NamedTuple):
    """Which other words mean a name; None leaves them as they are."""

    aliases: Sequence[str] | None = None  # instead of those that the name has
    default: bool | None = None  # whether requests that name no datastore use this one


AS_THEY_ARE = Labels()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ServedName(_Part):
    """One name, loaded now or once.

    Attributes:
        version: what is loaded: ``current`` for whatever CURRENT names, or a version that was asked for.
        serving: the version that serves; of a name that is not loaded, the last one that did.
        previous: another version that served before, for a rollback.
        generation: of the last load; the next one has the next number.
    """

    loaded: bool
    version: Literal["current"] | Digest16
    serving: Digest16
    previous: Digest16 | None = None
    generation: Annotated[Count, Field(ge=1)]

    @property
    def follows_current(self) -> bool:
        """Whether the name means whatever CURRENT names."""
        return self.version == "current"


class Serving(_Part):
    """Names, aliases and default of one server. Every change makes a new value."""

    format_version: Literal[1] = 1
    names: dict[str, ServedName] = {}
    aliases: dict[str, str] = {}  # alias → name
    default: str | None = None  # a name or an alias

    @field_validator("names", "aliases")
    @classmethod
    def _are_names(cls, given: dict[str, object]) -> dict[str, object]:
        for name in given:
            if not is_name(name):
                raise ValueError(f"{name[:100]!r} is not a datastore's name")
        return given

    @model_validator(mode="after")
    def _aliases_are_no_names(self) -> Self:
        if both := sorted(self.names.keys() & self.aliases.keys()):
            raise ValueError(f"{both[0]!r} is a name and an alias")
        if wrong := sorted(name for name in (*self.aliases.values(), self.default) if name and not is_name(name)):
            raise ValueError(f"{wrong[0][:100]!r} is not a datastore's name")
        if chained := sorted(alias for alias, name in self.aliases.items() if name in self.aliases):
            raise ValueError(f"alias {chained[0]!r} means another alias")
        return self

    def resolve(self, name: str) -> str:
        """The name that a name or alias means."""
        return self.aliases.get(name, name)

    def aliases_of(self, name: str) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted(alias for alias, meant in self.aliases.items() if meant == name))

    def with_loaded(self, name: str, version: str, *, follows_current: bool) -> Serving:
        """The name loaded with a version, under the next generation number."""
        before = self.names.get(name)
        previous = None
        if before is not None:
            previous = before.previous if before.serving == version else before.serving
        served = ServedName(
            loaded=True,
            version="current" if follows_current else version,
            serving=version,
            previous=previous,
            generation=before.generation + 1 if before is not None else 1,
        )
        return self.model_copy(update={"names": {**self.names, name: served}})

    def with_unloaded(self, name: str) -> Serving:
        """The name not loaded; its number, its aliases and what it served are kept for the next load."""
        served = self.names[name].model_copy(update={"loaded": False})
        return self.model_copy(update={"names": {**self.names, name: served}})

    def with_replaced(self, name: str, versions: Mapping[str, str | None]) -> Serving:
        """The name with other numbers for versions that were written anew (old → new, None where nothing was left)."""
        if name not in self.names:
            return self
        served = self.names[name]
        changed = {
            field: versions[value]
            for field in ("version", "serving", "previous")
            if (value := getattr(served, field)) in versions and (versions[value] or field == "previous")
        }
        return self.model_copy(update={"names": {**self.names, name: served.model_copy(update=changed)}})

    def with_labels(self, name: str, labels: Labels) -> Serving:
        """Other aliases for the name, and the name as default or not; an alias of another name moves here.

        Raises:
            InvalidParameter: an alias cannot be one, or they are too many.
            DatastoreConflict: an alias is a name itself.
        """
        aliases, default = self.aliases, self.default
        if labels.aliases is not None:
            check_aliases(labels.aliases, {*self.names, name})
            others = {alias: meant for alias, meant in aliases.items() if meant != name}
            aliases = {**others, **dict.fromkeys(labels.aliases, name)}
        if labels.default is not None:
            is_default = default is not None and self.resolve(default) == name
            default = name if labels.default else None if is_default else default
        return self.model_copy(update={"aliases": aliases, "default": default})

    def with_alias(self, alias: str, name: str) -> Serving:
        """One alias more. Raises: as `with_labels`."""
        return self.with_labels(name, Labels(sorted({*self.aliases_of(name), alias})))

    def with_default(self, name: str | None) -> Serving:
        """Another default: a name or an alias."""
        return self.model_copy(update={"default": name})

    def previous_of(self, name: str) -> str:
        """The version that served before.

        Raises:
            DatastoreNotFound: the name is not loaded.
            DatastoreConflict: no other version has served.
        """
        served = self.names.get(name)
        if served is None or not served.loaded:
            raise DatastoreNotFound(f"datastore {name!r} is not loaded")
        if served.previous is None:
            raise DatastoreConflict(
                f"datastore {name!r} cannot be rolled back: no version but {served.serving} has served here"
            )
        return served.previous


def check_aliases(aliases: Sequence[str], names: Collection[str]) -> None:
    """Raises InvalidParameter, DatastoreConflict: as `Serving.with_labels`."""
    if len(aliases) > MAX_ALIASES:
        raise InvalidParameter(f"`aliases` must be at most {MAX_ALIASES}, got {len(aliases)}", param="aliases")
    for alias in aliases:
        if not is_name(alias):
            raise InvalidParameter(
                f"`aliases` must be fit to be a datastore's name, as {alias[:100]!r} is not", param="aliases"
            )
        if alias in names:
            raise DatastoreConflict(f"{alias!r} cannot be an alias: it is the name of a datastore", param="aliases")
