"""The page in a real browser, against a real server: what people see, click and type."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import wait_until
from playground_stores import CONTINUED, PROMPT, Stores
from playwright.sync_api import Browser, Dialog, Locator, Page, Playwright, Request, expect, sync_playwright
from server_process import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_MS = 60_000
PHONE = {"width": 390, "height": 844}
HOSTILE = """<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>{{value}}${window.pwned=1}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Visit:
    """A visitor's page. It must load nothing from elsewhere, report no error and open no dialogue."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", self._requested)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", self._dialogue)
        page.goto(f"{url}/playground")
        expect(page.locator("#knnlm-header")).to_contain_text(re.compile("1 datastore|“Keys”"))

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)

    def _dialogue(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialogue: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        outside = [url for url in self.requests if not url.startswith((f"{self.url}/", "data:", "blob:"))]
        assert outside == []
        assert self.complaints == []
        assert self.page.evaluate("window.pwned") is None

    # -- what visitors do ----------------------------------------------------------------------------------------------

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def complete(self, prompt: str) -> None:
        """Have a prompt completed to the end."""
        self.page.locator("#knnlm-prompt textarea").fill(prompt)
        # What stands there from the last time must not be taken for what is to come.
        self.page.evaluate("document.querySelectorAll('.knnlm-note').forEach((note) => note.replaceChildren())")
        self.page.locator("#knnlm-complete").click()
        expect(self.base).to_contain_text("it reached the most tokens allowed")
        expect(self.mixed).to_contain_text("it reached the most tokens allowed")

    def choose_store_version(self, version: str) -> None:
        self.page.locator("#knnlm-version input").click()
        self.page.get_by_role("option", name=re.compile(version)).click()

    def learn(self, document_id: str, text: str, **more: str) -> None:
        form = self.page.locator("#knnlm-add")
        if not form.get_by_role("textbox").first.is_visible():
            form.get_by_text("Add a document").click()
        for label, value in {"Id": document_id, "Document's text": text, **more}.items():
            form.get_by_role("textbox", name=label, exact=True).fill(value)
        self.page.locator("#knnlm-learn").click()

    def forget(self, document_id: str) -> None:
        form = self.page.locator("#knnlm-delete")
        if not form.get_by_role("textbox").is_visible():
            form.get_by_text("Delete a document").click()
        form.get_by_role("textbox").fill(document_id)
        self.page.locator("#knnlm-forget").click()

    # -- what they see -------------------------------------------------------------------------------------------------

    @property
    def mixed(self) -> Locator:
        return self.page.locator("#knnlm-mixed")

    @property
    def base(self) -> Locator:
        return self.page.locator("#knnlm-base")

    @property
    def panel(self) -> Locator:
        return self.page.locator("#knnlm-panel")

    @property
    def status(self) -> Locator:
        return self.page.locator("#knnlm-store-status")

    def token(self, index: int) -> Locator:
        return self.mixed.locator("[data-token]").nth(index)

    def completion(self) -> str:
        """The text; a dot stands for each token that only holds a part of a character."""
        return self.mixed.locator(".knnlm-text").inner_text().replace("·", "")

    def is_too_wide(self) -> bool:
        # The page hides what is too wide from scrolling, so every element is asked.
        return bool(
            self.page.evaluate(
                """() => [...document.querySelectorAll(".gradio-container *")].some((element) =>
                     element.checkVisibility() && !element.closest(".knnlm-wide, .visually-hidden")
                     && element.getBoundingClientRect().right > window.innerWidth + 1)
                   || document.documentElement.scrollWidth > window.innerWidth"""
            )
        )


@pytest.fixture(scope="module")
def _playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def _browser(_playwright: Playwright) -> Iterator[Browser]:
    browser = _playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that anybody may use, and change."""
    folder = tmp_path_factory.mktemp("served")
    root = shutil.copytree(stores.root, folder / "datastores")
    with ServerProcess(folder / "log", "--model", str(stores.model), "--datastores", str(root)) as running:
        yield running


@pytest.fixture
def visit(_browser: Browser, server: ServerProcess) -> Iterator[Callable[..., Visit]]:
    """Opens the page for one more visitor, who shares nothing with the others."""
    visits = []
    contexts = []

    def begin(url: str = server.url, **options: Any) -> Visit:
        context = _browser.new_context(**options)
        contexts.append(context)
        visits.append(Visit(context.new_page(), url))
        return visits[-1]

    yield begin
    for one in visits:
        one.check()
    for context in contexts:
        context.close()


def test_a_chosen_token_tells_its_source(visit: Callable[..., Visit]) -> None:
    page = visit()
    expect(page.mixed).to_contain_text("Write a prompt")
    page.complete(PROMPT)
    assert page.completion().startswith(PROMPT + CONTINUED)  # characters of several tokens are whole
    assert CONTINUED not in page.base.inner_text()
    emoji = page.mixed.locator("[data-token]", has_text="🙂")
    emoji.click()
    source = page.panel.locator("li").first
    expect(source).to_contain_text("valves/zx-80")
    expect(source).to_contain_text("Ventile & Dichtungen")
    expect(source).to_contain_text("CC-BY-4.0")
    expect(source.locator("mark")).to_have_text("🙂")
    expect(source.locator("blockquote")).to_contain_text("öffnet bei 3,2 bar 🙂 und schließt")
    expect(source.get_by_role("link")).to_have_attribute("href", "https://example.org/zx-80")
    expect(page.panel).to_contain_text("searched: the neighbours are the nearest entries")


def test_tokens_are_reached_and_chosen_by_keyboard(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.page.locator("#knnlm-prompt textarea").fill(PROMPT)
    page.page.keyboard.press("Shift+Enter")
    expect(page.mixed).to_contain_text("it reached the most tokens allowed")
    page.page.locator("#knnlm-colour-gain").focus()
    page.page.keyboard.press("Tab")
    expect(page.token(0)).to_be_focused()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowRight")
    expect(page.token(2)).to_be_focused()
    page.page.keyboard.press("Enter")
    expect(page.token(2)).to_have_attribute("aria-pressed", "true")
    expect(page.panel.locator("h3")).to_be_visible()


def test_colours_are_the_visitors_choice(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.complete(PROMPT)

    def colour() -> str:
        return str(page.token(3).evaluate("token => getComputedStyle(token).backgroundColor"))

    seen = set()
    for name in ("gain", "lambda", "gate"):
        page.page.locator(f"#knnlm-colour-{name}").check()
        seen.add(colour())
        assert page.page.locator(".knnlm-colours .knnlm-scale:visible").count() == 1
    assert len(seen) == 3


def test_a_datastore_is_swapped_and_rolled_back(visit: Callable[..., Visit], stores: Stores) -> None:
    page = visit()
    page.tab("Datastores")
    expect(page.page.locator("#knnlm-stores")).to_contain_text(stores.new)
    expect(page.page.locator("#knnlm-details svg")).to_be_visible()
    page.choose_store_version(stores.old)
    page.page.locator("#knnlm-load").click()
    expect(page.status).to_contain_text(f"manuals serves version {stores.old}")
    expect(page.page.locator("#knnlm-stores")).to_contain_text(stores.old)
    page.page.locator("#knnlm-rollback").click()
    expect(page.status).to_contain_text(f"manuals serves version {stores.new} again")
    expect(page.page.locator("#knnlm-stores")).to_contain_text(stores.new)


def test_a_fact_is_learned_seen_and_forgotten(visit: Callable[..., Visit]) -> None:
    page = visit()
    fact = "Fact: the pump of model Q7 turns counter-clockwise."
    page.tab("Datastores")
    page.learn("facts/q7", fact, Licence="CC0-1.0")
    expect(page.status).to_contain_text("manuals knows facts/q7")
    expect(page.page.locator("#knnlm-stores")).to_contain_text("7 (1 learned)")
    page.tab("Complete")
    page.complete("Fact: the pump of model Q7")
    assert page.completion().startswith(fact)
    page.token(2).click()
    expect(page.panel.locator("li").first).to_contain_text("facts/q7")
    expect(page.panel.locator("li").first).to_contain_text("CC0-1.0")
    page.tab("Datastores")
    page.forget("facts/q7")
    expect(page.status).to_contain_text("facts/q7 is deleted")
    page.forget("facts/q7")  # an error, with what to do
    expect(page.status).to_contain_text("It may have been deleted already.")
    page.tab("Complete")
    page.complete("Fact: the pump of model Q7")
    assert fact not in page.completion()


def test_a_text_is_scored(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.tab("Score")
    page.page.locator("#knnlm-score-text textarea").fill(PROMPT + CONTINUED)
    page.page.locator("#knnlm-score").click()
    totals, heat = page.page.locator("#knnlm-totals"), page.page.locator("#knnlm-heat")
    expect(totals.locator("tbody tr")).to_have_count(2)
    assert heat.locator(".knnlm-text").inner_text().replace("·", "") == PROMPT + CONTINUED
    base, mixed = (
        float(row.locator("td").first.inner_text().replace(",", "")) for row in totals.locator("tbody tr").all()
    )
    assert mixed < base / 10
    heat.locator(".gain").last.click()
    expect(page.page.locator("#knnlm-score-panel")).to_contain_text("log p, mixed")


def test_hostile_documents_are_text(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.tab("Datastores")
    page.learn(HOSTILE, f"Attack plan: {HOSTILE}", Title=HOSTILE, Licence=HOSTILE, Address="javascript:window.pwned=1")
    expect(page.status).to_contain_text(HOSTILE)
    page.tab("Complete")
    page.complete("Attack plan: <img")
    assert "onerror" in page.completion()
    page.token(1).click()
    expect(page.panel.locator("li").first).to_contain_text(HOSTILE)
    assert page.panel.locator("img, script, a").count() == 0
    page.tab("Datastores")
    page.forget(HOSTILE)
    expect(page.status).to_contain_text("is deleted from manuals")


def test_a_phone_shows_everything_without_scrolling_sideways(visit: Callable[..., Visit]) -> None:
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    page.complete(PROMPT)
    page.token(2).tap()
    expect(page.panel.locator("li").first).to_be_visible()
    assert not page.is_too_wide()
    page.page.get_by_text("Sampling and retrieval").tap()
    expect(page.page.get_by_label("Gate threshold").first).to_be_visible()
    assert not page.is_too_wide()
    page.tab("Score")
    page.page.locator("#knnlm-score-text textarea").fill(PROMPT)
    page.page.locator("#knnlm-score").click()
    expect(page.page.locator("#knnlm-totals tbody")).to_be_visible()
    assert not page.is_too_wide()
    page.tab("Datastores")
    expect(page.page.locator("#knnlm-details svg")).to_be_visible()
    assert not page.is_too_wide()


def test_dark_windows_get_a_dark_page(visit: Callable[..., Visit]) -> None:
    page = visit(color_scheme="dark")
    page.complete(PROMPT)

    def brightness(selector: str, field: str) -> float:
        colour = page.page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{field}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3 / 255

    assert brightness("body", "backgroundColor") < 0.2
    assert brightness(".knnlm-column", "backgroundColor") < 0.25
    assert brightness("#knnlm-mixed .knnlm-token", "color") > 0.8


def test_visitors_do_not_see_each_other(visit: Callable[..., Visit]) -> None:
    first, second = visit(), visit()
    first.complete(PROMPT)
    first.token(1).click()
    expect(first.panel.locator("h3")).to_be_visible()
    expect(second.mixed).to_contain_text("Write a prompt")
    expect(second.panel).to_contain_text("Choose a token")


def test_stop_ends_the_work_of_the_server(
    visit: Callable[..., Visit], stores: Stores, root: Path, tmp_path: Path
) -> None:
    options = ("--model", str(stores.model), "--datastores", str(root))
    with ServerProcess(tmp_path / "log", *options, slowed=True) as server:
        _stop(visit(server.url), server)


def _stop(page: Visit, server: ServerProcess) -> None:
    page.page.get_by_text("Sampling and retrieval").click()
    page.page.get_by_label("number input for Most tokens").fill("1024")
    page.page.locator("#knnlm-prompt textarea").fill(PROMPT)
    page.page.locator("#knnlm-complete").click()
    expect(page.token(1)).to_be_visible()
    assert not server.is_idle()
    page.page.locator("#knnlm-stop").click()
    expect(page.mixed).to_contain_text("stopped")
    wait_until(server.is_idle)
    shown = page.mixed.locator("[data-token]").count()
    assert shown < 1024
    expect(page.page.locator("#knnlm-complete")).to_be_enabled()


def test_keys_are_asked_for_used_and_told_to_nobody(
    visit: Callable[..., Visit], stores: Stores, root: Path, tmp_path: Path
) -> None:
    keys = ("--api-key", "the-api-key", "--admin-key", "the-admin-key")
    with ServerProcess(tmp_path / "log", "--model", str(stores.model), "--datastores", str(root), *keys) as server:
        _use_keys(visit, server)


def _use_keys(visit: Callable[..., Visit], server: ServerProcess) -> None:
    page = visit(server.url)
    expect(page.page.locator("#knnlm-header")).to_contain_text("Enter the server's API key under “Keys”")
    page.tab("Keys")
    page.page.get_by_label("API key").fill("the-api-key")
    page.page.get_by_role("button", name="Apply").click()
    expect(page.page.locator("#knnlm-header")).to_contain_text("tiny-lm with 1 datastore")
    page.tab("Complete")
    page.complete(PROMPT)
    page.tab("Datastores")
    page.page.locator("#knnlm-rollback").click()
    expect(page.status).to_contain_text("Enter the admin key under “Keys”")
    page.tab("Keys")
    page.page.get_by_label("Admin key").fill("the-admin-key")
    page.page.get_by_role("button", name="Apply").click()
    page.tab("Datastores")
    page.learn("x", "A document.")
    expect(page.status).to_contain_text("manuals knows x")
    told = "\n".join([*page.requests, server.log])
    assert "the-api-key" not in told
    assert "the-admin-key" not in told
    other = visit(server.url)
    expect(other.page.locator("#knnlm-header")).to_contain_text("Enter the server's API key")
