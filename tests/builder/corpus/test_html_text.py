"""What a page says, as a reader sees it."""

from __future__ import annotations

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_builder.corpus.html_text import read_page

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")
WORD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ("  one \n\t two  ", "one two"),
        ("a<b>b</b> <i>c</i>d", "ab cd"),
        ("<p>one<p>two", "one\n\ntwo"),
        ("<p>one</p>\n\n<p>two</p>", "one\n\ntwo"),
        ("<div>one</div><div><div>two</div></div>", "one\ntwo"),
        ("<h1>Head</h1>text", "Head\ntext"),
        ("<ul><li>a</li><li>b</ul>c", "a\nb\nc"),
        ("a<br>b<br/><br>c<br><br><br><br>d<br>", "a\nb\n\nc\n\nd"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td></td><td>3</td></tr></table>", "a\tb\n1\t\t3"),
        ("x<script>if (a < b) '<p>no</p>'</script>y<style>p {}</style>z", "xyz"),
        ("x<template><p>no</p></template><noscript>no</noscript><svg><title>no</title></svg>y", "xy"),
        ("x<svg><svg>no</svg>no</svg>y", "xy"),
        ("x<svg/>y", "xy"),
        ("&lt;b&gt; &amp;amp; &eacute;&#233;&#xe9; &copy &unknown; a&nbsp;b", "<b> &amp; ééé © &unknown; a\xa0b"),
        ("a<!-- no --><!doctype html><?php no ?>b", "ab"),
        ("a<![if !supportLists]>b<![endif]>c<![what[is]]>d", "abcd"),
        ("1 < 2 and 3 > 2 & so on", "1 < 2 and 3 > 2 & so on"),
        ("</p></pre></svg></title>still\n here", "still here"),
        ("a<pre>\n  x\n\ty  z\n</pre>b", "a\n  x\n\ty  z\nb"),
        ("<pre>\n\nx</pre>", "\nx"),
        ("<pre><code>\nx</code></pre>", "\nx"),
        ("<pre>a\n<br>b<span>  c</span></pre> d  e", "a\n\nb  c\nd e"),
        ("<pre>a&#13;b&#13;\nc</pre>", "a\nb\nc"),
        ("a <pre>b</pre>", "a\nb"),
        ("<textarea>\na  b\n</textarea> c", "a  b\nc"),
        ("a <img src=x> <wbr> b", "a b"),
    ],
)
def test_markup_gives_text(markup: str, text: str) -> None:
    assert read_page(markup).text == text


@pytest.mark.parametrize(
    ("markup", "title"),
    [
        ("<p>none", None),
        ("<title> \n </title>", None),
        ("<title>\n One &amp; <b>two</b>\n </title>", "One & two"),
        ("<title></title><title>second</title><title>third</title>", "second"),
        ("<svg><title>drawing</title></svg><title>page</title>", "page"),
    ],
)
def test_the_title_is_taken_from_the_first_title_that_says_something(markup: str, title: str | None) -> None:
    page = read_page(markup)
    assert page.title == title
    assert title is None or title not in page.text


@given(st.lists(st.lists(WORD, min_size=1, max_size=5), max_size=5), st.sampled_from([" ", "\n", " \t\r\n ", " <b> "]))
def test_paragraphs_of_words_come_back(paragraphs: list[list[str]], gap: str) -> None:
    markup = "\n".join("<p>" + gap.join(html.escape(word) for word in words) + "</p>" for words in paragraphs)
    assert read_page(markup).text == "\n\n".join(" ".join(words) for words in paragraphs)


@given(st.text(CHARACTERS))
def test_preformatted_text_comes_back_character_by_character(text: str) -> None:
    assert read_page("<pre>\n" + html.escape(text) + "</pre>").text == text


FRAGMENTS = [
    *("<p>", "</p>", "<pre>", "</pre>", "<td>", "<br>", "<title>", "</title>", "<svg>", "</svg>", "<script>"),
    *("</script>", "<!--", "-->", "<![", "<!", "<?", "]]>", "&#", "&amp", "<a b='", "</", ">", "\n", " ", "x", "\r"),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
def test_no_markup_is_too_broken_to_read(markup: str) -> None:
    page = read_page(markup)
    assert "\r" not in page.text
    assert page.title is None or page.title.strip() == page.title != ""


@given(st.lists(st.sampled_from([f for f in FRAGMENTS if f not in ("<pre>", "\r")] + ["y"]), max_size=30).map("".join))
def test_outside_preformatted_text_there_is_never_more_than_one_blank_line_or_space(markup: str) -> None:
    text = read_page(markup).text
    assert "\n\n\n" not in text
    assert "  " not in text
    assert text == text.strip("\n ")
