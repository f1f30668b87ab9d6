"""The error tree: its picture, its codes, its HTTP statuses and the client's copy say the same."""

from __future__ import annotations

import inspect

import pytest

from knnlm_client import errors as client_errors
from knnlm_core import errors
from knnlm_core.errors import DatastoreMismatch, KnnlmError
from knnlm_server.api.errors import STATUS, error_body, error_event, error_response, status_of

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, KnnlmError)]
# Raised by a build or while the server starts: no request ever gets them.
NEVER_SENT = (errors.CorpusError, errors.BuildError)


def pictured(docstring: str, root: str) -> dict[str, str | None]:
    """Class → parent, as a docstring's tree draws it."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in docstring.splitlines():
        bare = line.lstrip(" │├└─")
        if not bare or (bare == line and line != root) or not (line.strip() == root or "──" in line):
            continue
        indent, name = len(line) - len(bare), bare.split()[0]
        while path and path[-1][0] >= indent:
            path.pop()
        assert name not in parents, f"{name} is drawn twice"
        parents[name] = path[-1][1] if path else None
        path.append((indent, name))
    return parents


def made(cls: type[KnnlmError]) -> KnnlmError:
    if cls is DatastoreMismatch:
        return DatastoreMismatch("law", field="key_dim", have=1, need=2)
    return cls("what went wrong", param="field")


def test_the_picture_is_the_tree() -> None:
    drawn = pictured(errors.__doc__ or "", "KnnlmError")
    assert drawn == {cls.__name__: None if cls is KnnlmError else cls.__base__.__name__ for cls in CLASSES}
    assert len(drawn) > 25


def test_every_class_has_a_code_of_its_own() -> None:
    assert all("code" in vars(cls) for cls in CLASSES)
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(code.replace("_", "").isalpha() and code.islower() for code in codes)


def test_every_class_says_in_one_sentence_what_it_is() -> None:
    for cls in CLASSES:
        assert cls.__doc__, cls
        assert cls.__doc__.strip().split("\n")[0].endswith("."), cls


def test_the_table_holds_only_classes_of_the_tree() -> None:
    assert STATUS.keys() <= set(CLASSES)
    assert all(400 <= status < 600 and kind.replace("_", "").isalpha() for status, kind in STATUS.values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_has_a_status(cls: type[KnnlmError]) -> None:
    status, kind = status_of(made(cls))
    is_leaf = not any(other is not cls and issubclass(other, cls) for other in CLASSES)
    sent = not issubclass(cls, NEVER_SENT)
    loads_only_at_start = cls in (errors.ModelLoadError, errors.UnsupportedModel)
    if is_leaf and sent and not loads_only_at_start:
        # Not by falling through to the root's.
        assert any(base in STATUS for base in cls.__mro__ if base is not KnnlmError), cls.__name__
    assert (status == 500) == (kind == "internal_server_error")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_rendered_in_the_one_shape(cls: type[KnnlmError]) -> None:
    error = made(cls)
    body = error_body(error)
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == cls.code
    response = error_response(error)
    assert response.status_code == status_of(error)[0]
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    assert ("x-should-retry" in response.headers) == (response.status_code == 409)
    assert error_event(error) == f"data: {bytes(response.body).decode()}\n\n"


def test_an_internal_error_says_nothing_about_the_inside() -> None:
    assert error_body(KnnlmError("the path is /secret"))["error"]["message"] == "internal error"
    assert error_body(errors.ModelLoadError("the path is /secret"))["error"]["message"] == "internal error"


def test_a_mismatch_names_field_have_and_need() -> None:
    error = DatastoreMismatch("law", field="key_dim", have=576, need=64)
    assert (error.field, error.have, error.need, error.param) == ("key_dim", 576, 64, "key_dim")
    assert error.message == "datastore 'law' does not fit: key_dim is 576, the running model needs 64"


def test_the_client_has_the_same_class_for_every_code_that_can_be_sent() -> None:
    by_code = client_errors.CLASS_BY_CODE
    for cls in CLASSES:
        if cls is KnnlmError:
            assert by_code[cls.code] is client_errors.InternalError
        elif not issubclass(cls, NEVER_SENT):
            assert by_code[cls.code].__name__ == cls.__name__
    known = {cls.code for cls in CLASSES}
    assert by_code.keys() <= known
