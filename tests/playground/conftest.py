"""Small datastores with titles, licences and an address, and servers of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The live server and what it needs lie beside the server's own tests.
sys.path.append(str(Path(__file__).parents[1] / "server"))

from live_server import LiveServer
from playground_stores import Stores, publish_stores

from knnlm_server.settings import ServerSettings
from tiny import save_tiny

_POSITIONS = 2048  # so that a completion can take long


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers remember which versions they have verified; not in the user's own cache here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    folder = tmp_path_factory.mktemp("playground")
    model = save_tiny(folder / "tiny-lm")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": _POSITIONS}))
    return publish_stores(model, folder)


@pytest.fixture
def root(stores: Stores, tmp_path: Path) -> Path:
    """A copy of the datastores that a test may change."""
    return Path(shutil.copytree(stores.root, tmp_path / "datastores"))


@pytest.fixture
def live_server(stores: Stores, root: Path) -> Iterator[LiveServer]:
    """A server in this process, for what needs no page."""
    settings = ServerSettings(model=str(stores.model), datastores=root, max_sequences=4, drain_timeout_s=5)
    with LiveServer(settings) as server:
        yield server
