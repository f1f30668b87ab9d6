"""Wiring: settings → app. The model loads in the background, so that `/ready` can say what is missing."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from fastapi import FastAPI

from knnlm_core import __version__
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import measure_drift
from knnlm_core.errors import InvalidParameter, KnnlmError
from knnlm_core.lm.llamacpp_loading import encode_budget
from knnlm_core.lm.loading import LoadOptions, load_lm, model_name
from knnlm_core.query_cache import QueryCache
from knnlm_server.api import (
    chat,
    completions,
    datastores,
    documents,
    health,
    maintenance,
    metrics,
    models,
    neighbors,
    score,
    tokenizer,
    versions,
)
from knnlm_server.api.errors import install_error_handlers
from knnlm_server.api.middleware import BodyLimit, KeyLimit, RequestLog
from knnlm_server.api.openapi import DocumentedApp
from knnlm_server.api.pages import mount_pages, opened
from knnlm_server.api.selection import SEPARATOR
from knnlm_server.api.state import Backend, Service
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.reencoding import reencode
from knnlm_server.engine.shadow import ShadowSearch
from knnlm_server.registry.config import RegistryConfig
from knnlm_server.registry.generation import Lease
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.startup import Wishes, restore
from knnlm_server.registry.watch import Watcher
from knnlm_server.settings import ServerSettings
from knnlm_server.telemetry.http_metrics import HttpMetrics
from knnlm_server.telemetry.traces import Tracing, make_tracing

logger = logging.getLogger(__name__)

# FastAPI has telemetry of its own, for whoever sets OpenTelemetry's globals: it would tell of bodies and of messages of
# errors. What this server tells, it says itself. Versions without it take the argument and leave it alone.
_NO_TELEMETRY = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(
    settings: ServerSettings, on_failure: Callable[[], None] = lambda: None, tracing: Tracing | None = None
) -> FastAPI:
    """The ASGI application.

    Args:
        on_failure: called when the backend cannot start; a server that will never be ready should stop.
        tracing: makes spans, instead of what the settings say; closed with the app.
    Raises: UnsupportedFeature: spans are wanted, and OpenTelemetry is not installed.
    """
    state = Service(settings)
    spans = tracing if tracing is not None else make_tracing(settings.otlp_endpoint, settings.otlp_sample_ratio)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(state, on_failure))
        try:
            async with opened(pages):
                yield
        finally:
            state.closing = True
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            if state.backend is not None:
                # A thread of its own: those of asyncio may all be busy.
                with ThreadPoolExecutor(1, "stop") as own:
                    stopping = asyncio.get_running_loop().run_in_executor(
                        own, _stop, state.backend, settings.drain_timeout_s
                    )
                    await stopping
            await asyncio.to_thread(spans.close)

    # A path with a slash too many is unknown, not redirected: behind a proxy the redirect's address would be wrong.
    app = DocumentedApp(
        settings, title="knnlm", version=__version__, lifespan=lifespan, redirect_slashes=False, telemetry=_NO_TELEMETRY
    )
    app.state.service = state
    app.state.stopping = asyncio.Event()  # set when the server is to stop, before it waits for answers to end
    app.state.http_metrics = HttpMetrics()
    for module in (
        completions,
        chat,
        score,
        neighbors,
        tokenizer,
        datastores,
        documents,
        versions,
        maintenance,
        models,
        metrics,
        health,
    ):
        app.include_router(module.router)
    install_error_handlers(app)
    pages = mount_pages(app, app.state.stopping) if settings.playground else []
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(KeyLimit, settings=settings)
    app.add_middleware(RequestLog, metrics=app.state.http_metrics, tracing=spans)
    return app


async def _start(state: Service, on_failure: Callable[[], None]) -> None:
    try:
        state.backend = await asyncio.to_thread(build_backend, state)
        logger.info("ready model=%s datastores=%s", state.backend.model_name, ",".join(state.backend.registry.names()))
    except KnnlmError as error:
        state.failure = error.message
        logger.error("start failed code=%s %s", error.code, error.message)
        on_failure()
    except Exception:
        state.failure = "an unexpected error; the log says which"
        logger.exception("start failed")
        on_failure()


def build_backend(state: Service) -> Backend:
    """Load the LM and the datastores, start the engine."""
    settings = state.settings
    name = settings.served_model_name or model_name(settings.model)
    if SEPARATOR in name:
        raise InvalidParameter(
            f"`served_model_name` must not hold {SEPARATOR!r}, which separates LM and datastore; got {name!r}",
            param="served_model_name",
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    lm = load_lm(
        settings.model,
        LoadOptions(
            dtype=settings.dtype,
            weights=settings.weights,
            device=settings.device,
            key_tap=settings.key_tap,
            max_length=settings.max_model_len,
            max_sequences=settings.max_sequences,
            kv_cache_bytes=settings.kv_cache_bytes,
            prefix_cache_bytes=settings.prefix_cache_bytes,
            progress=sys.stderr.isatty(),
            runtime=settings.runtime,
            compile_steps=settings.compile_steps,
            compile_cache=settings.compile_cache,
        ),
        state.wait_for,
    )
    engine = Engine(
        lm,
        lm.tokenizer.eos_token_ids,
        EngineConfig(
            step_tokens=settings.step_tokens,
            draft_tokens=settings.draft_tokens,
            score_tokens=encode_budget(lm, EngineConfig().score_tokens),
            max_queued=settings.max_queued,
        ),
    )
    registry = Registry(
        settings.datastores,
        lm.identity,
        RegistryConfig(
            verified=_verified_folder(),
            state=settings.state_file,
            max_bytes=settings.datastore_bytes,
            keep_versions=settings.keep_versions,
            numerics=lm.numerics,
            drift=lambda snapshot: measure_drift(
                snapshot, lm.tokenizer, partial(reencode, engine, lm.identity.key_dim)
            ),
        ),
    )
    try:
        state.require_open()
        engine.start()  # loading a datastore asks it for keys
        restore(registry, Wishes(settings.load, settings.aliases, settings.default_datastore), state.wait_for_datastore)
        state.require_open()
    except BaseException:
        if engine.is_alive:
            engine.stop(drain_timeout_s=0)
        registry.close()
        raise
    watcher = Watcher(registry, settings.watch) if settings.watch else None
    if watcher is not None:
        watcher.start()
    shadow = _shadow(registry, engine, settings.shadow_exact)
    query_cache = QueryCache(settings.query_cache_bytes) if settings.query_cache_bytes else None
    return Backend(lm, lm.tokenizer, engine, registry, name, watcher, shadow, query_cache)


def _shadow(registry: Registry, engine: Engine, fraction: float) -> ShadowSearch | None:
    def pin(datastore: object) -> Lease | None:
        assert isinstance(datastore, Snapshot), "only snapshots are shadowed"
        return registry.pin(datastore)

    if not fraction:
        return None
    shadow = ShadowSearch(fraction, pin, engine.metrics)
    shadow.start()
    return shadow


def _verified_folder() -> Path:
    """Where this machine remembers which versions it has verified; in a container without a home, until it ends."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # no home to expand
        cache = tempfile.gettempdir()
    return Path(cache) / "knnlm" / "verified"


def _stop(backend: Backend, drain_timeout_s: float) -> None:
    backend.threads.close()
    if backend.watcher is not None:
        backend.watcher.stop()
    backend.engine.stop(drain_timeout_s)
    if backend.shadow is not None:
        backend.shadow.stop()
    backend.registry.close()
    backend.lm.close()
