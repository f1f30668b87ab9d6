"""torch's Inductor for CPUs, kept in order: one process, one folder of the user's own, plain errors."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from knnlm_core.errors import InvalidParameter, KnnlmError, ModelLoadError, UnsupportedModel
from knnlm_core.lm.checkpoint import first_line

logger = logging.getLogger(__name__)

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_REMEDY = "install one with Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev), or name it in CXX"


def require_compiler(folder: Path) -> None:
    """See that there is a C++ compiler, and a folder for what it makes.

    Raises: ModelLoadError: there is none. InvalidParameter: others can write to the folder, from which code is loaded.
    """
    _require_own(folder)
    with _inductor(folder):
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        _require_own(Path(default_cache_dir()))  # where its compiled headers are, whatever it is told
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ModelLoadError(
                f"`compile_steps` needs a C++ compiler, and none is found; {_REMEDY}", param="compile_steps"
            ) from error


def compile_graph(module: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Callable[..., tuple[Tensor, ...]]:
    """Export a module's forward pass for inputs of these very shapes, and compile it.

    What it writes to among its inputs is written in place; parameters are the module's own, not copies.

    Args:   folder: keeps what was compiled; `require_compiler` has seen it.
    Raises:
        UnsupportedModel: the forward pass cannot be exported.
        ModelLoadError: the compiler fails.
    """
    with torch.inference_mode(False), torch.no_grad(), _inductor(folder):
        try:
            # Python runs the forward pass once on stand-ins of tensors: nothing is executed, every hook is seen.
            exported = torch.export.export(module, inputs, strict=False).module(check_guards=False)
        except KnnlmError:
            raise
        except Exception as error:  # of any class: the modelling code's and torch's
            raise UnsupportedModel(
                f"steps of this model cannot be compiled: {first_line(error)}; leave out --compile-steps"
            ) from error
        exported.graph.set_codegen(torch.fx.graph.CodeGen())  # inputs are a flat list already
        graph = torch.fx.GraphModule(exported, exported.graph)  # one that the cache of compiled graphs takes
        try:
            compiled: Callable[..., tuple[Tensor, ...]] = torch._inductor.standalone_compile(
                graph, list(inputs), dynamic_shapes="from_example_inputs", donate_graph_module=True
            )
        except Exception as error:
            logger.error("compiling failed error=%s", error)  # with all that the compiler says
            raise ModelLoadError(
                f"compiling a step failed: {first_line(error)}; the log has more. It needs a C++ compiler; {_REMEDY}",
                param="compile_steps",
            ) from error
    return compiled


def _require_own(folder: Path) -> None:
    """Make the folder of compiled code, or see that nobody else can put code into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise InvalidParameter(
            f"`compile_cache` must be a folder that can be written, got {str(folder)!r}: {error.strerror}",
            param="compile_cache",
        ) from error
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or not os.access(folder, os.W_OK):
        raise InvalidParameter(
            "compiled code is loaded from a folder of your own that nobody else can write to, and "
            f"{str(folder)!r} belongs to user {found.st_uid} with mode {found.st_mode & 0o777:03o}; change that, or "
            "remove it, or give another as --compile-cache",
            param="compile_cache",
        )


@contextmanager
def _inductor(folder: Path) -> Iterator[None]:
    """Let torch compile in this process, read and write in this folder alone, and keep its own deprecations to itself.

    It takes the folder from the environment, when it is imported and later; its pool of processes would stay.
    """
    before = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = str(folder.resolve())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch._inductor import config

            with config.patch(compile_threads=1):
                yield
    finally:
        if before is None:
            os.environ.pop(_FOLDER, None)
        else:
            os.environ[_FOLDER] = before
