"""Documents from Parquet files."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from knnlm_builder.corpus.document import SourceDocument, SourceLocation
from knnlm_builder.corpus.rows import DocumentRow, parse_row
from knnlm_builder.corpus.source_file import SourceFile
from knnlm_builder.corpus.stats import CorpusStats
from knnlm_core.errors import UnreadableInput

_READ_BYTES = 1 << 20
_BATCH_BYTES = 32 << 20
_MAX_BATCH_ROWS = 1024


def read_parquet(file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    """Read one document per row, in batches of about 32 MiB that never cross a row group.

    Columns are the fields of `DocumentRow`; others are never read, and counted once per file in ``stats``. A row
    without id gets ``<file name>#<row>``, rows counted from 1.

    Raises: UnreadableInput: naming file, row and field; also for a file that is not Parquet, or damaged.
    """
    try:
        # Arrow's defaults would read a row group's whole column into memory before the first row.
        with pq.ParquetFile(
            file.path, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        ) as parquet:
            yield from _documents(parquet, file, stats)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not about what the file holds
            raise
        raise UnreadableInput(f"{file.path} is not Parquet, or damaged: {error}") from None


def _documents(parquet: pq.ParquetFile, file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    names = parquet.schema_arrow.names
    if "text" not in names:
        raise UnreadableInput(f"{file.path}: column `text` is required, the file has {', '.join(names) or 'none'}")
    stats.ignore_fields(name for name in names if name not in DocumentRow.model_fields)
    columns = [name for name in names if name in DocumentRow.model_fields]
    number = 0
    for batch in _batches(parquet, columns):
        for index in range(batch.num_rows):
            number += 1
            source = SourceLocation(file.path, row=number)
            try:
                values = {name: batch.column(name)[index].as_py() for name in columns}
            except UnicodeDecodeError as error:  # Arrow itself does not look into strings
                byte = f"0x{error.object[error.start]:02x}"
                raise UnreadableInput(
                    f"{source} is not readable as text: invalid UTF-8 ({byte}) at byte {error.start} of a field"
                ) from None
            document = parse_row(values, default_id=f"{file.name}#{number}", source=source, stats=stats)
            if len(document.text.encode()) > file.max_document_bytes:
                raise file.too_large(source)
            yield document


def _batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        bytes_per_row = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        batch_rows = min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES // bytes_per_row))
        yield from parquet.iter_batches(batch_rows, row_groups=[group], columns=columns)
