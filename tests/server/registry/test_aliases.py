"""Aliases stand wherever a name does, and change together with what they mean."""

from __future__ import annotations

import pytest
from registry_stores import Stores

from knnlm_core.errors import DatastoreConflict, DatastoreNotFound, InvalidParameter
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.serving import MAX_ALIASES, Labels


def test_an_alias_stands_wherever_a_name_does(registry: Registry, stores: Stores) -> None:
    registry.load("law", stores.law[0], labels=Labels(aliases=["statutes"]))
    lease = registry.lease("statutes")
    assert lease.label == f"law:{stores.law[0]}:1.0"
    lease.release()
    assert registry.status("statutes") == registry.status("law")
    assert registry.load("statutes", stores.law[1]).status.generation == 2
    assert registry.roll_back("statutes").status.datastore.version == stores.law[0]
    assert not registry.refresh("statutes")
    with registry.change("statutes") as change:
        assert change.name == "law"
    assert registry.names() == ["law"]
    registry.unload("statutes", 0)
    with pytest.raises(DatastoreNotFound, match="datastore 'law', which 'statutes' means, is not loaded; loaded: none"):
        registry.lease("statutes")
    registry.load("law")
    assert registry.status("statutes").name == "law"


def test_aliases_are_replaced_kept_and_taken_away(registry: Registry) -> None:
    def load(aliases: list[str] | None) -> tuple[str, ...]:
        return registry.load("law", labels=Labels(aliases=aliases)).status.aliases

    assert load(["b", "a"]) == ("a", "b")
    assert load(None) == ("a", "b")
    assert load(["c"]) == ("c",)
    assert load([]) == ()
    assert registry.serving.aliases == {}


def test_an_alias_moves_in_one_step(registry: Registry) -> None:
    registry.load("law", labels=Labels(aliases=["today", "acts"]))
    registry.load("news", labels=Labels(aliases=["today"]))
    assert registry.serving.aliases == {"acts": "law", "today": "news"}
    assert (registry.status("law").aliases, registry.status("today").name) == (("acts",), "news")


@pytest.mark.parametrize(
    ("aliases", "error", "match"),
    [
        (["law"], DatastoreConflict, "'law' cannot be an alias"),
        (["news"], DatastoreConflict, "'news' cannot be an alias: it is the name of a datastore"),
        (["ok", "../x"], InvalidParameter, r"'\.\./x' is not"),
        (["current"], InvalidParameter, "'current' is not"),
        ([f"a{i}" for i in range(MAX_ALIASES + 1)], InvalidParameter, "at most 32, got 33"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_an_alias_is_refused_before_anything_is_loaded(
    registry: Registry, aliases: list[str], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        registry.load("law", labels=Labels(aliases=aliases), report=lambda *_: pytest.fail("loaded"))
    assert registry.names() == []


def test_the_default_is_set_kept_and_taken_away(registry: Registry) -> None:
    def load(name: str, default: bool | None) -> str | None:
        registry.load(name, labels=Labels(default=default))
        return registry.serving.default

    assert load("law", None) is None
    assert load("law", True) == "law"
    assert load("news", None) == "law"
    assert load("news", False) == "law"  # it is another's
    assert load("news", True) == "news"
    assert load("news", False) is None


def test_a_default_that_is_an_alias_is_the_names(registry: Registry) -> None:
    registry.load("law", labels=Labels(aliases=["today"]))
    registry.relabel(registry.serving.with_default("today"))
    registry.load("news", labels=Labels(default=False))
    assert registry.serving.default == "today"
    registry.load("law", labels=Labels(default=False))
    assert registry.serving.default is None


def test_a_failed_load_moves_no_alias(registry: Registry) -> None:
    registry.load("law", labels=Labels(aliases=["today"], default=True))
    before = registry.serving
    with pytest.raises(DatastoreNotFound):
        registry.load("news", "f" * 16, labels=Labels(aliases=["today"], default=True))
    assert registry.serving == before


def test_rollback_goes_back_and_forth_and_needs_another_version(registry: Registry, stores: Stores) -> None:
    registry.load("law", stores.law[0])
    registry.load("law", stores.law[0])
    with pytest.raises(DatastoreConflict, match=f"no version but {stores.law[0]} has served"):
        registry.roll_back("law")
    registry.load("law")
    for version, generation in ((stores.law[0], 4), (stores.law[2], 5)):
        status = registry.roll_back("law").status
        assert (status.datastore.version, status.generation) == (version, generation)
        assert not status.served.follows_current  # or it would not stay there
    registry.unload("law", 0)
    with pytest.raises(DatastoreNotFound, match="'law' is not loaded"):
        registry.roll_back("law")
