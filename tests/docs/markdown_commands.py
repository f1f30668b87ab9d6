"""Commands, links and headings of a Markdown page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A block without a language is one of commands where a line begins with one of these words, or sets a variable.
PROGRAMS = {
    ".", "cat", "cd", "chmod", "cp", "curl", "docker", "du", "echo", "export", "guidellm", "jq", "knnlm", "lm_eval",
    "ls", "make", "mkdir", "mv", "openssl", "pip", "printf", "promtool", "python", "rm", "rsync", "sleep", "systemctl",
    "tar", "unset",
}  # fmt: skip
_SHELL = ("", "sh", "bash", "shell", "console")
_ASSIGNED = re.compile(r"[A-Za-z_]\w*=")
_HERE = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*([\w+-]*)")


class Block(NamedTuple):
    """A block of code; indented ones have no language."""

    line: int  # of its first line, counted from 1
    language: str
    text: str


class Command(NamedTuple):
    """One thing to run: a statement of a shell, or a whole block of Python."""

    line: int
    language: str  # "shell" or "python"
    text: str

    @property
    def program(self) -> str:
        """The first word behind variables that are set for it; "" where only variables are set."""
        if self.language == "python":
            return "python"
        words = (word for word in _words(self.text) if not _ASSIGNED.match(word))
        return next(words, "")


def blocks(markdown: str) -> Iterator[Block]:
    """All blocks of code, fenced or indented by four spaces."""
    lines = markdown.splitlines()
    at = 0
    while at < len(lines):
        if fence := _FENCE.match(lines[at]):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence[1])
            yield Block(at + 2, fence[2], "\n".join(lines[at + 1 : end]))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(at + 1, "", "\n".join(line[4:] for line in lines[at:end]).rstrip())
            at = end
        else:
            at += 1


def commands(markdown: str) -> Iterator[Command]:
    """What a reader is told to run, in order."""
    for block in blocks(markdown):
        if block.language == "python":
            yield Command(block.line, "python", block.text)
        elif block.language in _SHELL:
            found = list(_statements(block))
            if any(_begins(command) for command in found):
                yield from found


def output_lines(markdown: str) -> Iterator[tuple[int, str]]:
    """Lines of blocks that are neither commands nor Python, by their numbers."""
    for block in blocks(markdown):
        for number, line in enumerate(block.text.splitlines(), start=block.line):
            if block.language not in (*_SHELL, "python"):
                yield number, line


def prose(markdown: str) -> str:
    """The page without its blocks of code."""
    lines = markdown.splitlines()
    for block in blocks(markdown):
        for number in range(block.line - 1, block.line - 1 + len(block.text.splitlines())):
            lines[number] = ""
    return "\n".join(lines)


def anchors(markdown: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(markdown), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found[anchor] = found.get(anchor, -1) + 1
        result.add(f"{anchor}-{count}" if count else anchor)
    return result


def links(markdown: str) -> Iterator[str]:
    """Where links and images lead."""
    text = re.sub(r"`[^`\n]*`", "", prose(markdown))
    yield from re.findall(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)", text)


def pages(root: Path) -> list[Path]:
    """README.md and everything in docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def _statements(block: Block) -> Iterator[Command]:
    """Lines that belong together: with open quotes, a backslash at the end, or a document behind ``<<``."""
    lines = iter(enumerate(block.text.splitlines(), start=block.line))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        text = line.removeprefix("$ ")
        while _is_open(text) and (more := next(lines, None)):
            text += f"\n{more[1]}"
        if here := _HERE.search(text):
            while not text.endswith(f"\n{here[2]}") and (more := next(lines, None)):
                text += f"\n{more[1]}"
        yield Command(number, "shell", text)


def _is_open(text: str) -> bool:
    if text.endswith("\\"):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def _begins(command: Command) -> bool:
    return command.program in PROGRAMS or (not command.program and bool(_ASSIGNED.match(command.text)))


def _words(text: str) -> list[str]:
    text = re.sub(r"\$\([^()]*\)", "…", text)  # what is run to fill in a word is no word of its own
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # not for a shell at all
        return text.split()
