"""What `knnlm score` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from knnlm_core.errors import InvalidParameter

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_OFFLINE_ONLY = ("dtype", "weights", "device", "threads")
_NEED_DATASTORE = (
    "k",
    "temperature",
    "lmbda",
    "lambda_mode",
    "gate",
    "gate_threshold",
    "exclude_self",
    "overlap",
    "exclude_documents",
    "plot",
)


class ScoreSettings(BaseModel):
    """Settings of one run; None means that the user has not said."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    files: tuple[Path, ...] = Field(
        min_length=1, description="Files or folders to score: txt, md, html, jsonl(.gz), parquet."
    )
    model: str | None = Field(
        default=None,
        description="Language model: hub id, folder or GGUF file; with --url the served name, `lm` or `lm@store` "
        "(default: the first that the server lists).",
    )
    datastore: str | None = Field(
        default=None,
        description="Datastore to mix in: ROOT/NAME or ROOT/NAME@VERSION; with --url its NAME.",
    )
    url: str | None = Field(default=None, description="Score on the server at this address instead of here.")
    api_key: SecretStr | None = Field(default=None, min_length=1, description="The server's API key.")
    window: int | None = Field(
        default=None, description="Tokens that the LM sees at once; by default 1024, or its context if shorter."
    )
    stride: int | None = Field(
        default=None, description="Tokens that each window after the first scores; by default half the window."
    )
    k: int | None = Field(default=None, description="Neighbours per token.")
    temperature: float | None = Field(default=None, description="τ: divides squared distances.")
    lmbda: float | None = Field(default=None, description="λ: weight of p_knn, 0 … 1.")
    lambda_mode: str | None = Field(
        default=None,
        description="How λ is set: fixed, or per token by a rule of the calibration: bucketed, rrc, learned.",
    )
    gate: str | None = Field(
        default=None,
        description="When to search: always, never, every_n, confidence, automaton or learned; the last two follow "
        "what was found before where they do not search.",
    )
    gate_threshold: float | None = Field(
        default=None,
        description="Of the gates every_n (n), confidence (a probability), automaton (entries to follow; by default 1) "
        "and learned (nats that a search is expected to gain; as calibrated).",
    )
    exclude_documents: tuple[str, ...] = Field(
        default=(), description="Id of a document of the datastore that must not be found; may be repeated."
    )
    exclude_self: bool | None = Field(
        default=None,
        description="Let no document find its own entries, where the datastore holds a document of the same id "
        "(default). With --url each such document takes a request of its own; the others share requests, but a "
        "small one finds out about each that the datastore does not hold.",
    )
    overlap: bool | None = Field(
        default=None,
        description="Tell how much of the text stands in the datastore word for word, and what it gains (default).",
    )
    per_token: Path | None = Field(default=None, description="Write every scored token to this JSON Lines file.")
    plot: Path | None = Field(
        default=None, description=f"Draw what each token gains into this file ({', '.join(PLOT_SUFFIXES)})."
    )
    dtype: str | None = Field(default=None, description="Weights: auto (default), float32, bfloat16 or float16.")
    weights: Literal["full", "int8"] | None = Field(
        default=None, description="full (default), or int8 for linear layers of int8 weights, on a CPU."
    )
    device: str | None = Field(default=None, description="auto (default), cpu or cuda[:N].")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; by default what torch and FAISS choose.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """What could have no effect is refused, not ignored."""
        if self.url is None and self.model is None:
            raise ValueError("--model is needed (a hub id, a folder or a GGUF file), or --url of a server")
        if self.url is not None:
            self._refuse(_OFFLINE_ONLY, "is for scoring here; with --url it is the server's to choose")
        elif self.datastore is None:
            self._refuse(_NEED_DATASTORE, "needs --datastore")
        if self.plot is not None and self.plot.suffix not in PLOT_SUFFIXES:
            raise ValueError(f"--plot must end in one of {', '.join(PLOT_SUFFIXES)}, got {str(self.plot)!r}")
        return self

    def _refuse(self, fields: tuple[str, ...], why: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if not (value is None or value is False or value == ()):
                raise ValueError(f"{option_of(field)} {why}")

    def knn_given(self) -> dict[str, int | float | str]:
        """The retrieval settings of the command line, named as in JSON."""
        named = {
            "k": self.k,
            "temperature": self.temperature,
            "lambda": self.lmbda,
            "lambda_mode": self.lambda_mode,
            "gate": self.gate,
            "gate_threshold": self.gate_threshold,
        }
        return {name: value for name, value in named.items() if value is not None}


def option_of(field: str) -> str:
    """The option that sets a field."""
    names = {"lmbda": "--lambda", "exclude_documents": "--exclude-document"}
    return names.get(field, f"--{field.replace('_', '-')}")


def read_settings(**given: object) -> ScoreSettings:
    """Settings from arguments; None means not given. Raises InvalidParameter: naming what is wrong with which."""
    try:
        return ScoreSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise InvalidParameter(first["msg"].removeprefix("Value error, ")) from error
        field = str(first["loc"][0])
        raise InvalidParameter(
            f"{option_of(field)}: {first['msg']}, got {first.get('input')!r}", param=field
        ) from error
