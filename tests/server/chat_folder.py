"""A tiny chat model: the tiny LM with a chat template, and with an end of turn beside its EOS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# Takes one system message at most, names, and a variable `opening`.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}{{ raise_exception('only one system message') }}{% endif %}"
    "[{{ message.role }}{% if message.name is defined %} {{ message.name }}{% endif %}]"
    "{{ message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' + (opening | default('')) }}{% endif %}"
)
END_OF_TURN = 7


def with_template(model: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of the model that takes conversations; of the same name and the same fingerprints."""
    copy = Path(shutil.copytree(model, folder / model.name))
    (copy / "chat_template.jinja").write_text(template)
    config = copy / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [0, END_OF_TURN]}))
    return copy
