"""What reading a corpus came across, counted so that nothing is lost without a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_MAX_FIELD_NAMES = 64
_MAX_LISTED = 10


@dataclass(slots=True)
class CorpusStats:
    """Counters that `read_documents` fills while it is iterated."""

    files_read: int = 0  # or begun: a build that has enough text stops in the middle of a file
    documents: int = 0
    characters: int = 0
    blank_documents: int = 0  # fewer than two non-space characters: read, but not passed on
    files_skipped: Counter[str] = field(default_factory=Counter)  # by suffix, found in folders
    links_skipped: int = 0  # symbolic links that leave their folder, lead back up, or lead nowhere
    hidden_skipped: int = 0  # hidden files and folders; what is inside such a folder is not counted
    fields_ignored: Counter[str] = field(default_factory=Counter)  # unknown fields of rows, by name

    def ignore_fields(self, names: Iterable[str]) -> None:
        """Count unknown fields; after 64 different names the rest are counted together as ``(other)``."""
        for name in names:
            known = name in self.fields_ignored or len(self.fields_ignored) < _MAX_FIELD_NAMES
            self.fields_ignored[name if known else "(other)"] += 1

    def summary(self) -> str:
        """One line for people: ``3 files read, 2 documents (81 characters); skipped: 4 .pdf, 1 link``."""
        skipped = [f"{count} {suffix}" for suffix, count in _most_common(self.files_skipped)]
        skipped += [_count(self.links_skipped, "link")] if self.links_skipped else []
        skipped += [f"{self.hidden_skipped} hidden"] if self.hidden_skipped else []
        skipped += [_count(self.blank_documents, "blank document")] if self.blank_documents else []
        ignored = [f"{name} ({count})" for name, count in _most_common(self.fields_ignored)]
        parts = [
            f"{_count(self.files_read, 'file')} read, {_count(self.documents, 'document')}"
            f" ({_count(self.characters, 'character')})"
        ]
        parts += ["skipped: " + ", ".join(skipped)] if skipped else []
        parts += ["fields ignored: " + ", ".join(ignored)] if ignored else []
        return "; ".join(parts)


def _most_common(counter: Counter[str]) -> list[tuple[str, int]]:
    """The ten most frequent, by name, and the sum of the others."""
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[_MAX_LISTED:])
    return sorted(ranked[:_MAX_LISTED]) + ([("of other kinds", rest)] if rest else [])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
