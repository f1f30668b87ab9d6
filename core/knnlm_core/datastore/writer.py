"""Writing one shard: raw append-only files while encoding, two Arrow files at the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import ValueColumns, write_keys, write_values
from knnlm_core.durable import part_of, sync_folder
from knnlm_core.errors import BuildConflict, BuildError

MAX_FLOAT16 = 65_504.0
_RAW_KEYS = "keys.raw"
_RAW_VALUES = "values.raw"


class ShardWriter:
    """Appends entries to a shard of a version under construction.

    Whatever an earlier, unfinished writer left in the folder is discarded. The shard is finished when both Arrow files
    have their names and the raw files are gone, which only `finish` brings about.

    Args:     directory: the shard's folder; made if absent.
    Raises:   BuildConflict: the folder holds a finished shard.
    """

    def __init__(self, directory: Path, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}")
        if is_finished(directory):
            raise BuildConflict(f"{directory} holds a finished shard; it is not written again")
        directory.mkdir(parents=True, exist_ok=True)
        for file in (layout.KEYS, layout.VALUES, layout.INDEX):
            (directory / file).unlink(missing_ok=True)
            part_of(directory / file).unlink(missing_ok=True)
        self._directory = directory
        self._dim = dim
        self._entries = 0
        self._keys: BinaryIO = (directory / _RAW_KEYS).open("wb")
        self._values: BinaryIO = (directory / _RAW_VALUES).open("wb")

    @property
    def entries(self) -> int:
        """Entries appended so far."""
        return self._entries

    def append(
        self,
        keys: Tensor | npt.NDArray[Any],
        values: Tensor | npt.NDArray[Any],
        char_spans: Tensor | npt.NDArray[Any],
    ) -> None:
        """Append n entries.

        Args:
            keys: (n, D), stored as float16.
            values: (n,) token ids.
            char_spans: (n, 2), where each value's text begins and ends in its document.
        Raises: BuildError: shapes differ, a key is not finite or exceeds float16, a value or span does not fit int32;
            then nothing is appended.
        """
        key_array = _array(keys)
        value_array, spans = _array(values), _array(char_spans)
        n = len(key_array)
        if key_array.shape != (n, self._dim) or value_array.shape != (n,) or spans.shape != (n, 2):
            raise BuildError(
                f"{self._directory.name}: keys, values and char_spans must have the shapes (n, {self._dim}), (n,) and "
                f"(n, 2); got {key_array.shape}, {value_array.shape} and {spans.shape}"
            )
        if value_array.dtype.kind not in "iu" or spans.dtype.kind not in "iu":
            raise BuildError(
                f"{self._directory.name}: values and spans must be integers, got {value_array.dtype}, {spans.dtype}"
            )
        columns = np.column_stack([value_array, spans])
        if n and (columns.min() < 0 or columns.max() > np.iinfo(np.int32).max or (spans[:, 0] > spans[:, 1]).any()):
            raise BuildError(
                f"{self._directory.name}: values and char_spans must be in 0 … 2³¹ − 1 with start ≤ end; "
                f"entries {self._entries} … {self._entries + n - 1} have {columns.min()} … {columns.max()}"
            )
        self._check_keys(key_array)
        key_array.astype("<f2").tofile(self._keys)
        columns.astype("<i4").tofile(self._values)
        self._entries += n

    def finish(self) -> int:
        """Turn the raw files into Arrow files on the disk and return how many entries they have.

        The raw files are mapped, not loaded. Raises BuildError: nothing was appended.
        """
        self.close()
        if not self._entries:
            raise BuildError(f"{self._directory.name} has no entries")
        raw_keys, raw_values = self._directory / _RAW_KEYS, self._directory / _RAW_VALUES
        columns = np.memmap(raw_values, dtype="<i4", mode="r", shape=(self._entries, 3))
        write_keys(
            self._directory / layout.KEYS,
            np.memmap(raw_keys, dtype="<f2", mode="r", shape=(self._entries, self._dim)),
        )
        write_values(self._directory / layout.VALUES, ValueColumns(*np.ascontiguousarray(columns.T)))
        raw_keys.unlink()
        raw_values.unlink()
        sync_folder(self._directory)
        sync_folder(self._directory.parent)
        return self._entries

    def close(self) -> None:
        """Close the raw files; without `finish` the next writer discards them."""
        self._keys.close()
        self._values.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.close()

    def _check_keys(self, keys: npt.NDArray[Any]) -> None:
        # Before the conversion: afterwards an overflow is an infinity like any other.
        if not keys.size or np.abs(keys).max() <= MAX_FLOAT16:  # false for NaN
            return
        finite = np.isfinite(keys).all(axis=1)
        bad = int(np.flatnonzero(~(finite & (np.abs(keys).max(axis=1) <= MAX_FLOAT16)))[0])
        what = "holds NaN or infinity"
        if finite[bad]:
            what = f"reaches {np.abs(keys[bad]).max():g}, and float16 holds at most {MAX_FLOAT16:g}"
        raise BuildError(f"{self._directory.name}: the key of entry {self._entries + bad} of the shard {what}")


def is_finished(directory: Path) -> bool:
    """Whether the folder holds a shard's keys and values, whole; its index is built later."""
    whole = all((directory / file).is_file() for file in (layout.KEYS, layout.VALUES))
    return whole and not any((directory / file).exists() for file in (_RAW_KEYS, _RAW_VALUES))


def _array(data: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        return (data.float() if data.is_floating_point() else data).numpy()
    return data
