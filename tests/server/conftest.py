"""A tiny model, three small published versions of two datastores, and a live server over them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folder import with_template
from exact_reference import ExactReference
from live_server import LiveServer, wait_until
from small_stores import Published, Start, publish

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_server.settings import ServerSettings
from tiny import save_tiny

# How much is drafted depends on what passes cost, and rounding on how wide they are. Here answers are compared to the
# last bit; those of servers that draft are compared with them in test_drafts_served.
STEADY: dict[str, Any] = {"draft_tokens": 0}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from more, and threads that wait for each other on busy cores cost tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers remember which versions they have verified; not in the user's own cache here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-lm")


@pytest.fixture(scope="session")
def published(lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(lm_folder, tmp_path_factory.mktemp("server"))


@pytest.fixture
def own_root(published: Published, tmp_path: Path) -> Path:
    """A copy of the published datastores that a test may damage."""
    return Path(shutil.copytree(published.root, tmp_path / "datastores"))


@pytest.fixture(scope="session")
def lm(lm_folder: Path) -> Iterator[HuggingFaceLM]:
    """The LM without a server; it encodes only."""
    lm = load_lm(str(lm_folder), LoadOptions())
    yield lm
    lm.close()


@pytest.fixture(scope="session")
def law(published: Published) -> Iterator[Datastore]:
    """The current version of `law`, opened beside the server."""
    with Datastore.open(published.root, "law") as datastore:
        yield datastore


@pytest.fixture(scope="session")
def news(published: Published) -> Iterator[Datastore]:
    """`news`, opened beside the server."""
    with Datastore.open(published.root, "news") as datastore:
        yield datastore


@pytest.fixture(scope="session")
def reference(lm_folder: Path) -> ExactReference:
    return ExactReference(lm_folder)


@pytest.fixture(scope="session")
def _session_server(published: Published) -> Iterator[LiveServer]:
    settings = ServerSettings(
        model=str(published.model), datastores=published.root, max_sequences=8, step_tokens=64, drain_timeout_s=5,
        **STEADY,
    )  # fmt: skip
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def live_server(_session_server: LiveServer) -> Iterator[LiveServer]:
    """A server of `law` and `news`, shared by the tests; each one must leave it idle."""
    yield _session_server
    # The last answer may be here a moment before its lease is given back.
    wait_until(_session_server.is_idle, within_s=5)


@pytest.fixture(scope="session")
def chat_folder(lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer brings a chat template."""
    return with_template(lm_folder, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def _chat_server(chat_folder: Path, published: Published) -> Iterator[LiveServer]:
    settings = ServerSettings(
        model=str(chat_folder), datastores=published.root, max_sequences=8, drain_timeout_s=5, **STEADY
    )
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def chat_server(_chat_server: LiveServer) -> Iterator[LiveServer]:
    """A server whose model can chat, shared by the tests; each one must leave it idle."""
    yield _chat_server
    wait_until(_chat_server.is_idle, within_s=5)


@pytest.fixture
def start_server(published: Published) -> Iterator[Start]:
    """Starts servers with settings of their own."""
    with ExitStack() as running:

        def start(*, wait: bool = True, **settings: object) -> LiveServer:
            given = {"model": str(published.model), "max_sequences": 4, "drain_timeout_s": 5, **STEADY, **settings}
            return running.enter_context(LiveServer(ServerSettings(**given), wait=wait))  # type: ignore[arg-type]

        yield start
