"""Links lead somewhere, options exist, pages are found, and what is generated is fresh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
import yaml
from doc_exceptions import FOREIGN_OPTIONS
from doc_stage import ROOT
from markdown_commands import anchors, commands, links, pages, prose

from knnlm_cli.main import make_app
from knnlm_server.settings import ENV_PREFIX, ServerSettings

EVERYWHERE = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "clients/**/*.md", "docker/**/*.md")
    for path in ROOT.glob(pattern)
)
TEXTS = {path: path.read_text(encoding="utf-8") for path in EVERYWHERE}
PAGES = {str(path.relative_to(ROOT)): TEXTS[path] for path in pages(ROOT)}
GENERATED = ("docs/cli.md", "docs/api.md", "docs/settings.md")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]+")
_VARIABLE = re.compile(r"\bKNNLM_[A-Z_]+\b")


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(path: Path) -> None:
    assert not list(dead_links(path))


def dead_links(path: Path) -> Iterator[str]:
    for link in links(TEXTS[path]):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / unquote(file)).resolve() if file else path
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


def test_every_page_is_on_the_map_and_the_map_in_the_readme() -> None:
    documentation = ROOT / "docs"
    mapped = {(documentation / link.partition("#")[0]).resolve() for link in links(TEXTS[documentation / "README.md"])}
    assert set(documentation.glob("*.md")) - {documentation / "README.md"} <= mapped
    assert "docs/README.md" in list(links(TEXTS[ROOT / "README.md"]))


def options_of() -> dict[tuple[str, ...], set[str]]:
    """Options by the words of their command; those of `knnlm` itself hold for all."""
    root: Any = typer.main.get_command(make_app())
    found: dict[tuple[str, ...], set[str]] = {}

    def visit(words: tuple[str, ...], command: Any) -> None:
        own = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        found[words] = {name for name in own if name.startswith("-")} | {"--help", "-h"}
        for name, below in getattr(command, "commands", {}).items():
            visit((*words, name), below)

    visit((), root)
    return found


OPTIONS = options_of()
ALL_OPTIONS = {option for options in OPTIONS.values() for option in options}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_command_exists(page: str) -> None:
    text = PAGES[page]
    told = [command.text for command in commands(text) if command.program == "knnlm"]
    told += [code for code in re.findall(r"`([^`\n]+)`", prose(text)) if code.startswith("knnlm ")]
    wrong = [f"{command}: {option}" for command in told for option in unknown_options(command)]
    assert not wrong, "\n".join(wrong)


def unknown_options(command: str) -> Iterator[str]:
    """Options that the subcommand does not have, up to a pipe or the next command."""
    words = iter(shlex.split(re.split(r"[|;&]\s", command)[0], comments=True))
    for word in words:
        if word == "knnlm":
            break
    path: tuple[str, ...] = ()
    for word in words:
        if (*path, word) in OPTIONS:
            path = (*path, word)
        elif (option := _OPTION.match(word)) and option[0] not in OPTIONS[path]:
            yield word
    if not path and "--" not in command:
        yield "no such command"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_every_option_in_running_text_is_one_of_ours_or_known_to_be_foreign(page: str) -> None:
    codes = [code for code in re.findall(r"`([^`\n]+)`", prose(PAGES[page])) if not code.startswith("knnlm ")]
    ours = [
        code for code in codes if not code.startswith(("docker", "pip", "lm_eval", "guidellm", "cp ", "docker-compose"))
    ]
    named = {option for code in ours for option in _OPTION.findall(code)}
    assert named <= ALL_OPTIONS | FOREIGN_OPTIONS


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_is_one_that_is_read(page: str) -> None:
    known = {ENV_PREFIX + name.upper() for name in ServerSettings.model_fields}
    assert set(_VARIABLE.findall(PAGES[page])) <= known


def test_every_alert_is_told_what_to_do_about() -> None:
    rules = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert names
    assert {name for name in names if name not in PAGES["docs/observability.md"]} == set()


def test_every_setting_of_the_server_is_on_the_page_of_settings() -> None:
    assert {
        name for name in ServerSettings.model_fields if f"`{ENV_PREFIX}{name.upper()}`" not in PAGES["docs/settings.md"]
    } == set()


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("## POST /v1/score", "post-v1score"),
        ("## Numerics: `--dtype` and `--weights`", "numerics---dtype-and---weights"),
        ("## λ and gates", "λ-and-gates"),
        ("### [A link](there.md), and more", "a-link-and-more"),
    ],
)
def test_anchors_are_made_as_github_makes_them(heading: str, anchor: str) -> None:
    assert anchors(f"# Title\n\n{heading}\n\ntext\n") == {"title", anchor}


def test_a_dead_link_and_an_unknown_option_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n[x](#a) [y](#b) [z](none.md)\n")
    TEXTS[page] = page.read_text()
    assert list(dead_links(page)) == ["#b: no such heading", "none.md: no such file"]
    del TEXTS[page]
    assert list(unknown_options("knnlm serve --model M --no-such 3")) == ["--no-such"]
    assert list(unknown_options("knnlm datastore prune x --keep 3")) == []
