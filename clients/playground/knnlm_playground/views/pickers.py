"""What the tabs have in common: which model and datastores, how to retrieve, and whose keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import gradio as gr

from knnlm_client import AsyncClient, DatastoreList, KnnOptions, ModelCard
from knnlm_playground.choice import Choice
from knnlm_playground.server import Typed

GATES = ("always", "never", "every_n", "confidence", "automaton", "learned")
LAMBDA_MODES = ("fixed", "bucketed", "rrc", "learned")
CALIBRATED = "as calibrated"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the server offers now."""

    models: Sequence[ModelCard]
    stores: DatastoreList

    @property
    def model_names(self) -> list[str]:
        """Language models, without datastores."""
        return [card.id for card in self.models if card.parent is None]

    @property
    def store_names(self) -> list[str]:
        """Loaded datastores."""
        return [store.name for store in self.stores.loaded]

    @property
    def default_stores(self) -> list[str]:
        """What is chosen before anybody has chosen: the server's default, else the first."""
        return [self.stores.default] if self.stores.default in self.store_names else self.store_names[:1]


class Picks(NamedTuple):
    """The components that choose model and datastores."""

    model: Any
    stores: Any


class Retrieval(NamedTuple):
    """The components that say how to retrieve; their values go to `knn_options` in this order."""

    k: Any
    temperature: Any
    lmbda: Any
    lambda_mode: Any
    gate: Any
    gate_threshold: Any


def build_picks() -> Picks:
    """Two drop-downs, filled when the page is loaded."""
    return Picks(
        gr.Dropdown(label="Language model", choices=[], value=None, interactive=True, min_width=200),
        gr.Dropdown(
            label="Datastores", choices=[], value=[], multiselect=True, interactive=True, min_width=200,
            info=None,
        ),
    )  # fmt: skip


def build_retrieval() -> Retrieval:
    """Fields that may all stay empty."""
    with gr.Row():
        return Retrieval(
            optional_number("k, neighbours", CALIBRATED),
            optional_number("τ, knn temperature", CALIBRATED),
            optional_number("λ, weight of p_knn", CALIBRATED),
            gr.Dropdown(label="λ is set", choices=[CALIBRATED, *LAMBDA_MODES], value=CALIBRATED, min_width=140),
            gr.Dropdown(label="Gate", choices=[CALIBRATED, *GATES], value=CALIBRATED, min_width=140),
            optional_number("Gate threshold", CALIBRATED),
        )


def knn_options(
    k: Typed, temperature: Typed, lmbda: Typed, lambda_mode: Typed, gate: Typed, gate_threshold: Typed
) -> KnnOptions:
    """What the fields say; an empty one leaves it to the calibration.

    Raises: ValueError: a field holds what it cannot.
    """
    given = {
        "k": whole_number("k", k),
        "temperature": real_number("τ", temperature),
        "lmbda": real_number("λ", lmbda),
        "lambda_mode": _chosen(lambda_mode),
        "gate": _chosen(gate),
        "gate_threshold": real_number("gate threshold", gate_threshold),
    }
    return KnnOptions.model_validate({name: value for name, value in given.items() if value is not None})


def optional_number(label: str, placeholder: str) -> Any:
    """A field for a number or nothing, which Gradio's own field for numbers turns into 0."""
    return gr.Textbox(label=label, placeholder=placeholder, lines=1, max_lines=1, min_width=140)


def whole_number(name: str, typed: Typed) -> int | None:
    """What a field says. Raises ValueError: it holds something else."""
    try:
        return int(typed) if typed else None
    except ValueError:
        raise ValueError(f"`{name}` must be a whole number or empty, got {typed!r}") from None


def real_number(name: str, typed: Typed) -> float | None:
    """What a field says. Raises ValueError: it holds something else."""
    try:
        value = float(typed) if typed else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ValueError(f"`{name}` must be a number or empty, got {typed!r}")
    return value


def updates(catalogue: Catalogue, model: Typed, stores: Sequence[str] | None) -> list[Any]:
    """What the drop-downs offer now; what was chosen stays chosen while it exists.

    Args:     stores: None where nobody has chosen yet.
    """
    models, names = catalogue.model_names, catalogue.store_names
    kept = [name for name in stores if name in names] if stores is not None else catalogue.default_stores
    return [
        gr.update(choices=models, value=model if model in models else next(iter(models), None)),
        gr.update(choices=names, value=kept),
    ]


async def read_choice(client: AsyncClient, model: Typed, stores: Sequence[str] | None, knn: KnnOptions) -> Choice:
    """What the fields choose.

    Raises: KnnlmClientError: the server does not say what it uses where nothing is chosen.
    """
    default = None if stores else (await client.datastores.list()).default
    return Choice(model or "", tuple(stores or ()), default, knn)


def token_text(**more: Any) -> Any:
    """A component for tokens, whose `select` event says which one was chosen."""
    script = files("knnlm_playground").joinpath("assets/tokens.js").read_text(encoding="utf-8")
    return gr.HTML(js_on_load=script, apply_default_css=False, **more)


def _chosen(value: Typed) -> Typed:
    return None if value in (None, "", CALIBRATED) else value
