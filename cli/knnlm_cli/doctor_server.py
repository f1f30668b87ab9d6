"""`knnlm doctor --url URL`: is a server there, is it ready, is it of our version?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from knnlm_cli.doctor_checks import Check, failed, ok, warning
from knnlm_core import __version__

TIMEOUT_S = 10.0


def check_server(url: str) -> Check:
    """Ask the routes that need no key."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
            version = client.get("/version")
            health = client.get("/health")
            ready = client.get("/ready")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        remedy = "is it running, and is the address right? `knnlm serve` prints where it listens"
        return failed("server", f"{base} cannot be reached: {reason}", remedy, url=base)
    told = _object(version).get("version")
    if version.status_code != 200 or not isinstance(told, str):
        remedy = "give the address of `knnlm serve`, without /v1; a proxy in front must pass /version, /health, /ready"
        return failed("server", f"{base} is no knnlm server: /version answers {version.status_code}", remedy, url=base)
    facts: dict[str, Any] = {"url": base, "version": told, "ready": ready.status_code == 200}
    if health.status_code != 200:
        message = f"knnlm {told} at {base} has failed: {_reason(health)}"
        return failed("server", message, "its log says why; correct that and start it again", **facts)
    if ready.status_code != 200:
        message = f"knnlm {told} at {base} is not ready: {_reason(ready)}"
        return warning("server", message, "wait until /ready answers 200; its log says how far it is", **facts)
    state = _object(ready)
    facts |= {name: state.get(name) for name in ("model", "datastores", "running", "waiting", "scoring")}
    stores = ", ".join(map(str, state.get("datastores", ()))) or "none"
    message = f"knnlm {told} at {base} is ready: model {state.get('model')}, datastores {stores}"
    if told != __version__:
        remedy = f"this is {__version__}; use one version on both sides"
        return warning("server", message, remedy, **facts)
    return ok("server", message, **facts)


def _object(response: httpx.Response) -> Mapping[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _reason(response: httpx.Response) -> str:
    error = _object(response).get("error")
    return str(error.get("message")) if isinstance(error, dict) else f"HTTP {response.status_code}"
