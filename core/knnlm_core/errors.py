"""Every error that knnlm raises on purpose.

    KnnlmError
    ├── InvalidRequest                 the caller asked for something that cannot be done
    │   ├── InvalidParameter           a field is outside its limits
    │   │   └── InvalidKnnParams       … a field of retrieval: λ, τ, k
    │   ├── UnsupportedFeature         known, but not offered by this build
    │   ├── PromptTooLong              prompt + max_tokens exceed the model's context
    │   └── PayloadTooLarge            the request body exceeds the server's limit
    ├── AccessError
    │   ├── Unauthorized               no key, or a wrong one
    │   └── Forbidden                  the key does not allow this
    ├── ModelError
    │   ├── ModelNotFound              no such model here
    │   ├── ModelLoadError             the files are there but do not load
    │   └── UnsupportedModel           it loads, but a check of the adapter fails
    ├── DatastoreError
    │   ├── DatastoreNotFound          no such name, version or document
    │   │   └── DocumentNotFound       … no such document, or it was deleted
    │   ├── DatastoreMismatch          built for another LM, tokenizer or key tap
    │   ├── DatastoreCorrupt           a file contradicts the manifest
    │   ├── DatastoreBusy              another change of the same name is under way
    │   ├── DatastoreConflict          the present state does not allow the change
    │   ├── DatastoreBudget            loading would exceed the server's memory budget
    │   ├── DatastoreReadOnly          its folder cannot be written
    │   └── DocumentExists             a document of that id is there and alive
    ├── CorpusError
    │   ├── InputNotFound              a path does not exist
    │   ├── UnreadableInput            a file is not what its suffix says
    │   ├── DuplicateDocument          two documents share an id
    │   └── EmptyCorpus                nothing to build from
    ├── BuildError
    │   ├── BuildConflict              another build of the same version runs, or its journal differs
    │   ├── VerifyFailed               the finished store fails a check
    │   └── DatastoreDoesNotHelp       the mixture is no better than the base LM
    └── ServiceError
        ├── NotReady                   still starting
        ├── Overloaded                 the queue is full
        ├── RateLimited                the key has as many requests under way as it may
        ├── ShuttingDown               draining
        ├── RequestCancelled           the client went away
        └── EngineFailure              a step failed; a defect of ours

`code` is what clients see and map back to a class of their own; it never changes.
"""

from __future__ import annotations

from typing import ClassVar


class KnnlmError(Exception):
    """Something went wrong inside; the log says what.

    Base of every error raised on purpose.

    Attributes:
        code: stable slug, the same in HTTP bodies and in the client.
        param: the request field at fault, where there is one.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(KnnlmError):
    """The caller asked for something that cannot be done."""

    code = "invalid_request"


class InvalidParameter(InvalidRequest):
    """A field is outside its limits; the message names field, limit and value."""

    code = "invalid_parameter"


class InvalidKnnParams(InvalidParameter):
    """A retrieval field (λ, τ, k) is outside its limits."""

    code = "invalid_knn_params"


class UnsupportedFeature(InvalidRequest):
    """The feature is known but not offered by this build."""

    code = "unsupported_feature"


class PromptTooLong(InvalidRequest):
    """Prompt and completion together do not fit the model's context."""

    code = "context_length_exceeded"


class PayloadTooLarge(InvalidRequest):
    """The request body exceeds the server's limit."""

    code = "payload_too_large"


class AccessError(KnnlmError):
    """The request may not be made."""

    code = "access_denied"


class Unauthorized(AccessError):
    """No API key was given, or a wrong one."""

    code = "invalid_api_key"


class Forbidden(AccessError):
    """The key given does not allow this route."""

    code = "forbidden"


class ModelError(KnnlmError):
    """Something about a language model."""

    code = "model_error"


class ModelNotFound(ModelError):
    """No model of that name or at that path."""

    code = "model_not_found"


class ModelLoadError(ModelError):
    """The model's files are there but do not load."""

    code = "model_load_failed"


class UnsupportedModel(ModelError):
    """The model loads, but one of the adapter's checks fails for it."""

    code = "unsupported_model"


class DatastoreError(KnnlmError):
    """Something about a datastore."""

    code = "datastore_error"


class DatastoreNotFound(DatastoreError):
    """No datastore, version or document of that name."""

    code = "datastore_not_found"


class DatastoreMismatch(DatastoreError):
    """The datastore was built for something else.

    Args:
        field: what differs, e.g. ``model_fingerprint``.
        have: the datastore's value.
        need: the value that would fit.
        needed_by: whose value that is.
        remedy: what to do about it, where one thing helps.
    """

    code = "datastore_mismatch"

    def __init__(
        self,
        name: str,
        *,
        field: str,
        have: object,
        need: object,
        needed_by: str = "the running model",
        remedy: str = "",
    ) -> None:
        message = f"datastore {name!r} does not fit: {field} is {have!r}, {needed_by} needs {need!r}"
        super().__init__(f"{message}; {remedy}" if remedy else message, param=field)
        self.field, self.have, self.need = field, have, need


class DatastoreCorrupt(DatastoreError):
    """A file of the datastore is missing, truncated or contradicts its manifest."""

    code = "datastore_corrupt"


class DatastoreBusy(DatastoreError):
    """Another change of the same datastore is under way."""

    code = "datastore_busy"


class DatastoreConflict(DatastoreError):
    """The datastore's present state does not allow the change, such as a rollback where nothing came before."""

    code = "datastore_conflict"


class DatastoreBudget(DatastoreError):
    """Loading the datastore would exceed the server's budget for datastores."""

    code = "datastore_budget"


class DatastoreReadOnly(DatastoreError):
    """The datastore's folder cannot be written, so nothing can be learned, deleted or published there."""

    code = "datastore_read_only"


class DocumentExists(DatastoreError):
    """A document of that id is in the datastore already."""

    code = "document_exists"


class DocumentNotFound(DatastoreNotFound):
    """No document of that id is in the datastore, or it was deleted."""

    code = "document_not_found"


class CorpusError(KnnlmError):
    """Something about the text given to a build."""

    code = "corpus_error"


class InputNotFound(CorpusError):
    """An input path does not exist."""

    code = "input_not_found"


class UnreadableInput(CorpusError):
    """An input file is not what its suffix says, or not text at all."""

    code = "unreadable_input"


class DuplicateDocument(CorpusError):
    """Two documents share an id."""

    code = "duplicate_document"


class EmptyCorpus(CorpusError):
    """The inputs hold nothing to build from."""

    code = "empty_corpus"


class BuildError(KnnlmError):
    """A build cannot go on."""

    code = "build_error"


class BuildConflict(BuildError):
    """Another build works in the same folder, or its journal belongs to another plan."""

    code = "build_conflict"


class VerifyFailed(BuildError):
    """The finished datastore fails one of its checks."""

    code = "verify_failed"


class DatastoreDoesNotHelp(BuildError):
    """On held-out text the mixture is no better than the base LM alone."""

    code = "datastore_does_not_help"


class ServiceError(KnnlmError):
    """The server cannot answer now."""

    code = "service_error"


class NotReady(ServiceError):
    """The server is still starting."""

    code = "not_ready"


class Overloaded(ServiceError):
    """The queue is full; try again later."""

    code = "overloaded"


class RateLimited(ServiceError):
    """The API key has as many requests under way as it may; try again later."""

    code = "rate_limited"


class ShuttingDown(ServiceError):
    """The server is draining and takes no new request."""

    code = "shutting_down"


class RequestCancelled(ServiceError):
    """The client went away before the answer."""

    code = "request_cancelled"


class EngineFailure(ServiceError):
    """A step of the engine failed; the request is lost and the log says why."""

    code = "engine_failure"
