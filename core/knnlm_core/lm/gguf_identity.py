"""What a GGUF file is, as transformers reads it: kept, so that other runtimes need not read it that way each time.

A datastore is of the LM whose dense weights transformers sees, whichever runtime made its keys. Finding out takes
transformers half a minute for a small file, so what it finds is kept per content of the file:

    <cache>/knnlm/gguf/<sha256 of the file>-<version of transformers>-<FORMAT>/
        identity.json       fingerprints, key tap, sizes, where sequences end
        probe.npz           per key tap the keys of `probe_ids`, (T, D) float32, and the logits of the first of them:
                            what another runtime must find again
        tokenizer/          the Hugging Face tokenizer
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from knnlm_core.durable import sync_file, sync_folder
from knnlm_core.lm.checkpoint import eos_token_ids
from knnlm_core.lm.fingerprint import tokenizer_fingerprint
from knnlm_core.lm.gguf import load_gguf
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.key_tap import FINAL_HIDDEN
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import LMIdentity

logger = logging.getLogger(__name__)

FORMAT = 2  # of the folder, and of what the fingerprints are made from
_PROBE_TOKENS, _LOGIT_ROWS = 24, 8  # eight rows: 4 MB of a vocabulary of 128,000 tokens
_IDENTITY, _PROBE, _TOKENIZER = "identity.json", "probe.npz", "tokenizer"
_LOGITS = "logits"  # beside the key taps, none of which is called so


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What transformers knows of a GGUF file.

    Attributes:
        key_tap: of the family.
        context_length: tokens that the model was made for.
        eos_token_ids: tokens that end a completion, besides the tokenizer's own EOS.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    key_tap: str
    key_dim: int
    context_length: int
    eos_token_ids: tuple[int, ...]

    def identity(self, name: str, key_tap: str) -> LMIdentity:
        """The LM's identity under a name, with one of its key taps."""
        return LMIdentity(
            model_fingerprint=self.model_fingerprint,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            model_name=name,
            vocab_size=self.vocab_size,
            key_tap=key_tap,
            key_dim=self.key_dim,
        )


class GgufReading(NamedTuple):
    """A GGUF file as transformers reads it, without its weights."""

    facts: GgufFacts
    tokenizer: Any  # a Hugging Face fast tokenizer
    probe: Mapping[str, Tensor]  # key tap → (T, D) float32, the keys of `probe_ids`
    logits: Tensor  # (R, V) float32, of the first R of them


def probe_ids(vocab_size: int, max_length: int = _PROBE_TOKENS) -> list[int]:
    """A fixed walk through the vocabulary: no two tokens alike, the same on every machine."""
    return [(7919 * (i + 1)) % min(vocab_size, 50_000) for i in range(min(_PROBE_TOKENS, max_length))]


def read_gguf(path: Path, cache: Path | None = None) -> GgufReading:
    """What transformers knows of a GGUF file, from the cache where it was read before.

    The first reading of a file needs the memory of its weights in float32, and half a minute for 100 MB.

    Args:   cache: folder of readings; None for the user's. What cannot be kept is found out again next time.
    Raises: ModelLoadError: as `load_gguf`. UnsupportedModel: the Hugging Face adapter refuses the model.
    """
    folder = (cache or user_cache() / "gguf") / f"{_sha256(path)}-{transformers.__version__}-{FORMAT}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        logger.warning("gguf reading cannot be kept folder=%s %s", folder, error)
        return _read(path)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several readers the first does the work; ends with the process
        reading = _known(folder)
        if reading is None:
            reading = _read(path)
            try:
                _keep(folder, reading)
            except OSError as error:
                logger.warning("gguf reading is not kept folder=%s %s", folder, error)
    return reading


def user_cache() -> Path:
    """Where this user's machine keeps what can be found out again; in a container without a home, until it ends."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # no home to expand
        cache = tempfile.gettempdir()
    return Path(cache) / "knnlm"


def _read(path: Path) -> GgufReading:
    logger.info("reading model=%s to learn its fingerprint, once for each content of the file", path)
    model, raw_tokenizer = load_gguf(path, torch.float32)
    model.eval().requires_grad_(False)
    ends = eos_token_ids(model)
    lm = HuggingFaceLM(model, Tokenizer(raw_tokenizer, eos_token_ids=ends), name=path.stem)
    known = lm.identity
    facts = GgufFacts(
        model_fingerprint=known.model_fingerprint,
        tokenizer_fingerprint=known.tokenizer_fingerprint,
        vocab_size=known.vocab_size,
        key_tap=known.key_tap,
        key_dim=known.key_dim,
        context_length=model.config.get_text_config().max_position_embeddings,
        eos_token_ids=ends,
    )
    ids = probe_ids(known.vocab_size, facts.context_length)
    rows = lm.encode([ids], [0])
    keys = {FINAL_HIDDEN: rows.hidden.float().clone(), known.key_tap: rows.keys.clone()}
    return GgufReading(facts, raw_tokenizer, keys, lm.logits(rows.hidden[:_LOGIT_ROWS]).float().clone())


def _known(folder: Path) -> GgufReading | None:
    """What is kept in a folder; a damaged one is removed and said to be."""
    if not folder.is_dir():
        return None
    try:
        kept = json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
        facts = GgufFacts(**{**kept, "eos_token_ids": tuple(kept["eos_token_ids"])})
        with np.load(io.BytesIO((folder / _PROBE).read_bytes()), allow_pickle=False) as arrays:
            probe = {tap: torch.from_numpy(arrays[tap]) for tap in arrays.files}
        tokenizer = AutoTokenizer.from_pretrained(folder / _TOKENIZER)
        if (have := tokenizer_fingerprint(tokenizer)) != facts.tokenizer_fingerprint:
            raise ValueError(f"its tokenizer has the fingerprint {have}, not {facts.tokenizer_fingerprint}")
        logits = probe.pop(_LOGITS)
        for what, rows, width in (("keys", probe[facts.key_tap], facts.key_dim), ("logits", logits, facts.vocab_size)):
            if (dims := tuple(rows.shape)[1:]) != (width,):
                raise ValueError(f"the {what} of its probe have {dims} numbers, not {width}")
    except Exception as error:  # whatever a damaged file makes its reader raise
        logger.warning("gguf reading is damaged and made anew folder=%s %s", folder, error)
        shutil.rmtree(folder)
        return None
    return GgufReading(facts, tokenizer, probe, logits)


def _keep(folder: Path, reading: GgufReading) -> None:
    """Write a reading beside its place, then put it there: it appears whole or not at all. Raises OSError."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # what was left by a process that was killed
    reading.tokenizer.save_pretrained(partial / _TOKENIZER)
    (partial / _IDENTITY).write_text(json.dumps(asdict(reading.facts), indent=1), encoding="utf-8")
    arrays = {name: rows.numpy() for name, rows in {**reading.probe, _LOGITS: reading.logits}.items()}
    np.savez(partial / _PROBE, **arrays)  # type: ignore[arg-type]
    for file in partial.rglob("*"):
        sync_file(file)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
