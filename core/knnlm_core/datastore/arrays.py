"""Arrays as Arrow IPC files of one uncompressed record batch each, so that mapping them copies nothing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from knnlm_core.durable import part_of, replace_file
from knnlm_core.errors import DatastoreCorrupt

KeyArray = npt.NDArray[np.float16]
Int32Array = npt.NDArray[np.int32]


class ValueColumns(NamedTuple):
    """What an entry holds beside its key."""

    values: Int32Array  # (N,) token ids
    char_starts: Int32Array  # (N,) where the token's text begins in its document
    char_ends: Int32Array  # (N,) … and ends


_VALUES_SCHEMA = pa.schema([pa.field(name, pa.int32(), nullable=False) for name in ("value", "char_start", "char_end")])


def _keys_schema(dim: int) -> pa.Schema:
    number = pa.field("item", pa.float16(), nullable=False)
    return pa.schema([pa.field("key", pa.list_(number, dim), nullable=False)])


def write_keys(path: Path, keys: KeyArray) -> None:
    """Write keys (N, D) in one step; a memory-mapped array is streamed, not loaded."""
    schema = _keys_schema(keys.shape[1])
    numbers = pa.Array.from_buffers(pa.float16(), keys.size, [None, pa.py_buffer(np.ascontiguousarray(keys))])
    column = pa.FixedSizeListArray.from_arrays(numbers, type=schema.field(0).type)
    write_batch(path, pa.RecordBatch.from_arrays([column], schema=schema))


def write_values(path: Path, columns: ValueColumns) -> None:
    """Write values and character spans in one step."""
    arrays = [pa.array(column, type=pa.int32()) for column in columns]
    write_batch(path, pa.RecordBatch.from_arrays(arrays, schema=_VALUES_SCHEMA))


def map_keys(path: Path, dim: int, entries: int) -> KeyArray:
    """Map keys as a read-only (N, D) view of the file. Raises DatastoreCorrupt."""
    column = map_batch(path, _keys_schema(dim), entries).column(0).flatten()
    return column.to_numpy(zero_copy_only=True).reshape(entries, dim)


def map_values(path: Path, entries: int) -> ValueColumns:
    """Map values and character spans as read-only views of the file. Raises DatastoreCorrupt."""
    return ValueColumns(*(c.to_numpy(zero_copy_only=True) for c in map_batch(path, _VALUES_SCHEMA, entries).columns))


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Write a file of one record batch in one step."""
    part = part_of(path)
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    replace_file(part, path)


def map_batch(path: Path, schema: pa.Schema, rows: int | None = None) -> pa.RecordBatch:
    """Map the one record batch of a file.

    Args:     rows: how many it must have; None for any number.
    Raises:   DatastoreCorrupt: not a whole file of this schema and size, uncompressed and without nulls.
    """
    try:
        # The arrays keep the mapping alive; closing gives back the file descriptor.
        with pa.memory_map(str(path), "r") as source:
            size = source.size()
            base = source.read_buffer(1).address if size else 0
            source.seek(0)
            reader = pa.ipc.open_file(source)
            if reader.schema != schema:
                raise DatastoreCorrupt(f"{path} has the columns {_describe(reader.schema)}, needs {_describe(schema)}")
            if reader.num_record_batches != 1:
                raise DatastoreCorrupt(f"{path} has {reader.num_record_batches} record batches, needs exactly 1")
            batch = reader.get_batch(0)
            batch.validate()
    except FileNotFoundError:
        raise DatastoreCorrupt(f"{path} is missing") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DatastoreCorrupt(f"{path} is not a whole Arrow file: {error}") from error
    if rows is not None and batch.num_rows != rows:
        raise DatastoreCorrupt(f"{path} has {batch.num_rows} entries, the manifest needs {rows}")
    for column in batch.columns:
        if column.null_count or (pa.types.is_fixed_size_list(column.type) and column.flatten().null_count):
            raise DatastoreCorrupt(f"{path} has nulls; there must be none")
        buffers = [buffer for buffer in column.buffers() if buffer is not None]
        if not all(base <= b.address and b.address + b.size <= base + size for b in buffers):
            raise DatastoreCorrupt(f"{path} is compressed; only uncompressed files can be mapped")
    return batch


def _describe(schema: pa.Schema) -> str:
    return ", ".join(str(field) for field in schema)
