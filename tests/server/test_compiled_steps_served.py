"""A server whose steps are compiled: what it says while they are, and that it generates the same tokens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, wait_until
from small_stores import Published

from knnlm_core.errors import InvalidParameter
from knnlm_server.settings import ServerSettings, read_settings

COMPILING_S = 600.0  # patience for a busy machine


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler is installed")
def test_a_server_tells_what_it_compiles_and_generates_the_same_tokens(
    published: Published, live_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(
        model=str(published.model), datastores=published.root, max_sequences=4, drain_timeout_s=5,
        compile_steps=("1x1",), compile_cache=tmp_path / "steps", draft_tokens=0,
    )  # fmt: skip
    with LiveServer(settings, wait=False) as server:
        reasons: set[str] = set()

        def is_ready() -> bool:
            answer = server.http.get("/ready")
            if answer.status_code == 503:
                reasons.add(answer.json()["error"]["message"])
            return answer.status_code == 200

        wait_until(is_ready, within_s=COMPILING_S)
        assert "the server is starting: waiting for the step 1x1 to compile (1 of 1)" in reasons
        server.wait_ready()
        widths: list[int] = []
        run = server.lm._eager_pass

        def seen(slots: Any, tokens: Any, lengths: Any) -> Any:
            widths.append(max(map(len, tokens)))
            return run(slots, tokens, lengths)

        monkeypatch.setattr(server.lm, "_eager_pass", seen)
        for model in ("tiny-lm", "tiny-lm@law"):
            for prompt in ("The tenant may", "A buyer shall return every key that"):
                body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
                have, need = (each.post("/v1/completions", body).json() for each in (server, live_server))
                assert have["choices"][0]["text"] == need["choices"][0]["text"]
                assert have["usage"] == need["usage"]
        assert widths
        assert 1 not in widths  # of all passes, prompts alone were not compiled


@pytest.mark.parametrize("given", ["1", "1x", "x1", "0x1", "1x1 1x4", "100x1"])
def test_what_is_no_shape_is_refused_before_anything_is_loaded(given: str) -> None:
    with pytest.raises(InvalidParameter, match="`compile_steps`"):
        read_settings(model="lm", compile_steps=given)


def test_shapes_are_separated_by_commas() -> None:
    assert read_settings(model="lm", compile_steps="1x1, 1x4").compile_steps == ("1x1", "1x4")
    assert read_settings(model="lm").compile_steps == ()
