"""What the page shows is escaped, coloured by what happened, and cut where the tokens are."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from knnlm_client import CompletionChoice, Datastore, DatastoreList, Neighbor, ScoredToken, TraceEntry
from knnlm_client import errors as client_errors
from knnlm_playground.advice import Trouble, trouble_of
from knnlm_playground.rendering import parts
from knnlm_playground.rendering.calibration import read_calibration
from knnlm_playground.rendering.charts import render_chart
from knnlm_playground.rendering.completion import render_generation
from knnlm_playground.rendering.datastores import gates_chart, render_details, render_list
from knnlm_playground.rendering.provenance import render_provenance
from knnlm_playground.rendering.tokens import render_tokens, shown_generated, shown_scored
from knnlm_playground.sources import Excerpt, excerpt
from knnlm_playground.tokens import Generated, Generation, pieces

HOSTILE = """<img src=x onerror="alert(1)"></span></div><script>alert(2)</script>{{value}}${value}'&amp;"""
ALLOWED = {
    "a", "b", "blockquote", "br", "circle", "code", "dd", "details", "div", "dl", "dt", "figcaption", "figure", "g",
    "h2", "h3", "h4", "header", "i", "li", "line", "mark", "ol", "p", "polyline", "progress", "section", "span", "svg",
    "table", "tbody", "td", "text", "th", "thead", "title", "tr", "ul",
}  # fmt: skip


class Seen(HTMLParser):
    """The elements, attributes and text of a page's part."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(str(markup))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(markup: str) -> Seen:
    """No element and no attribute comes from what was shown."""
    seen = Seen(markup)
    assert set(seen.elements) <= ALLOWED
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "src"]
    return seen


def traced(**changes: Any) -> TraceEntry:
    entry = {
        "token_id": 1, "token": "x", "searched": True, "decision": "always", "lambda": 0.25, "p_lm": 0.1, "p_knn": 0.5,
        "p": 0.2,
    }  # fmt: skip
    return TraceEntry.model_validate({**entry, **changes})


def neighbor(**changes: Any) -> dict[str, Any]:
    found = {
        "datastore": "law", "entry_id": 7, "distance": 2.5, "weight": 0.75, "token": "x", "document_id": "a",
        "char_start": 4, "char_end": 5,
    }  # fmt: skip
    return {**found, **changes}


def test_hostile_tokens_prompts_and_names_stay_text() -> None:
    shown = shown_generated([Generated(HOSTILE, traced(token=HOSTILE)), Generated("", traced(token=HOSTILE))])
    seen = assert_harmless(render_tokens(shown, before=HOSTILE, after=HOSTILE))
    assert seen.text == HOSTILE * 4


def test_hostile_documents_stay_text() -> None:
    one = neighbor(token=HOSTILE, document_id=HOSTILE, title=HOSTILE, licence=HOSTILE, uri=HOSTILE, datastore=HOSTILE)
    trace = traced(
        token=HOSTILE,
        decision=HOSTILE,
        neighbors=[one],
        datastores=[{"name": HOSTILE, "weight": 1, "lambda": 0, "p_knn": 0}],
    )
    seen = assert_harmless(render_provenance(HOSTILE, trace, [Excerpt(HOSTILE, HOSTILE, HOSTILE)]))
    assert seen.text.count("<script>") >= 8


def test_hostile_errors_stay_text() -> None:
    assert_harmless(parts.trouble(Trouble(HOSTILE, HOSTILE)) + parts.done(HOSTILE) + parts.progress(HOSTILE, 0.5))


@given(st.text())
def test_every_text_comes_out_as_it_went_in(text: str) -> None:
    # The parser makes U+0000 and carriage returns something else, as browsers do.
    shown = shown_generated([Generated(text, traced())]) if text else []
    assert re.sub("[\0\r]", "", Seen(render_tokens(shown)).text) == re.sub("[\0\r]", "", text)


@pytest.mark.parametrize(
    "uri", ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "//x", "http://[", ""]
)
def test_only_addresses_in_the_web_are_links(uri: str) -> None:
    seen = assert_harmless(parts.link(uri))
    assert "a" not in seen.elements
    assert seen.text == uri


def test_a_link_tells_the_other_site_nothing() -> None:
    seen = assert_harmless(parts.link("https://example.org/?a=1&b='2'"))
    assert dict(seen.attributes)["rel"] == "noopener noreferrer nofollow"
    assert dict(seen.attributes)["href"] == "https://example.org/?a=1&b='2'"


@given(st.text(max_size=40), st.lists(st.integers(0, 40), max_size=12))
def test_pieces_are_the_text_from_the_first_token_on(text: str, given_offsets: list[int]) -> None:
    offsets = sorted(min(offset, len(text)) for offset in given_offsets)
    cut = pieces(text, offsets)
    assert len(cut) == len(offsets)
    assert "".join(cut) == (text[offsets[0] :] if offsets else "")


def test_a_character_of_several_tokens_stands_at_the_last_of_them() -> None:
    # Four bytes, a token each: the text comes with the last.
    growing = Generation()
    for text, token, offset in (
        ("a", "a", 0),
        ("", "\ufffd", 1),
        ("", "\ufffd", 1),
        ("", "\ufffd", 1),
        ("🙂", "\ufffd", 1),
    ):
        growing.add(choice(text, [token], [offset]))
    growing.add(choice("b", ["b"], [2]))
    assert [token.text for token in growing.tokens()] == ["a", "", "", "", "🙂", "b"]
    assert Seen(render_generation(growing, "")).text.startswith("a···🙂b6 tokens")


def choice(text: str, tokens: list[str], offsets: list[int], reason: str | None = None) -> CompletionChoice:
    log_probs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens), "text_offset": offsets}
    traces = [traced(token=token).model_dump(by_alias=True) for token in tokens]
    given_choice = {"index": 0, "text": text, "logprobs": log_probs, "knn": traces, "finish_reason": reason}
    return CompletionChoice.model_validate(given_choice)


def test_colours_follow_what_happened() -> None:
    tokens = [
        traced(p=0.3, p_lm=0.1, **{"lambda": 0.5}),
        traced(p=0.1, p_lm=0.9, searched=False, followed=True),
        traced(p=0.4, p_lm=0.4, searched=False, **{"lambda": 0.0}),
    ]
    spans = re.findall(
        r'class="([^"]+)"[^>]*style="([^"]+)"', render_tokens(shown_generated(Generated("t", t) for t in tokens))
    )
    assert spans == [
        ("knnlm-token searched gain", "--lambda:0.500;--gain:0.400"),
        ("knnlm-token followed loss", "--lambda:0.250;--gain:1.000"),
        ("knnlm-token skipped gain", "--lambda:0.000;--gain:0.000"),
    ]


def test_a_scored_text_shows_its_characters_and_what_is_not_scored() -> None:
    tokens = [scored("a", 1, -2.0, -1.0), scored("\ufffd", 2, -2.0, -3.0), scored("\ufffd", 2, -2.0, -3.0)]
    markup = render_tokens(shown_scored("xaé", tokens), before="x")
    assert Seen(markup).text == "xa·é"
    assert [kind for _, kind in re.findall(r"knnlm-token (\w+) (\w+)", markup)] == ["gain", "loss", "loss"]


def test_tokens_scored_by_ids_are_called_by_their_names() -> None:
    assert [shown.text for shown in shown_scored("", [scored("a", None, -2.0, -1.0)])] == ["a"]


def scored(token: str, offset: int | None, base: float, mixed: float) -> ScoredToken:
    return ScoredToken.model_validate(
        {"id": 1, "token": token, "offset": offset, "base": base, "mixed": mixed, "lambda": 0.5, "decision": "always"}
    )


def test_one_token_is_in_the_order_of_tabs_and_all_are_buttons() -> None:
    shown = shown_generated([Generated("a", traced()), Generated("b", traced())])
    assert re.findall(r'data-token="(\d)" role="button" tabindex="(-?\d)"', render_tokens(shown)) == [
        ("0", "0"),
        ("1", "-1"),
    ]


@pytest.mark.parametrize(
    ("value", "words"), [(None, "–"), (0.0, "0.0 %"), (0.0001, "< 0.1 %"), (0.5, "50.0 %"), (1.0, "100.0 %")]
)
def test_probabilities_in_words(value: float | None, words: str) -> None:
    assert parts.probability(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (float("inf"), "∞"),
        (-0.25, "−0.25"),
        (1234.5, "1234"),
        (-12345.6, "−12,346"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_in_words(value: float | None, words: str) -> None:
    assert parts.number(value, 4) == words


# -- sources -----------------------------------------------------------------------------------------------------------


def passage(**changes: Any) -> Neighbor:
    found = {"token_id": 1, "before": "The ", "text": "x", "after": " and more", **neighbor(), **changes}
    return Neighbor.model_validate(found)


def test_an_excerpt_is_cut_from_whatever_passage_holds_it() -> None:
    trace = traced(neighbors=[neighbor(char_start=6, char_end=9)])
    (one,) = trace.neighbors
    assert excerpt(one, [passage()]) == Excerpt("The x ", "and", " more")
    # Of another document, of another datastore, too far away, or without text.
    for other in (
        passage(document_id="b"), passage(datastore="news"), passage(char_start=40), passage(text=None),
        passage(after=" an"),
    ):  # fmt: skip
        assert excerpt(one, [other]) is None
        assert excerpt(one, [other, passage()]) is not None


def test_a_neighbor_without_text_says_so() -> None:
    trace = traced(neighbors=[neighbor(licence=None), neighbor(document_id=None)])
    text = assert_harmless(render_provenance("x", trace, [None, None])).text
    assert "Its text is not among what a search finds now." in text
    assert "no licence given" in text
    assert "entry 7, of no known document" in text


def test_a_token_that_nothing_was_retrieved_for_says_so() -> None:
    text = Seen(render_provenance("x", traced(searched=False, decision="never"), [])).text
    assert "the language model alone" in text
    assert "No neighbours" in text


# -- datastores --------------------------------------------------------------------------------------------------------


def card(**changes: Any) -> Datastore:
    report = {
        "tokens": 100, "base": {"perplexity": 20.0}, "mixed": {"perplexity": 16.0}, "nprobe": 64,
        "gates": [
            {"gate": "always", "threshold": None, "perplexity": 16.0, "searched": 1.0, "followed": 0.0},
            {"gate": "learned", "threshold": 0.1, "perplexity": 17.0, "searched": 0.4, "followed": 0.6},
            {"gate": "learned", "threshold": 0.2, "perplexity": 18.0, "searched": 0.1, "followed": 0.9},
        ],
    }  # fmt: skip
    calibration = {
        "id": "c" * 16, "k": 32, "temperature": 8.0, "lambda": 0.3, "lambda_mode": "fixed", "gate": "learned",
        "gate_threshold": 0.1, "helps": True, "report": report,
    }  # fmt: skip
    given_card = {
        "object": "datastore", "name": "law", "version": "a" * 16, "generation": 2, "revision": 1, "state": "ready",
        "entries": 1000, "bytes": 2048, "unit": "token", "documents": 6, "learned_documents": 1, "deleted_documents": 0,
        "leases": 0, "aliases": [], "follows_current": True, "previous": None,
        "self_test": {"queries": 8, "recall_at_32": 0.97, "needed": 0.95}, "calibration": calibration,
        "model_fingerprint": "f",
    }  # fmt: skip
    return Datastore.model_validate({**given_card, **changes})


def listed(*stores: Datastore, published: tuple[str, ...] = ()) -> DatastoreList:
    return DatastoreList(stores, published, {}, "law", 0, None, True)


def test_the_list_tells_what_is_loaded_and_what_could_be() -> None:
    text = assert_harmless(render_list(listed(card(aliases=[HOSTILE]), published=("news", HOSTILE)))).text
    assert "law (default)" in text
    assert "2.1" in text
    assert "6 (1 learned)" in text
    assert "not loaded: news" in text
    assert "Build one" in Seen(render_list(listed())).text


def test_the_curve_is_perplexity_against_searches_saved() -> None:
    calibration = read_calibration(card().calibration)
    assert calibration is not None
    chart = gates_chart(calibration)
    assert chart.levels == {"language model alone": 20.0, "every search": 16.0}
    assert [(round(x), y) for x, y, _ in chart.series["learned"]] == [(60, 17.0), (90, 18.0)]
    markup = render_chart(chart)
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', markup)]
    assert heights[0] > heights[1]  # down the page is a lower perplexity
    assert_harmless(markup)


def test_details_tell_calibration_and_index() -> None:
    text = assert_harmless(render_details(card())).text
    for words in ("0.3, fixed", "learned at 0.1", "20 → 16 (−20.0 %)", "0.970, at least 0.950 needed", "64"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": None}, "requests must say k, τ and λ themselves"),
        ({"calibration": {"k": HOSTILE}}, "in a way that this page does not know"),
        ({"self_test": None, "calibration": None}, "keeps no queries"),
    ],
)
def test_what_a_datastore_lacks_is_said(changes: dict[str, Any], words: str) -> None:
    assert words in assert_harmless(render_details(card(**changes))).text


# -- errors ------------------------------------------------------------------------------------------------------------


def test_every_error_of_the_client_comes_with_advice() -> None:
    info = client_errors.ErrorInfo("what is wrong", 400, retry_after_s=3.0)
    for cls in {*client_errors.CLASS_BY_CODE.values(), *client_errors.CLASS_BY_STATUS.values()}:
        told = trouble_of(cls(info))
        assert told.message.startswith("what is wrong")
        assert told.advice
    assert trouble_of(client_errors.Overloaded(info)).advice == "Try again in 3 s."
    assert "address" in trouble_of(client_errors.ConnectionFailed("refused")).advice
    assert "Keys" in trouble_of(client_errors.Unauthorized(info)).advice


def test_markup_is_never_made_from_a_plain_text() -> None:
    assert isinstance(parts.empty("x") + HOSTILE, Markup)
    assert "<script>" not in parts.empty("x") + HOSTILE
