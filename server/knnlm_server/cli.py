"""``knnlm serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from knnlm_server.settings import ServerSettings, read_settings


def _option(field: str, *names: str, **more: Any) -> Any:
    """A command-line option that says what the setting of the same name says, default included."""
    info = ServerSettings.model_fields[field]
    default = "" if info.is_required() or info.default in (None, ()) else f" (default: {info.default})"
    return typer.Option(*names, help=f"{info.description}{default}", show_default=False, **more)


def serve(
    model: Annotated[str | None, _option("model", "--model")] = None,
    datastores: Annotated[Path | None, _option("datastores", "--datastores")] = None,
    load: Annotated[list[str] | None, _option("load", "--load")] = None,
    default_datastore: Annotated[str | None, _option("default_datastore", "--default-datastore")] = None,
    alias: Annotated[list[str] | None, _option("alias", "--alias")] = None,
    state: Annotated[Path | None, _option("state", "--state")] = None,
    watch: Annotated[float | None, _option("watch", "--watch")] = None,
    datastore_bytes: Annotated[int | None, _option("datastore_bytes", "--datastore-bytes")] = None,
    shadow_exact: Annotated[float | None, _option("shadow_exact", "--shadow-exact")] = None,
    keep_versions: Annotated[int | None, _option("keep_versions", "--keep-versions")] = None,
    served_model_name: Annotated[str | None, _option("served_model_name", "--served-model-name")] = None,
    host: Annotated[str | None, _option("host", "--host")] = None,
    port: Annotated[int | None, _option("port", "--port")] = None,
    runtime: Annotated[str | None, _option("runtime", "--runtime")] = None,
    dtype: Annotated[str | None, _option("dtype", "--dtype")] = None,
    weights: Annotated[str | None, _option("weights", "--weights")] = None,
    device: Annotated[str | None, _option("device", "--device")] = None,
    key_tap: Annotated[str | None, _option("key_tap", "--key-tap")] = None,
    threads: Annotated[int | None, _option("threads", "--threads")] = None,
    max_model_len: Annotated[int | None, _option("max_model_len", "--max-model-len")] = None,
    max_sequences: Annotated[int | None, _option("max_sequences", "--max-sequences")] = None,
    kv_cache_bytes: Annotated[int | None, _option("kv_cache_bytes", "--kv-cache-bytes")] = None,
    prefix_cache_bytes: Annotated[int | None, _option("prefix_cache_bytes", "--prefix-cache-bytes")] = None,
    query_cache_bytes: Annotated[int | None, _option("query_cache_bytes", "--query-cache-bytes")] = None,
    step_tokens: Annotated[int | None, _option("step_tokens", "--step-tokens")] = None,
    draft_tokens: Annotated[int | None, _option("draft_tokens", "--draft-tokens")] = None,
    max_queued: Annotated[int | None, _option("max_queued", "--max-queued")] = None,
    max_body_bytes: Annotated[int | None, _option("max_body_bytes", "--max-body-bytes")] = None,
    drain_timeout_s: Annotated[float | None, _option("drain_timeout_s", "--drain-timeout-s")] = None,
    api_key: Annotated[list[str] | None, _option("api_key", "--api-key")] = None,
    max_requests_per_key: Annotated[int | None, _option("max_requests_per_key", "--max-requests-per-key")] = None,
    admin_key: Annotated[str | None, _option("admin_key", "--admin-key")] = None,
    log_level: Annotated[str | None, _option("log_level", "--log-level")] = None,
) -> None:
    """Serve completions and scores over HTTP, from a language model and its datastores.

    Every option can also be given as an environment variable: KNNLM_ and the option's name in capitals.
    """
    given = dict(locals())
    for name in ("load", "alias", "api_key"):
        given[name] = tuple(given[name]) if given[name] else None
    settings = read_settings(**given)

    from knnlm_server.run import run_server  # torch is imported only when it is needed

    run_server(settings)
