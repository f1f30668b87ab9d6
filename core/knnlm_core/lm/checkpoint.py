"""What loading a checkpoint came across, in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knnlm_core.errors import ModelLoadError

_SHOWN = 3


def check_complete(source: str, info: Mapping[str, Any]) -> None:
    """Refuse a model some of whose parameters were not in its files: transformers fills those with random numbers.

    Args:     info: what `from_pretrained(…, output_loading_info=True)` returns beside the model.
    Raises:   ModelLoadError: naming the first few of them.
    """
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise ModelLoadError(
            f"model {source!r} is incomplete: its files lack {len(missing)} of the parameters that its configuration "
            f"needs ({shown})",
            param="model",
        )


def first_line(error: Exception) -> str:
    """A library's error as one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Chat models end a turn with a token of their own, named in the generation config."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
