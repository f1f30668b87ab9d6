"""Small real datastores for the registry, published once; every test works on its own copy."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "core" / "datastore"))

from registry_stores import DIM, Open, Stores, publish_stores
from small_store import identity

from knnlm_server.registry.config import RegistryConfig
from knnlm_server.registry.registry import Registry


@pytest.fixture(scope="session")
def published_stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return publish_stores(tmp_path_factory.mktemp("registry") / "datastores")


@pytest.fixture
def stores(published_stores: Stores, tmp_path: Path) -> Stores:
    """`law` in three versions, the last one current, and `news` in one."""
    root = Path(shutil.copytree(published_stores.root, tmp_path / "datastores"))
    return published_stores._replace(root=root)


@pytest.fixture
def open_registry(stores: Stores) -> Iterator[Open]:
    """Opens registries over the stores, with settings of their own."""
    with ExitStack() as opened:

        def open_one(**config: object) -> Registry:
            registry = Registry(stores.root, identity(DIM), RegistryConfig(**config))  # type: ignore[arg-type]
            opened.callback(registry.close)
            return registry

        yield open_one


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    """Remembers nothing."""
    return open_registry()
