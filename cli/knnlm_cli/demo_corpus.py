"""The demo's corpus: the Python language reference that the standard library carries (PSF licence)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

LICENCE = "PSF-2.0"
MIN_REPEAT = 40  # characters; shorter paragraphs ("For example:") may stand in many places
MIN_DOCUMENT = 200  # characters of its own that a document must have


class Document(TypedDict):
    """One line of the corpus, with the fields that `knnlm build` reads."""

    id: str
    text: str
    title: str
    licence: str
    uri: str


def write_python_reference(path: Path) -> Path:
    """Write the reference's topics as JSON lines; the same Python writes the same bytes, so a build is known again."""
    from pydoc_data.topics import topics

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        for document in distinct_documents(topics):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def distinct_documents(topics: Mapping[str, str]) -> Iterator[Document]:
    """Topics, shortest first, each without the paragraphs that an earlier one has already told.

    The reference prints many sections twice ("with" again inside "compound"). With a copy in the datastore a held-out
    document would be looked up instead of predicted, and the demo's perplexity would flatter the kNN-LM.
    """
    seen: set[str] = set()
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        kept: list[str] = []
        own_characters = 0
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = " ".join(paragraph.split())
            if len(words) >= MIN_REPEAT:
                if words in seen:
                    continue
                seen.add(words)
                own_characters += len(words)
            kept.append(paragraph)
        if own_characters >= MIN_DOCUMENT:
            yield Document(
                id=f"python-{sys.version_info.major}.{sys.version_info.minor}/{topic}",
                text="\n\n".join(kept) + "\n",
                title=text.strip().splitlines()[0].replace('"', ""),
                licence=LICENCE,
                uri=f"pydoc:{topic}",
            )
