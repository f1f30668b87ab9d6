"""Settings from the command line and the environment; what is wrong is named."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from pydantic import ValidationError

from knnlm_core.errors import InvalidParameter
from knnlm_server.cli import serve
from knnlm_server.settings import ENV_PREFIX, ServerSettings, read_settings

FIELDS = ServerSettings.model_fields


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_only_the_model_must_be_given() -> None:
    settings = read_settings(model="m")
    assert (settings.host, settings.port, settings.load, settings.api_key) == ("127.0.0.1", 8000, (), ())
    with pytest.raises(InvalidParameter, match="`model` is needed: --model or KNNLM_MODEL"):
        read_settings()


def test_every_field_is_described_and_every_number_bounded() -> None:
    for name, field in FIELDS.items():
        assert field.description, name
        if field.annotation in (int, float, int | None, float | None):
            assert any(hasattr(limit, "ge") for limit in field.metadata), name


def test_options_of_serve_are_the_settings_and_the_reverse() -> None:
    options = inspect.signature(serve).parameters
    assert list(options) == list(FIELDS)
    assert all(parameter.default is None for parameter in options.values())


def test_help_names_every_option_with_its_meaning() -> None:
    import re

    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    text = re.sub(r"\s+", " ", result.output)
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')} " in text
        assert re.sub(r"\s+", " ", field.description or "") in text


def test_the_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNLM_MODEL", "from-environment")
    monkeypatch.setenv("KNNLM_PORT", "9000")
    monkeypatch.setenv("KNNLM_DATASTORES", "/stores")
    monkeypatch.setenv("KNNLM_API_KEY", "secret, other")
    settings = read_settings(port=9001, max_queued=None)
    assert (settings.model, settings.port, settings.datastores) == ("from-environment", 9001, Path("/stores"))
    assert settings.max_queued == FIELDS["max_queued"].default
    assert [key.get_secret_value() for key in settings.api_key] == ["secret", "other"]
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "names"), [("law", ("law",)), ("law,news", ("law", "news")), (" law , news ,", ("law", "news")), ("", ())]
)
def test_names_to_load_are_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, given: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("KNNLM_LOAD", given)
    assert read_settings(model="m").load == names
    assert read_settings(model="m", load=("wiki",)).load == ("wiki",)


def test_an_unknown_variable_is_refused_with_those_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNLM_MAX_QUEUE", "3")
    with pytest.raises(InvalidParameter, match=r"KNNLM_MAX_QUEUE; known: .*KNNLM_MAX_QUEUED"):
        read_settings(model="m")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70_000),
        ("port", "http"),
        ("max_sequences", 0),
        ("max_queued", -1),
        ("kv_cache_bytes", 0),
        ("step_tokens", 0),
        ("max_body_bytes", 10),
        ("max_model_len", 1),
        ("drain_timeout_s", -1),
        ("threads", 0),
        ("runtime", "onnx"),
        ("log_level", "loud"),
        ("api_key", ""),
        ("admin_key", ""),
        ("portt", 1),
    ],
)
def test_a_value_out_of_bounds_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=f"`{field}`: ") as caught:
        read_settings(model="m", **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"), [("port", "http"), ("max_queued", "-1"), ("api_key", ""), ("api_key", "key,")]
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, field: str, value: str) -> None:
    monkeypatch.setenv(ENV_PREFIX + field.upper(), value)
    with pytest.raises(InvalidParameter, match=f"`{field}`: "):
        read_settings(model="m")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        read_settings(model="m").port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False)],
)
def test_loopback_is_told_from_the_rest(host: str, is_loopback: bool) -> None:
    assert read_settings(model="m", host=host).is_loopback is is_loopback
