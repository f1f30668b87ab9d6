"""`knnlm demo`: from text to a served datastore, and what it changes, in one command."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from knnlm_cli.default_model import DEFAULT_MODEL, default_model_folder
from knnlm_core.errors import DatastoreCorrupt, NotReady, ServiceError, UnsupportedFeature

if TYPE_CHECKING:
    from knnlm_client import Client, CompletionChoice

NAME = "demo"
PROMPT = "The with statement is used to wrap the execution of a block with methods defined by"
PROMPT_WORDS = 16  # of a held-out passage, where the corpus is the user's own
COMPLETION_TOKENS = 40
PASSAGE_CHARACTERS = 3000


class Passage(NamedTuple):
    """Text that the build has kept out of the datastore."""

    document_id: str
    text: str


def demo(
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Your own files or folders instead of the Python reference; may be repeated."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to complete.")] = None,
    folder: Annotated[Path, typer.Option(help="Where everything that the demo makes is kept.")] = Path(".demo"),
    models: Annotated[
        Path | None, typer.Option(help="Where the default model is kept; FOLDER/models if absent.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the corpus to use.")] = 60_000,
    exit_: Annotated[bool, typer.Option("--exit", help="Stop the server at the end instead of waiting.")] = False,
) -> None:
    """Build a datastore from text, serve it, and show what it changes.

    Prints one prompt completed by the base LM and by the kNN-LM, where the latter's tokens came from, and the
    perplexity of a held-out passage under both. Settings in KNNLM_* variables do not reach the demo.

    Examples:
        knnlm demo
        knnlm demo --text ./my-texts --port 8001
        knnlm demo --exit
    """
    if find_spec("knnlm_client") is None:
        raise UnsupportedFeature("the demo speaks through the Python client: pip install ./clients/python")
    from knnlm_cli import demo_server

    demo_server.check_port_is_free(host, port)
    with _terminated_in_order():
        model = default_model_folder(models or folder / "models")
        root = folder / "datastores"
        demo_server.run_knnlm(
            ["build", f"--model={model}", f"--output={root}", f"--name={NAME}", f"--max-tokens={max_tokens}"]
            # Little text: more of it than usual is needed to calibrate on.
            + ["--held-out-fraction=0.1"]
            + [f"--input={path}" for path in text or [_python_reference(folder)]]
        )
        url = _url(host, port)
        log = folder / "server.log"
        serve = [f"--model={model}", f"--served-model-name={DEFAULT_MODEL}", f"--datastores={root}", f"--load={NAME}"]
        with (
            _client(url) as client,
            demo_server.running_server([*serve, f"--host={host}", f"--port={port}"], client=client, log=log) as server,
        ):
            passage = held_out_passage(root, NAME, reported_documents(client.datastores.get(NAME).calibration))
            prompt = prompt or (first_words(passage.text, PROMPT_WORDS) if text else PROMPT)
            _show(client, prompt, passage, log)
            if not exit_:
                _wait(server, url, prompt, log)


def held_out_passage(root: Path, name: str, preferred: Collection[str] = ()) -> Passage:
    """The beginning of a document that the published version of ``name`` was built without.

    Args:    preferred: ids of documents to take, in the file's order, before any other.
    Raises:  DatastoreCorrupt: the version carries no held-out text.
    """
    import pyarrow.parquet

    from knnlm_core.datastore.layout import HELD_OUT, read_current, version_folder

    path = version_folder(root, name, read_current(root, name).version) / HELD_OUT
    if not path.is_file():
        raise DatastoreCorrupt(f"{path} is missing: nothing was held out of {name!r}")
    rows = pyarrow.parquet.read_table(path, columns=["id", "text"]).to_pylist()
    for row in sorted(rows, key=lambda row: row["id"] not in preferred):
        if beginning := first_paragraphs(row["text"], PASSAGE_CHARACTERS):
            return Passage(row["id"], beginning)
    raise DatastoreCorrupt(f"{path} holds no text: {len(rows)} documents")


def reported_documents(calibration: Mapping[str, Any] | None) -> list[str]:
    """Ids of the held-out documents that a calibration was judged on, not tuned on; none where it does not say."""
    report = (calibration or {}).get("report")
    return list(report.get("held_out_documents", ())) if isinstance(report, Mapping) else []


def first_paragraphs(text: str, limit: int) -> str:
    """As many whole paragraphs as fit in ``limit`` characters; the text's beginning where none does."""
    text = text.strip()
    if len(text) <= limit:
        return text
    end = text.rfind("\n\n", 0, limit + 2)
    return text[: end if end > 0 else limit].rstrip()


def first_words(text: str, count: int) -> str:
    """The text's first words, with single spaces between them."""
    return " ".join(text.split(maxsplit=count)[:count])


def _python_reference(folder: Path) -> Path:
    from knnlm_cli.demo_corpus import write_python_reference

    return write_python_reference(folder / "corpus" / "python-reference.jsonl")


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # "any address" is none to connect to
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _client(url: str) -> Client:
    import httpx

    from knnlm_client import Client

    return Client(url, transport=httpx.HTTPTransport())  # a transport of our own: a proxy has no part in this


def _show(client: Client, prompt: str, passage: Passage, log: Path) -> None:
    from rich.console import Console

    from knnlm_cli.demo_report import print_completions, print_perplexity, print_sources
    from knnlm_client import KnnlmClientError

    console = Console(highlight=False)
    try:
        base = _complete(client, prompt, DEFAULT_MODEL)
        mixed = _complete(client, prompt, f"{DEFAULT_MODEL}@{NAME}")
        score = client.score([passage.text], model=f"{DEFAULT_MODEL}@{NAME}")
    except KnnlmClientError as error:
        raise ServiceError(f"the server did not do what the demo asked for: {error} (its log: {log})") from error
    print_completions(console, prompt, base, mixed)
    print_sources(console, mixed.knn or [])
    print_perplexity(console, passage.document_id, score.total)


def _complete(client: Client, prompt: str, model: str) -> CompletionChoice:
    from knnlm_client import KnnOptions

    knn = KnnOptions(trace=True) if "@" in model else None  # the base LM retrieves nothing that could be traced
    answer = client.completions(prompt, model=model, max_tokens=COMPLETION_TOKENS, temperature=0.0, knn=knn)
    return answer.choices[0]


def _wait(server: subprocess.Popen[bytes], url: str, prompt: str, log: Path) -> None:
    from knnlm_cli.demo_server import ended

    body = json.dumps({"model": f"{DEFAULT_MODEL}@{NAME}", "prompt": prompt, "max_tokens": COMPLETION_TOKENS})
    quoted = body.replace("'", "'\\''")
    typer.echo(f"\nThe server listens on {url}; its log is {log}. Try:\n")
    typer.echo(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{quoted}'\n")
    if find_spec("gradio") is not None:
        typer.echo(f"or open {url}/playground in a browser: it shows where each token comes from.\n")
    typer.echo("Ctrl-C stops it.")
    try:
        server.wait()
    except KeyboardInterrupt:
        typer.echo("\nstopping the server")
        return
    raise NotReady(ended(server, log))


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Let SIGTERM end the demo as Ctrl-C does, so that it takes its server along."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
