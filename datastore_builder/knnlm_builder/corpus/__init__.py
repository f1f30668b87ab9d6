"""The corpus: reading documents, choosing held-out ones, keeping near-duplicates of the store out of them."""

from knnlm_builder.corpus.document import SourceDocument, SourceLocation, document_digest
from knnlm_builder.corpus.held_out import is_candidate, split_tail
from knnlm_builder.corpus.near_duplicates import NearDuplicateFilter, NgramSet, containment
from knnlm_builder.corpus.readers import DEFAULT_MAX_DOCUMENT_BYTES, READERS, read_documents
from knnlm_builder.corpus.stats import CorpusStats

__all__ = [
    "DEFAULT_MAX_DOCUMENT_BYTES",
    "READERS",
    "CorpusStats",
    "NearDuplicateFilter",
    "NgramSet",
    "SourceDocument",
    "SourceLocation",
    "containment",
    "document_digest",
    "is_candidate",
    "read_documents",
    "split_tail",
]
