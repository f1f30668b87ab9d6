"""Every error that the client raises on purpose.

    KnnlmClientError
    ├── ConnectionFailed               no answer: refused, reset, cut off
    │   └── StreamInterrupted          the stream ended before its end mark
    ├── TimedOut                       no answer in time
    └── APIError                       the server (or something before it) answered with an error
        ├── UnexpectedResponse         the answer is not what this route gives: wrong address, a proxy's page
        ├── NotFound                   404
        │   ├── ModelNotFound          … also a ModelError
        │   └── DatastoreNotFound      … also a DatastoreError
        │       └── DocumentNotFound
        ├── Conflict                   409
        │   ├── DatastoreBusy          … these are all DatastoreErrors too
        │   ├── DatastoreConflict
        │   ├── DatastoreBudget
        │   ├── DatastoreReadOnly
        │   └── DocumentExists
        ├── InternalError              500
        ├── InvalidRequest
        │   ├── InvalidParameter
        │   │   └── InvalidKnnParams
        │   ├── UnsupportedFeature
        │   ├── PromptTooLong
        │   └── PayloadTooLarge
        ├── AccessError
        │   ├── Unauthorized
        │   └── Forbidden
        ├── ModelError
        │   ├── ModelLoadError
        │   └── UnsupportedModel
        ├── DatastoreError
        │   ├── DatastoreMismatch
        │   ├── DatastoreCorrupt
        │   └── DuplicateDocument
        └── ServiceError
            ├── NotReady
            ├── Overloaded
            ├── RateLimited            429, this key's own limit
            ├── ShuttingDown
            ├── RequestCancelled
            └── EngineFailure

The class follows from the answer's `code`, and from its status where the code is unknown.
A keyword that cannot be sent (unknown name, wrong type) is a `ValueError` before anything is sent.
"""

from __future__ import annotations

from dataclasses import dataclass


class KnnlmClientError(Exception):
    """Base of every error that the client raises on purpose."""


class ConnectionFailed(KnnlmClientError):
    """The server could not be reached, or the connection broke before the whole answer was here."""


class StreamInterrupted(ConnectionFailed):
    """A stream ended before its end mark, so the text received is incomplete."""


class TimedOut(KnnlmClientError):
    """The server did not answer in time; whether it acted on the request is unknown."""


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What an error answer said.

    Attributes:
        status: HTTP status; 200 for an error that arrived inside a running stream.
        code: the stable slug, None where the answer carried none.
        type: the OpenAI-style family of the error.
        param: the request field at fault.
        request_id: names the request in the server's log.
        retry_after_s: seconds to wait before trying again, where the server said so.
    """

    message: str
    status: int
    code: str | None = None
    type: str | None = None
    param: str | None = None
    request_id: str | None = None
    retry_after_s: float | None = None


class APIError(KnnlmClientError):
    """The answer is an error; the attributes are those of `ErrorInfo`."""

    # One positional argument, so that the error survives pickling between processes.
    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info)
        self.message = info.message
        self.status = info.status
        self.code = info.code
        self.type = info.type
        self.param = info.param
        self.request_id = info.request_id
        self.retry_after_s = info.retry_after_s

    def __str__(self) -> str:
        facts = {"status": self.status, "code": self.code, "param": self.param, "request_id": self.request_id}
        return f"{self.message} ({', '.join(f'{name}={value}' for name, value in facts.items() if value is not None)})"


class UnexpectedResponse(APIError):
    """The answer is not what this route gives, as from a proxy or another kind of server."""


class NotFound(APIError):
    """What the request names does not exist."""


class Conflict(APIError):
    """The request does not fit the present state."""


class InternalError(APIError):
    """The server failed in a way that it does not explain; its log does."""


class InvalidRequest(APIError):
    """The request asks for something that cannot be done."""


class InvalidParameter(InvalidRequest):
    """A field is outside its limits."""


class InvalidKnnParams(InvalidParameter):
    """A retrieval field (λ, τ, k) is outside its limits."""


class UnsupportedFeature(InvalidRequest):
    """The feature is known but not offered by this server."""


class PromptTooLong(InvalidRequest):
    """Prompt and completion together do not fit the model's context."""


class PayloadTooLarge(InvalidRequest):
    """The request body exceeds the server's limit."""


class AccessError(APIError):
    """The request may not be made."""


class Unauthorized(AccessError):
    """No API key was sent, or a wrong one."""


class Forbidden(AccessError):
    """The key sent does not allow this route."""


class ModelError(APIError):
    """Something about a language model."""


class ModelNotFound(ModelError, NotFound):
    """The server has no model of that name."""


class ModelLoadError(ModelError):
    """The model's files are there but do not load."""


class UnsupportedModel(ModelError):
    """The model loads but fails one of the server's checks."""


class DatastoreError(APIError):
    """Something about a datastore."""


class DatastoreNotFound(DatastoreError, NotFound):
    """No datastore, version or document of that name."""


class DatastoreMismatch(DatastoreError):
    """The datastore was built for another LM, tokenizer or key tap."""


class DatastoreCorrupt(DatastoreError):
    """A file of the datastore is missing or contradicts its manifest."""


class DatastoreBusy(DatastoreError, Conflict):
    """Another change of the same datastore is under way."""


class DatastoreConflict(DatastoreError, Conflict):
    """The datastore's present state does not allow the change, such as a rollback where nothing came before."""


class DatastoreBudget(DatastoreError, Conflict):
    """It would exceed what the server may have loaded."""


class DatastoreReadOnly(DatastoreError, Conflict):
    """The server cannot write the datastore's folder, so it can neither learn nor forget there."""


class DocumentExists(DatastoreError, Conflict):
    """The datastore has a document of that id; `update` would replace it."""


class DocumentNotFound(DatastoreNotFound):
    """The datastore has no document of that id, or it was deleted."""


class DuplicateDocument(DatastoreError):
    """The datastore holds a document of that id already."""


class ServiceError(APIError):
    """The server cannot answer now."""


class NotReady(ServiceError):
    """The server is still starting."""


class Overloaded(ServiceError):
    """The queue is full; `retry_after_s` says when to try again."""


class RateLimited(ServiceError):
    """This key has as many requests under way as it may; `retry_after_s` says when to try again."""


class ShuttingDown(ServiceError):
    """The server is draining and takes no new request."""


class RequestCancelled(ServiceError):
    """The server dropped the request because its caller seemed gone."""


class EngineFailure(ServiceError):
    """A step of the engine failed and this request is lost."""


CLASS_BY_CODE: dict[str, type[APIError]] = {
    "internal_error": InternalError,
    "invalid_request": InvalidRequest,
    "invalid_parameter": InvalidParameter,
    "invalid_knn_params": InvalidKnnParams,
    "unsupported_feature": UnsupportedFeature,
    "context_length_exceeded": PromptTooLong,
    "payload_too_large": PayloadTooLarge,
    "access_denied": AccessError,
    "invalid_api_key": Unauthorized,
    "forbidden": Forbidden,
    "model_error": ModelError,
    "model_not_found": ModelNotFound,
    "model_load_failed": ModelLoadError,
    "unsupported_model": UnsupportedModel,
    "datastore_error": DatastoreError,
    "datastore_not_found": DatastoreNotFound,
    "datastore_mismatch": DatastoreMismatch,
    "datastore_corrupt": DatastoreCorrupt,
    "datastore_busy": DatastoreBusy,
    "datastore_conflict": DatastoreConflict,
    "datastore_budget": DatastoreBudget,
    "datastore_read_only": DatastoreReadOnly,
    "document_exists": DocumentExists,
    "document_not_found": DocumentNotFound,
    "duplicate_document": DuplicateDocument,
    "service_error": ServiceError,
    "not_ready": NotReady,
    "overloaded": Overloaded,
    "rate_limited": RateLimited,
    "shutting_down": ShuttingDown,
    "request_cancelled": RequestCancelled,
    "engine_failure": EngineFailure,
}

CLASS_BY_STATUS: dict[int, type[APIError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    429: RateLimited,
    500: InternalError,
}


def error_class(code: str | None, status: int) -> type[APIError]:
    """Choose the class for an error answer: by code, else by status, else by the status's hundred."""
    if code is not None and code in CLASS_BY_CODE:
        return CLASS_BY_CODE[code]
    if status in CLASS_BY_STATUS:
        return CLASS_BY_STATUS[status]
    return {4: InvalidRequest, 5: ServiceError}.get(status // 100, APIError)
