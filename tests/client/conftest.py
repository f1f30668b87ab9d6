from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract_double import ContractDouble, RunningDouble

from knnlm_client import Client


@pytest.fixture(scope="session")
def running_double() -> Iterator[ContractDouble]:
    with RunningDouble() as double:
        yield double


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def double(running_double: ContractDouble) -> Iterator[ContractDouble]:
    running_double.reset()
    yield running_double
    running_double.reset()


@pytest.fixture
def client(double: ContractDouble) -> Iterator[Client]:
    with Client(double.url, timeout=20) as client:
        yield client
