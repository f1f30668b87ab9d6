"""A row of a jsonl or parquet file, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from knnlm_builder.corpus.document import SourceDocument, SourceLocation
from knnlm_builder.corpus.stats import CorpusStats
from knnlm_builder.corpus.text import check_characters
from knnlm_core.datastore.documents import normalise_newlines
from knnlm_core.errors import UnreadableInput

MAX_ID_CHARACTERS = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_document_id(document_id: str) -> str:
    """Return the id if it can stand on one line of a message and in a URL.

    Raises: ValueError: blank, longer than 4096 characters, or holding control characters or lone surrogates.
    """
    check_characters(document_id)
    if not document_id.strip():
        raise ValueError("an id must not be blank")
    if len(document_id) > MAX_ID_CHARACTERS:
        raise ValueError(f"an id must have at most {MAX_ID_CHARACTERS} characters, got {len(document_id)}")
    if control := _CONTROL.search(document_id):
        raise ValueError(f"a control character (U+{ord(control[0]):04X}) at position {control.start()}")
    return document_id


def _number_to_id(value: object) -> object:
    # Many corpora number their documents; a bool is an int to Python, but no number.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Line = Annotated[str, AfterValidator(check_characters)]
Text = Annotated[str, AfterValidator(check_characters), AfterValidator(normalise_newlines)]
DocumentId = Annotated[str, BeforeValidator(_number_to_id), AfterValidator(check_document_id)]


class DocumentRow(BaseModel):
    """The fields of a row; what is optional may also be null."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    id: DocumentId | None = None
    text: Text
    uri: Line | None = None
    title: Line | None = None
    licence: Line | None = None
    tags: list[Line] | None = None


def parse_row(
    values: Mapping[str, Any], *, default_id: str, source: SourceLocation, stats: CorpusStats
) -> SourceDocument:
    """Check a row and make it a document; unknown fields are counted in ``stats`` and otherwise ignored.

    Raises: UnreadableInput: naming the source and every field at fault.
    """
    try:
        row = DocumentRow.model_validate(values)
    except ValidationError as error:
        raise UnreadableInput(f"{source}: {_describe(error)}") from None
    if unknown := values.keys() - DocumentRow.model_fields.keys():
        stats.ignore_fields(sorted(unknown))
    return SourceDocument(
        id=default_id if row.id is None else row.id,
        text=row.text,
        source=source,
        uri=row.uri,
        title=row.title,
        licence=row.licence,
        tags=tuple(row.tags or ()),
    )


def _describe(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "missing":
                problems.append(f"field `{name}` is required")
            case "value_error":
                problems.append(f"field `{name}`: {problem['msg'].removeprefix('Value error, ')}")
            case _:
                given = problem["input"]
                shown = f"{type(given).__name__} {str(given)[:40]!r}"
                problems.append(f"field `{name}`: {problem['msg']}, got {shown}")
    return "; ".join(problems)
