"""The server's settings: one frozen model, filled from the command line and from ``KNNLM_*`` variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from knnlm_core.errors import InvalidParameter

ENV_PREFIX = "KNNLM_"
ApiKey = Annotated[SecretStr, Field(min_length=1)]
StepShape = Annotated[str, Field(pattern=r"^[1-9]\d?x[1-9]\d?$")]
STATE = "serving.json"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServerSettings(BaseSettings):
    """What `knnlm serve` can be told. The environment variable of a field is ``KNNLM_`` + its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="Language model: hub id, folder or GGUF file.")
    datastores: Path | None = Field(
        default=None, description="Folder of published datastores; none serves the LM alone."
    )
    load: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Datastores to load at start; by default those of the state, and all under the folder that are not "
        "in it.",
    )
    default_datastore: str | None = Field(
        default=None,
        description="Datastore, or alias, used when a request names only the LM; by default that of the state, if any.",
    )
    alias: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Another word for a datastore, as ALIAS=NAME; several may be given."
    )
    state: Path | None = Field(
        default=None,
        description="File that remembers versions, aliases and default from one start to the next; by default "
        "serving.json in the folder of datastores.",
    )
    watch: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="Seconds between looks for newly published versions and for what other processes learn and delete; "
        "0 never looks.",
    )
    datastore_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Bound on all loaded datastores in bytes, those that drain included; one more is answered 409. By "
        "default unlimited.",
    )
    shadow_exact: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of searched tokens that are searched again exactly, beside the engine; the metric "
        "knnlm_shadow_recall tells what the index missed.",
    )
    keep_versions: int | None = Field(
        default=None,
        ge=1,
        description="Versions of each datastore that stay on the disk after a swap, besides those in use; by default "
        "all of them.",
    )
    served_model_name: str | None = Field(
        default=None, description="Name under which the LM is served; by default its last path component."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    runtime: Literal["auto", "huggingface", "llamacpp"] = Field(
        default="auto",
        description="What runs the LM: huggingface, llamacpp (GGUF files, on a CPU), or auto: llamacpp for a GGUF file "
        "where it is installed and neither a dtype nor a GPU is to be used.",
    )
    dtype: str = Field(default="auto", description="Weights: auto, float32, bfloat16 or float16.")
    weights: Literal["full", "int8"] = Field(
        default="full",
        description="full, or int8 for linear layers of int8 weights: on a CPU, faster, slightly worse; needs a "
        "calibration of its own.",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda[:N].")
    key_tap: str | None = Field(
        default=None, description="Which activation is the key, as the datastores were built; by default the family's."
    )
    compile_steps: Annotated[tuple[StepShape, ...], NoDecode] = Field(
        default=(),
        description="Steps to compile before the server is ready, as sequences x new tokens of each: 1x1 is one answer "
        "at a time; several are separated by commas. For the runtime huggingface on a CPU; needs a C++ compiler.",
    )
    compile_cache: Path | None = Field(
        default=None,
        description="Folder that keeps compiled steps for the next start, which nobody else may write to; by default "
        "one of the user's own.",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; by default what torch and FAISS choose.")
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Tokens per sequence, prompt and completion; by default the model's, at most 8192.",
    )
    max_sequences: int = Field(default=32, ge=1, le=1024, description="Sequences generated at once.")
    kv_cache_bytes: int = Field(
        default=4 << 30,
        ge=1 << 20,
        description="Bound on the KV cache in bytes; lowers the sequences at once if needed.",
    )
    prefix_cache_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Bound on the KV cache kept of prompts' beginnings, in bytes; 0 turns it off.",
    )
    query_cache_bytes: int = Field(
        default=64 << 20,
        ge=0,
        description="Bound on the search results kept for contexts that come again, in bytes; 0 turns it off.",
    )
    step_tokens: int = Field(default=512, ge=1, description="Tokens of decoding, prefill and drafts per step.")
    draft_tokens: int = Field(
        default=8,
        ge=0,
        le=64,
        description="Tokens of a draft at most that is read off a datastore and verified in one step, where that pays; "
        "0 turns drafts off.",
    )
    max_queued: int = Field(default=256, ge=0, description="Requests that may wait; one more is answered 503.")
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="Largest request body in bytes.")
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds that running requests get at shutdown or when a store is unloaded.",
    )
    api_key: Annotated[tuple[ApiKey, ...], NoDecode] = Field(
        default=(), description="Key that every /v1 route asks for; several may be given, by default none."
    )
    max_requests_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Requests that an API key may have under way; one more is answered 429. By default unlimited.",
    )
    admin_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Key for routes that change datastores; without one they work only when bound to loopback.",
    )
    playground: bool = Field(
        default=True, description="Serve the playground at /playground, where gradio and knnlm-client are installed."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="What is logged.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines as text, or as one JSON object per line."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="Collector that gets a span of each request, by OTLP over HTTP, such as http://localhost:4318; "
        "needs the extra otel. By default none.",
    )
    otlp_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of requests that get spans where the client has not decided."
    )

    @field_validator("load", "alias", "compile_steps", mode="before")
    @classmethod
    def _names(cls, given: object) -> object:
        """In the environment, names are separated by commas; shapes everywhere."""
        return tuple(name.strip() for name in given.split(",") if name.strip()) if isinstance(given, str) else given

    @field_validator("alias")
    @classmethod
    def _are_pairs(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        """ALIAS=NAME each, and no alias twice."""
        for pair in given:
            if pair.count("=") != 1 or not all(pair.split("=")):
                raise PydanticCustomError("alias", "must be ALIAS=NAME")
        if len({pair.split("=")[0] for pair in given}) < len(given):
            raise PydanticCustomError("alias", "must give each alias once")
        return given

    @field_validator("api_key", mode="before")
    @classmethod
    def _keys(cls, given: object) -> object:
        """In the environment, keys are separated by commas; an empty one is an error, not an open door."""
        return tuple(key.strip() for key in given.split(",")) if isinstance(given, str) else given

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, given: str | None) -> str | None:
        """An address that nothing can be sent to would be noticed much later."""
        if given is not None:
            url = urlsplit(given)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise PydanticCustomError("otlp_endpoint", "must be http://HOST[:PORT] or https://HOST[:PORT]")
        return given

    @field_validator("max_requests_per_key")
    @classmethod
    def _needs_keys(cls, given: int | None, info: ValidationInfo) -> int | None:
        """A limit that no request could ever meet would protect nobody."""
        if given is not None and not info.data.get("api_key", ("unknown",)):
            raise PydanticCustomError("needs_api_key", "needs at least one API key (--api-key)")
        return given

    @property
    def aliases(self) -> dict[str, str]:
        """Alias → name, as given."""
        return dict(pair.split("=") for pair in self.alias)

    @property
    def state_file(self) -> Path | None:
        """Where the state is kept; None without datastores."""
        if self.state is None and self.datastores is not None:
            return self.datastores / STATE
        return self.state

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


def read_settings(**given: object) -> ServerSettings:
    """Settings from arguments (None = not given), then the environment, then defaults.

    Raises: InvalidParameter: a value is out of bounds, or a ``KNNLM_*`` variable is unknown.
    """
    known = {ENV_PREFIX + name.upper() for name in ServerSettings.model_fields}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable not in known:
            raise InvalidParameter(f"unknown environment variable {variable}; known: {', '.join(sorted(known))}")
    try:
        return ServerSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            option, variable = f"--{field.replace('_', '-')}", ENV_PREFIX + field.upper()
            raise InvalidParameter(f"`{field}` is needed: {option} or {variable}", param=field) from error
        raise InvalidParameter(f"`{field}`: {first['msg']}, got {first.get('input')!r}", param=field) from error
