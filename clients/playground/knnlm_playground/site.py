"""The page as an ASGI application of its own."""

from __future__ import annotations

from importlib.resources import files

import gradio as gr
from fastapi import FastAPI

from knnlm_playground.page import build_page
from knnlm_playground.server import Server

_SYSTEM = ("system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")


def build_site(server: Server) -> FastAPI:
    """Gradio's application, without whatever would call out, record or collect; run its lifespan."""
    site = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        site,
        build_page(server),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        # Fonts given by name are the visitor's own; others would be fetched from elsewhere.
        theme=_theme(),
        head=_head(),
    )
    return site


def _head() -> str:
    # Gradio rewrites the selectors of what it gets as `css`, and loses rules for narrow windows.
    return f"<style>{files('knnlm_playground').joinpath('assets/page.css').read_text(encoding='utf-8')}</style>"


def _theme() -> gr.themes.Base:
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=_SYSTEM, font_mono=_MONO)
    # White words on the hue's own 500 are hard to read.
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_large_text_size="*text_md",
    )
