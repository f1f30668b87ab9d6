"""The text of an HTML page as a reader sees it.

Follows the line-breaking rules of `innerText` (WHATWG HTML, "the rendered text collection steps"), without style
sheets: a paragraph is set off by a blank line, other blocks by a line break, cells of a table row by a tab.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import NamedTuple

from knnlm_builder.corpus.text import NotText
from knnlm_core.datastore.documents import normalise_newlines

_SPACE = re.compile(r"[ \t\n\f\r]+")  # HTML's white space; a no-break space is text
_DROPPED = frozenset({"script", "style", "template", "noscript", "iframe", "svg"})
_PREFORMATTED = frozenset({"pre", "listing", "textarea"})
_CELLS = frozenset({"td", "th"})
_BLOCKS = frozenset(
    {
        *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "dir"),
        *("div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"),
        *("head", "header", "hgroup", "hr", "html", "legend", "li", "listing", "main", "menu", "nav", "ol"),
        *("optgroup", "option", "p", "pre", "search", "section", "summary", "table", "tbody", "tfoot", "thead"),
        *("tr", "ul"),
    }
)


class Page(NamedTuple):
    """What a page says."""

    text: str  # no leading or trailing line break, except those of a <pre>
    title: str | None  # of its first non-empty <title>, on one line


def read_page(html: str) -> Page:
    """Extract visible text and title; script, style and other invisible elements are dropped, entities decoded.

    Broken markup is read as leniently as the standard library's parser reads it.

    Raises: NotText: markup that even the lenient parser gives up on, with its line.
    """
    parser = _PageParser()
    try:
        parser.feed(html)
        parser.close()
    except AssertionError as error:  # how html.parser reports markup that it cannot read
        raise NotText(f"broken HTML near line {parser.getpos()[0]} ({error})") from None
    # A character reference such as &#13; can bring in what the decoded file no longer had.
    return Page(normalise_newlines(parser.text), parser.title)


class _PageParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        # What separates the next word from the last one; the strongest wins: line breaks, then tabs, then a space.
        self._breaks = 0
        self._tabs = 0
        self._space = False
        self._dropped: str | None = None  # the outermost dropped element that we are in, and its nesting depth
        self._dropped_depth = 0
        self._pre_depth = 0
        self._pre_just_opened = False
        self._in_title = False
        self._title: list[str] = []
        self.title: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._out)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._pre_just_opened = False
        if self._dropped is not None:
            self._dropped_depth += tag == self._dropped
        elif tag in _DROPPED:
            self._dropped, self._dropped_depth = tag, 1
        elif tag == "title":
            self._in_title = True
        elif tag == "br":
            if self._pre_depth:
                self._write("\n")
            else:
                self._break(self._breaks + 1)
        elif tag in _CELLS:
            if self._out and not self._breaks:
                self._tabs += 1
        elif tag in _BLOCKS:
            self._break(2 if tag == "p" else 1)
        if self._dropped is None and tag in _PREFORMATTED:
            self._pre_depth += 1
            self._pre_just_opened = True

    def handle_endtag(self, tag: str) -> None:
        self._pre_just_opened = False
        if self._dropped is not None:
            self._dropped_depth -= tag == self._dropped
            if self._dropped_depth == 0:
                self._dropped = None
        elif tag == "title" and self._in_title:
            self._in_title = False
            self.title = self.title or _SPACE.sub(" ", "".join(self._title)).strip() or None
            self._title.clear()
        elif tag in _BLOCKS:
            self._break(2 if tag == "p" else 1)
        if self._dropped is None and tag in _PREFORMATTED:
            self._pre_depth = max(0, self._pre_depth - 1)

    def handle_data(self, data: str) -> None:
        if self._dropped is not None:
            return
        if self._in_title:
            self._title.append(data)
        elif self._pre_depth:
            if self._pre_just_opened:
                data = data.removeprefix("\n")  # HTML drops the line break right after <pre>
            self._pre_just_opened = False
            self._write(data)
        else:
            collapsed = _SPACE.sub(" ", data)
            self._space |= collapsed.startswith(" ")
            if words := collapsed.strip(" "):
                self._write(words)
                self._space = collapsed.endswith(" ")

    def parse_html_declaration(self, i: int) -> int:
        # `<![if …]>` and the like, which office programs write, are comments to HTML, but were an AssertionError to
        # html.parser until python/cpython#77057 was fixed.
        if self.rawdata.startswith("<![", i):
            return self.parse_bogus_comment(i)
        return super().parse_html_declaration(i)

    def _break(self, count: int) -> None:
        self._breaks = max(self._breaks, min(count, 2))
        self._tabs, self._space = 0, False

    def _write(self, text: str) -> None:
        if not text:
            return
        if self._out:
            if self._breaks:
                last = self._out[-1]
                already = len(last) - len(last.rstrip("\n"))  # a <pre> may end with line breaks of its own
                self._out.append("\n" * (self._breaks - already))
            elif self._tabs:
                self._out.append("\t" * self._tabs)
            elif self._space and not self._out[-1].endswith("\n"):
                self._out.append(" ")
        self._breaks, self._tabs, self._space = 0, 0, False
        self._out.append(text)
