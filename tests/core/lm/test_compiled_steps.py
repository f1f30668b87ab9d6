"""Compiled steps: the rows and keys of the passes that they replace, in any slot at any length, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knnlm_core.errors import InvalidParameter, ModelLoadError, UnsupportedModel
from knnlm_core.lm import compiled
from knnlm_core.lm.compiled import CompileOptions, StepShape, parse_shapes
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.llamacpp_loading import load_llamacpp
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import Rows, Span
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import VOCAB, save_tiny, tiny_model, tiny_tokenizer

CAPACITY, SLOTS = 256, 4
TOLERANCE = 1e-5  # hidden states and keys of the tiny models are of the order of one
SHAPES = {"llama": ("1x1", "2x4"), "gpt2": ("1x1",), "qwen2-sliding": ("1x1",)}  # the last: two kinds of masks

pytestmark = pytest.mark.timeout(900)  # a compiler on a machine that is shared

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler is installed"
)
every_family = pytest.mark.parametrize("family", SHAPES, scope="module")


def make(family: str, options: CompileOptions | None = None, **changes: Any) -> HuggingFaceLM:
    settings = {"max_sequences": SLOTS, "compile_steps": options, **changes}
    return HuggingFaceLM(tiny_model(family), Tokenizer(tiny_tokenizer()), name=family, **settings)


class Pair:
    """The same model twice, with steps compiled and without."""

    def __init__(self, family: str, folder: Path) -> None:
        self.told: list[str] = []
        self.fast = make(family, CompileOptions(parse_shapes(SHAPES[family]), folder, self.told.append))
        self.slow = make(family)

    def prefill(self, lengths: list[int]) -> None:
        """Sequences of so many tokens in both."""
        for lm in (self.fast, self.slow):
            for slot in list(lm._sequences._lengths):
                lm.free(slot)
            for slot, length in enumerate(lengths):
                assert lm.allocate() == slot
                if length:
                    lm.forward([Span(slot, text(slot, length))])

    def step(self, *spans: Span) -> tuple[Rows, Rows]:
        """The same tokens in both: compiled, and as ever."""
        with only_compiled(self.fast):
            have = self.fast.forward(spans)
        return have, self.slow.forward(spans)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled") / "steps"


@pytest.fixture(scope="module")
def pair(family: str, folder: Path) -> Pair:
    return Pair(family, folder)


@contextmanager
def only_compiled(lm: HuggingFaceLM) -> Iterator[None]:
    """No pass may run any other way."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a pass was not compiled")

    lm._eager_pass = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        del lm._eager_pass


def text(seed: int, length: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(have: Rows, need: Rows) -> None:
    for one, other in zip(have, need, strict=True):
        assert one.shape == other.shape
        scale = max(1.0, other.abs().max().item())
        assert (one - other).abs().max().item() <= TOLERANCE * scale


@needs_compiler
@every_family
def test_rows_and_keys_are_those_of_the_pass_it_replaces_at_any_length(pair: Pair) -> None:
    for length in (0, 1, 2, 11, 12, 13, 63, 64, 200, CAPACITY - 1):
        pair.prefill([length])
        assert_same(*pair.step(Span(0, [7])))


@needs_compiler
@every_family
def test_steps_follow_each_other_in_any_slot_and_after_rewinding(pair: Pair) -> None:
    pair.prefill([30, 17, 5, 40])
    for slot in (2, 0, 3, 1):
        for token in text(slot, 4):
            assert_same(*pair.step(Span(slot, [token])))
        for lm in (pair.fast, pair.slow):
            lm.rewind(slot, 3)
        for token in text(slot + 9, 3):
            assert_same(*pair.step(Span(slot, [token])))
    # What steps wrote is read by every later pass.
    spans = [Span(slot, text(slot + 20, 9), 9) for slot in range(SLOTS)]
    assert_same(pair.fast.forward(spans), pair.slow.forward(spans))


@needs_compiler
@every_family
def test_a_step_writes_to_its_own_slot_only(pair: Pair) -> None:
    pair.prefill([6, 6, 6])
    assert pair.fast._cache is not None
    layers = pair.fast._cache.layers
    before = [layer.keys.clone() for layer in layers]
    pair.step(Span(1, [7]))
    for layer, was in zip(layers, before, strict=True):
        changed = (layer.keys != was).any(dim=-1).any(dim=1).nonzero().tolist()
        assert changed == [[1, 6]]


@needs_compiler
@every_family
def test_what_a_step_returned_outlives_the_next(pair: Pair) -> None:
    pair.prefill([10])
    first, need = pair.step(Span(0, [7]))
    second, _ = pair.step(Span(0, [8]))
    assert_same(first, need)
    for one, other in zip(first, second, strict=True):
        assert not torch.allclose(one, other)


@needs_compiler
@pytest.mark.parametrize("family", ["llama"], scope="module")
@pytest.mark.parametrize("lengths", [(3, 40), (40, 3), (CAPACITY - 1, CAPACITY - 2), (0, 0)])
def test_narrower_spans_are_padded(pair: Pair, lengths: tuple[int, int]) -> None:
    pair.prefill([*lengths, 9])
    widths = [min(width, CAPACITY - length) for width, length in zip((3, 2), lengths, strict=True)]
    for first in (0, 1) if lengths == (3, 40) else (0,):  # the second time in slots 1 and 2
        spans = [Span(first + row, text(row, width), width) for row, width in enumerate(widths)]
        assert_same(*pair.step(*spans))


@needs_compiler
@pytest.mark.parametrize("family", ["llama"], scope="module")
def test_other_passes_run_as_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.prefill([5, 5, 5, 5])
    eager: list[int] = []
    run = pair.fast._eager_pass

    def counted(slots: Any, tokens: Any, lengths: Any) -> tuple[Tensor, Tensor]:
        eager.append(len(slots))
        return run(slots, tokens, lengths)

    monkeypatch.setattr(pair.fast, "_eager_pass", counted)
    batches = ([Span(0, text(0, 2), 2)], [Span(0, [1]), Span(2, [2])], [Span(i, [i + 1]) for i in range(3)])
    for batch in batches:  # too wide; no neighbours; too many
        assert_same(pair.fast.forward(batch), pair.slow.forward(batch))
    assert eager == [1, 2, 3]


@needs_compiler
@pytest.mark.parametrize("family", ["llama"], scope="module")
def test_progress_is_told_and_all_is_kept_in_the_folder(pair: Pair, folder: Path) -> None:
    assert pair.told == ["the step 1x1 to compile (1 of 2)", "the step 2x4 to compile (2 of 2)"]
    assert list(folder.rglob("*.so"))
    assert len(list((folder / "fxgraph").glob("*/*"))) == 2  # a step each: what spares the next start its compiling
    assert folder.stat().st_mode & 0o777 == 0o700
    assert str(folder) not in os.environ.values()  # told to torch while it compiles, not for good


@needs_compiler
def test_who_is_told_may_end_it(tmp_path: Path) -> None:
    def stop(what: str) -> None:
        raise InterruptedError(what)

    with pytest.raises(InterruptedError, match="1x1"):
        make("llama", CompileOptions((StepShape(1, 1),), tmp_path, stop))


@needs_compiler
def test_a_step_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compile_graph", lambda *_: lambda *inputs: (torch.ones(1, 1, 64),) * 2)
    with pytest.raises(UnsupportedModel, match=r"'llama': the compiled step 1x1 differs .* by"):
        make("llama", CompileOptions((StepShape(1, 1),), tmp_path))


@needs_compiler
def test_code_is_loaded_from_a_folder_of_ones_own_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidParameter, match=r"nobody else can write to.*mode 777"):
        make("llama", CompileOptions((StepShape(1, 1),), tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InvalidParameter, match="a folder that can be written"):
        make("llama", CompileOptions((StepShape(1, 1),), tmp_path / "file"))


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path) -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ModelLoadError, match=r"needs a C\+\+ compiler.*apt-get install g\+\+"),
    ):
        make("llama", CompileOptions((StepShape(1, 1),), tmp_path))


def test_attention_that_is_not_torchs_kernel_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match=r"its attention is 'eager'.*leave out --compile-steps"):
        HuggingFaceLM(
            model, Tokenizer(tiny_tokenizer()), name="eager", max_sequences=1,
            compile_steps=CompileOptions((StepShape(1, 1),), tmp_path),
        )  # fmt: skip


def test_shapes_beyond_the_cache_are_refused(tmp_path: Path) -> None:
    for shape in (StepShape(SLOTS + 1, 1), StepShape(1, 33)):
        with pytest.raises(InvalidParameter, match=f"at most 4 sequences.* 32 tokens each; got {shape}"):
            make("llama", CompileOptions((shape,), tmp_path), max_length=32)


@pytest.mark.parametrize("word", ["1", "x", "0x1", "1x0", "1x65", "65x1", "1x1x1", "-1x1", "²x1", ""])
def test_what_is_no_shape_is_refused(word: str) -> None:
    with pytest.raises(InvalidParameter, match="must be shapes SEQUENCESxTOKENS"):
        parse_shapes(["1x1", word])


def test_shapes_are_kept_in_order_and_once() -> None:
    assert parse_shapes(["2x4", "1x1", "2x4"]) == (StepShape(2, 4), StepShape(1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int8"}, "full weights on a CPU, got int8"),
        ({"max_sequences": 0}, "needs sequences"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    with pytest.raises(InvalidParameter, match=message):
        load_lm(folder, LoadOptions(**{"compile_steps": ("1x1",), "max_sequences": 1, **changes}))


def test_llamacpp_has_no_steps_to_compile() -> None:
    with pytest.raises(InvalidParameter, match=r"for the runtime huggingface.*got '1x1,1x4'"):
        load_llamacpp("lm.gguf", LoadOptions(runtime="llamacpp", compile_steps=("1x1", "1x4")), name="lm")
