"""``knnlm serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from knnlm_server.settings import ServerSettings, read_settings

# Panel of the help → settings in it; others stand in the first one.
_PANELS = {
    "Language model": (
        "model", "served_model_name", "runtime", "dtype", "weights", "device", "key_tap", "threads", "max_model_len",
        "compile_steps", "compile_cache",
    ),
    "Datastores": (
        "datastores", "load", "default_datastore", "alias", "state", "watch", "datastore_bytes", "keep_versions",
        "shadow_exact",
    ),
    "Network and access": (
        "host", "port", "api_key", "max_requests_per_key", "admin_key", "max_body_bytes", "drain_timeout_s",
        "playground",
    ),
    "Capacity": (
        "max_sequences", "max_queued", "kv_cache_bytes", "prefix_cache_bytes", "query_cache_bytes", "step_tokens",
        "draft_tokens",
    ),
    "Logs and spans": ("log_level", "log_format", "otlp_endpoint", "otlp_sample_ratio"),
}  # fmt: skip
# What the shell offers where the setting's type does not say it.
_VALUES = {"dtype": ("auto", "float32", "bfloat16", "float16"), "device": ("auto", "cpu", "cuda")}


def _option(field: str, *names: str, **more: Any) -> Any:
    """A command-line option that says what the setting of the same name says, default included."""
    info = ServerSettings.model_fields[field]
    values = _VALUES.get(field) or (get_args(info.annotation) if get_origin(info.annotation) is Literal else ())
    if values:
        more["autocompletion"] = lambda: list(values)
    panel = next((panel for panel, fields in _PANELS.items() if field in fields), None)
    return typer.Option(
        *names, help=f"{info.description}{_default(field)}", show_default=False, rich_help_panel=panel, **more
    )


def _default(field: str) -> str:
    info = ServerSettings.model_fields[field]
    if info.is_required() or info.default in (None, ()):
        return ""
    shown = f"{info.default:g}" if isinstance(info.default, float) else str(info.default)
    if field.endswith("_bytes"):
        power = max(power for power in (0, 10, 20, 30) if info.default >> power)
        shown += f", {info.default >> power} {('bytes', 'KiB', 'MiB', 'GiB')[power // 10]}"
    return f" (default: {shown})"


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
    compile_steps: Annotated[str | None, _option("compile_steps", "--compile-steps")] = None,
    compile_cache: Annotated[Path | None, _option("compile_cache", "--compile-cache")] = None,
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
    playground: Annotated[bool | None, _option("playground", "--playground/--no-playground")] = None,
    log_level: Annotated[str | None, _option("log_level", "--log-level")] = None,
    log_format: Annotated[str | None, _option("log_format", "--log-format")] = None,
    otlp_endpoint: Annotated[str | None, _option("otlp_endpoint", "--otlp-endpoint")] = None,
    otlp_sample_ratio: Annotated[float | None, _option("otlp_sample_ratio", "--otlp-sample-ratio")] = None,
) -> None:
    """Serve completions and scores over HTTP, from a language model and its datastores.

    Every option can also be given as an environment variable: KNNLM_ and the option's name in capitals, such as
    KNNLM_MAX_SEQUENCES. Keys are better given so, since every user of a machine can read command lines. The model loads
    in the background; /ready answers 200 once it can be used. SIGTERM and Ctrl-C let running requests finish.

    Examples:
        knnlm serve --model ./models/lm --datastores ./datastores
        knnlm serve --model ./models/lm --datastores ./datastores --default-datastore law --watch 30
        KNNLM_API_KEY=... KNNLM_ADMIN_KEY=... knnlm serve --model ./models/lm --host 0.0.0.0
    """
    given = dict(locals())
    for name in ("load", "alias", "api_key"):
        given[name] = tuple(given[name]) if given[name] else None
    settings = read_settings(**given)

    from knnlm_server.run import run_server  # torch is imported only when it is needed

    run_server(settings)
