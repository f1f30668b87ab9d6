"""A tiny LM that has learned a little, a datastore that knows more, and a live server of both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chat_folder import TEMPLATE
from learned import Learned, learn
from live_server import LiveServer, wait_until
from statutes import statute, write_statutes

from knnlm_builder.pipeline import build_with
from knnlm_builder.progress import SilentReporter
from knnlm_builder.settings import BuildSettings
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_server.settings import ServerSettings


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("contract")
    model = learn(folder / "learned-lm", map(statute, range(100, 130)))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    settings = BuildSettings(
        model=str(model),
        inputs=(write_statutes(folder / "law.jsonl", range(12)),),
        output=folder / "datastores",
        name="law",
        window=128,
        stride=64,
        held_out_max_tokens=1024,
        force=True,
    )
    lm = load_lm(str(model), LoadOptions())
    build_with(lm, settings, SilentReporter())
    lm.close()
    return Learned(model, folder / "datastores")


@pytest.fixture(scope="session")
def running_server(learned: Learned) -> Iterator[LiveServer]:
    settings = ServerSettings(model=str(learned.model), datastores=learned.root, max_sequences=8, draft_tokens=0)
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def learned_server(running_server: LiveServer) -> Iterator[LiveServer]:
    """Serves the LM and `law`; each test must leave it idle."""
    yield running_server
    wait_until(running_server.is_idle, within_s=5)
