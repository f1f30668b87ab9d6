"""A completion as it grows."""

from __future__ import annotations

from markupsafe import Markup

from knnlm_playground.advice import trouble_of
from knnlm_playground.rendering.parts import NOTHING, empty, trouble
from knnlm_playground.rendering.tokens import render_tokens, shown_generated
from knnlm_playground.tokens import Generation

_ENDS = {"length": "it reached the most tokens allowed", "stop": "it came to an end"}


def render_generation(generation: Generation, prompt: str, *, is_running: bool = False) -> Markup:
    """The prompt's end, the tokens so far, and how it stands."""
    tokens = generation.tokens()
    error = trouble(trouble_of(generation.error)) if generation.error is not None else NOTHING
    if not tokens and not is_running:
        return error or empty("Nothing was generated.")
    text = render_tokens(shown_generated(tokens), before=prompt, after=" …" if is_running else "")
    return Markup('{}<p class="knnlm-note">{}</p>{}').format(text, _note(generation, is_running), error)


def _note(generation: Generation, is_running: bool) -> str:
    traces = generation.traces
    counts = {
        "searched": sum(trace.searched for trace in traces),
        "followed": sum(trace.followed for trace in traces),
    }
    parts = [f"{len(traces)} token{'s' if len(traces) != 1 else ''}"]
    parts += [f"{count} {how}" for how, count in counts.items() if count]
    if is_running:
        parts.append("running")
    elif generation.finish_reason is not None:
        parts.append(_ENDS.get(generation.finish_reason, generation.finish_reason))
    elif generation.error is None:
        parts.append("stopped")
    return " · ".join(parts)
