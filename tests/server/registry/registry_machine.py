"""A registry beside a model of it, for hypothesis: whatever is done in whatever order, both say the same.

The model is slow and obvious. It knows of every copy of a document when it was made, and by the rule of the ledger
which copies live: those that were made no earlier than the last addition or deletion of their document.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from registry_stores import DIM, Stores, is_open, new_document
from small_store import identity

from knnlm_core.datastore.documents import read_documents
from knnlm_core.datastore.layout import DOCUMENTS, MANIFEST
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import (
    DatastoreBudget,
    DatastoreBusy,
    DatastoreConflict,
    DatastoreCorrupt,
    DatastoreNotFound,
    DocumentExists,
    DocumentNotFound,
)
from knnlm_server.registry.config import RegistryConfig
from knnlm_server.registry.generation import Lease
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.serving import Labels
from knnlm_server.registry.startup import Wishes, restore
from knnlm_server.registry.watch import Watcher

NAMES = ("law", "news")
ALIASES = ("acts", "today")
LEARNED = ("learned/0", "learned/1")
QUERIES = torch.linspace(-4, 4, 3 * DIM).reshape(3, DIM)

names = st.sampled_from(NAMES)
words = st.sampled_from((*NAMES, *ALIASES, "absent"))
numbers = st.integers(0, 63)  # an index into whatever there is


class Copy(NamedTuple):
    """A document, as it was learned once."""

    document_id: str
    revision: int


@dataclass
class Name:
    """What is known of one name.

    Attributes:
        killed_before: document → revision before which every copy of it is dead.
        learned: copies that were learned while serving.
    """

    current: str
    loaded: bool = False
    serving: str | None = None
    previous: str | None = None
    follows: bool = True
    generation: int = 0
    revision: int = 0
    killed_before: dict[str, int] = field(default_factory=dict)
    learned: list[Copy] = field(default_factory=list)

    def retarget(self, version: str, *, follows: bool) -> None:
        if self.serving not in (None, version):
            self.previous = self.serving
        self.loaded, self.serving, self.follows = True, version, follows
        self.generation += 1

    def visible(self, built: set[str], revision: int) -> set[str]:
        """What a snapshot of this revision sees now, of a version with these documents."""
        copies = [*(Copy(document_id, 0) for document_id in built), *self.learned]
        return {
            copy.document_id
            for copy in copies
            if copy.revision <= revision and self.killed_before.get(copy.document_id, 0) <= copy.revision
        }


@dataclass
class Held:
    """A lease, and what it must go on seeing."""

    lease: Lease
    name: str
    version: str
    generation: int
    revision: int
    found: tuple[list[list[int]], list[list[float]]] | None  # until something is deleted


class RegistryMachine(RuleBasedStateMachine):
    """Rules act on registry and model alike; invariants compare the two after every step.

    Attributes:
        stores: what every run works on a copy of.
        steps: rules that all runs together have carried out so far.
    """

    stores: Stores
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="registry-"))
        self.root = Path(shutil.copytree(self.stores.root, self.folder / "datastores"))
        self.versions = {"law": list(self.stores.law), "news": [self.stores.news]}
        self.manifests = {
            (name, version): Manifest.read(self.root / name / version / MANIFEST)
            for name in NAMES
            for version in self.versions[name]
        }
        self.built = {
            (name, version): {document.id for document in read_documents(self.root / name / version / DOCUMENTS)}
            for name, version in self.manifests
        }
        self.names = {name: Name(current=self.versions[name][-1]) for name in NAMES}
        self.aliases: dict[str, str] = {}
        self.default: str | None = None
        self.held: list[Held] = []
        self.snapshots: dict[tuple[str, int], Snapshot] = {}  # of generations that should be open
        self.closed: list[Snapshot] = []
        self.given: set[tuple[str, int]] = set()  # generation numbers
        self.max_bytes: int | None = None

    @initialize(versions=st.one_of(st.none(), st.integers(2, 4)))
    def start(self, versions: int | None) -> None:
        largest = max(manifest.num_bytes for manifest in self.manifests.values())
        self.max_bytes = None if versions is None else versions * largest
        self._open()

    def _open(self) -> None:
        config = RegistryConfig(state=self.root / "serving.json", max_bytes=self.max_bytes)
        self.registry = Registry(self.root, identity(DIM), config)

    def teardown(self) -> None:
        for held in self.held:
            held.lease.release()
        self.registry.close()
        assert self.registry._table.open_generations() == []
        assert self.registry.budget.used == 0
        shutil.rmtree(self.folder)

    # -- what words mean -----------------------------------------------------------------------------------------------

    def meant(self, word: str) -> Name | None:
        return self.names.get(self.aliases.get(word, word))

    def name_of(self, word: str) -> str:
        return self.aliases.get(word, word)

    # -- loads and swaps -----------------------------------------------------------------------------------------------

    @rule(
        word=words,
        number=st.one_of(st.none(), numbers),
        aliases=st.one_of(st.none(), st.lists(st.sampled_from(ALIASES), unique=True)),
        default=st.sampled_from((None, None, True, False)),
    )
    def load(self, word: str, number: int | None, aliases: list[str] | None, default: bool | None) -> None:
        name, model = self.name_of(word), self.meant(word)
        labels = Labels(aliases, default)
        if model is None:
            error = DatastoreConflict if word in (aliases or ()) else DatastoreNotFound
            self._fails(error, lambda: self.registry.load(word, labels=labels))
            return
        version = None if number is None else self.versions[name][number % len(self.versions[name])]
        if self._load(name, version or model.current, lambda: self.registry.load(word, version, labels=labels)):
            model.retarget(version or model.current, follows=version is None)
            if aliases is not None:
                kept = {alias: other for alias, other in self.aliases.items() if other != name}
                self.aliases = {**kept, **dict.fromkeys(aliases, name)}
            if default is not None:
                self.default = name if default else None if self.default == name else self.default
            self._loaded(name)

    @rule(word=words)
    def roll_back(self, word: str) -> None:
        name, model = self.name_of(word), self.meant(word)
        if model is None or not model.loaded:
            self._fails(DatastoreNotFound, lambda: self.registry.roll_back(word))
        elif model.previous is None:
            self._fails(DatastoreConflict, lambda: self.registry.roll_back(word))
        elif self._load(name, model.previous, lambda: self.registry.roll_back(word)):
            model.retarget(model.previous, follows=False)
            self._loaded(name)

    @rule(name=names, number=numbers)
    def publish(self, name: str, number: int) -> None:
        """Another process makes a version current."""
        version = self.versions[name][number % len(self.versions[name])]
        set_current(self.root, name, version)
        self.names[name].current = version

    @rule()
    def watch(self) -> None:
        room = self._room()
        Watcher(self.registry, 1.0).look()
        for name, model in sorted(self.names.items()):
            needed = self.manifests[name, model.current].num_bytes
            if model.loaded and model.follows and model.serving != model.current:
                if room is not None and needed > room:
                    assert self.registry.status(name).generation == model.generation
                    continue
                model.retarget(model.current, follows=True)
                self._loaded(name)
                room = self._room()

    @rule(name=names)
    def load_what_is_broken(self, name: str) -> None:
        version = self.versions[name][0]
        manifest = self.root / name / version / MANIFEST
        content = manifest.read_text()
        manifest.write_text("broken")
        self._fails(DatastoreCorrupt, lambda: self.registry.load(name, version))
        manifest.write_text(content)

    @rule(name=names)
    def load_what_is_not_there(self, name: str) -> None:
        self._fails(DatastoreNotFound, lambda: self.registry.load(name, "f" * 16))

    @rule(word=words)
    def unload(self, word: str) -> None:
        name, model = self.name_of(word), self.meant(word)
        if model is None or not model.loaded:
            self._fails(DatastoreNotFound, lambda: self.registry.unload(word, 0))
        elif any(held.name == name for held in self.held):
            self._fails(DatastoreBusy, lambda: self.registry.unload(word, 0))
        else:
            self.registry.unload(word, 0)
            model.loaded = False
            self._expect_closed()

    @rule()
    def restart(self) -> None:
        for held in self.held:
            held.lease.release()
        self.held.clear()
        self.registry.close()
        self.closed += self.snapshots.values()
        self.snapshots.clear()
        self._open()
        to_load = [name for name, model in self.names.items() if model.loaded or not model.generation]
        restore(self.registry, Wishes(), lambda name: None)
        for name in sorted(to_load):
            model = self.names[name]
            if name in self.registry.names():
                version = model.current if model.follows else model.serving
                assert version is not None
                model.retarget(version, follows=model.follows)
                self._loaded(name)
            else:
                assert self.max_bytes is not None, f"{name} was not restored"
                model.loaded = False

    # -- leases --------------------------------------------------------------------------------------------------------

    @rule(word=words)
    def lease(self, word: str) -> None:
        name, model = self.name_of(word), self.meant(word)
        if model is None or not model.loaded:
            self._fails(DatastoreNotFound, lambda: self.registry.lease(word))
            return
        lease = self.registry.lease(word)
        assert model.serving is not None
        assert lease.label == f"{name}:{model.serving}:{model.generation}.{model.revision}"
        self.held.append(Held(lease, name, model.serving, model.generation, model.revision, found(lease.datastore)))

    @precondition(lambda self: self.held)
    @rule(number=numbers, times=st.integers(1, 2))
    def release(self, number: int, times: int) -> None:
        held = self.held.pop(number % len(self.held))
        for _ in range(times):
            held.lease.release()
        self._expect_closed()

    # -- what is learned and deleted -----------------------------------------------------------------------------------

    @rule(name=names, document_id=st.sampled_from((*LEARNED, "doc/1")), replace=st.booleans())
    def learn(self, name: str, document_id: str, replace: bool) -> None:
        model = self.names[name]
        if not model.loaded:
            self._fails(DatastoreNotFound, lambda: self._learn(name, document_id, replace))
        elif not replace and document_id in self._visible(name):
            self._fails(DocumentExists, lambda: self._learn(name, document_id, replace))
        else:
            self._learn(name, document_id, replace)
            model.revision += 1
            model.learned.append(Copy(document_id, model.revision))
            self._killed(name, document_id)

    def _learn(self, name: str, document_id: str, replace: bool) -> None:
        with self.registry.change(name) as change:
            new = new_document(document_id, seed=self.names[name].revision)
            change.living.add([new], change.lease.datastore, replace=replace)

    @rule(name=names, document_id=st.sampled_from((*LEARNED, "doc/0", "doc/1", "doc/2")))
    def forget(self, name: str, document_id: str) -> None:
        model = self.names[name]
        if not model.loaded:
            self._fails(DatastoreNotFound, lambda: self._forget(name, document_id))
        elif not any(document_id in self._visible_in(name, version) for version in self.versions[name]):
            self._fails(DocumentNotFound, lambda: self._forget(name, document_id))
        else:
            self._forget(name, document_id)
            model.revision += 1
            self._killed(name, document_id)

    def _forget(self, name: str, document_id: str) -> None:
        with self.registry.change(name) as change:
            change.living.delete([document_id])

    def _killed(self, name: str, document_id: str) -> None:
        model = self.names[name]
        model.killed_before[document_id] = model.revision
        for held in self.held:
            if held.name == name:
                held.found = None
        self.snapshots[name, model.generation] = self.registry.status(name).datastore

    def _visible(self, name: str) -> set[str]:
        serving = self.names[name].serving
        assert serving is not None
        return self._visible_in(name, serving)

    def _visible_in(self, name: str, version: str) -> set[str]:
        return self.names[name].visible(self.built[name, version], self.names[name].revision)

    # -- how the two compare -------------------------------------------------------------------------------------------

    def _fails(self, error: type[Exception], act: object) -> None:
        """It does, and the invariants see to it that nothing has changed."""
        try:
            act()  # type: ignore[operator]
        except error:
            return
        raise AssertionError(f"no {error.__name__}")

    def _room(self) -> int | None:
        self.registry._swaps._closer.wait()
        return None if self.max_bytes is None else self.max_bytes - self.registry.budget.used

    def _load(self, name: str, version: str, act: object) -> bool:
        room, needed = self._room(), self.manifests[name, version].num_bytes
        if room is not None and needed > room:
            self._fails(DatastoreBudget, act)
            return False
        act()  # type: ignore[operator]
        return True

    def _loaded(self, name: str) -> None:
        model = self.names[name]
        number = (name, model.generation)
        assert number not in self.given, f"{number} was given twice"
        self.given.add(number)
        self.snapshots[number] = self.registry.status(name).datastore
        self._expect_closed()

    def _expect_closed(self) -> None:
        """Generations that nobody uses any more must close."""
        used = {(held.name, held.generation) for held in self.held}
        used |= {(name, model.generation) for name, model in self.names.items() if model.loaded}
        for number in self.snapshots.keys() - used:
            self.closed.append(self.snapshots.pop(number))

    @invariant()
    def counted(self) -> None:
        type(self).steps += 1

    @invariant()
    def the_registry_says_what_the_model_says(self) -> None:
        registry = self.registry
        loaded = {name: model for name, model in self.names.items() if model.loaded}
        assert registry.names() == sorted(loaded)
        assert registry.serving.aliases == self.aliases
        assert registry.serving.default == self.default
        for name, model in loaded.items():
            status = registry.status(name)
            assert (status.datastore.version, status.generation) == (model.serving, model.generation)
            assert (status.served.previous, status.served.follows_current) == (model.previous, model.follows)
            assert status.datastore.revision == model.revision
            assert status.leases == sum(held.name == name for held in self.held)
            assert set(status.datastore.document_ids()) == self._visible(name)

    @invariant()
    def a_lease_sees_what_it_saw_but_for_what_was_deleted(self) -> None:
        for held in self.held:
            snapshot = held.lease.datastore
            assert (snapshot.version, snapshot.revision) == (held.version, held.revision)
            expected = self.names[held.name].visible(self.built[held.name, held.version], held.revision)
            assert set(snapshot.document_ids()) == expected
            if held.found is None:
                held.found = found(snapshot)
            assert found(snapshot) == held.found

    @invariant()
    def no_generation_is_closed_early_or_leaks(self) -> None:
        self.registry._swaps._closer.wait()
        opened = {(generation.name, generation.number) for generation in self.registry._table.open_generations()}
        assert opened == self.snapshots.keys()
        assert all(is_open(snapshot) for snapshot in self.snapshots.values())
        assert not any(is_open(snapshot) for snapshot in self.closed)
        self.closed.clear()
        assert sorted(self.registry._swaps.livings._shared) == sorted({name for name, _ in opened})

    @invariant()
    def the_budget_counts_what_is_open(self) -> None:
        budget = self.registry.budget
        opened = sum(self.manifests[name, snapshot.version].num_bytes for (name, _), snapshot in self.snapshots.items())
        assert budget.used == opened + self.registry._swaps.livings.num_bytes
        assert self.max_bytes is None or opened <= self.max_bytes

    @invariant()
    def the_file_of_state_is_what_is_served(self) -> None:
        path = self.root / "serving.json"
        if path.exists():
            assert json.loads(path.read_text()) == self.registry.serving.model_dump(mode="json")
        else:
            assert not self.given


def found(snapshot: Snapshot) -> tuple[list[list[int]], list[list[float]]]:
    """What a search finds: ids and distances."""
    neighbors = snapshot.search(QUERIES, 8)
    return neighbors.entry_ids.tolist(), neighbors.distances.tolist()
