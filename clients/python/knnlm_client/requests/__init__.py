"""What a caller may ask for: the bodies of requests, checked for names and types before they are sent.

Limits are the server's business, since they depend on its settings; here a field only has to be known and of the
right type. `None` everywhere means: leave it to the server. Such a field is not sent.
"""

from knnlm_client.requests.chat import ChatMessage, ChatOptions, ChatRequest, Messages, StreamChatOptions, TextPart
from knnlm_client.requests.common import (
    GenerationOptions,
    GenerationRequest,
    KnnOptions,
    Prompt,
    RequestPart,
    StreamOptions,
    WeightedDatastore,
)
from knnlm_client.requests.completions import CompletionOptions, CompletionRequest, StreamCompletionOptions
from knnlm_client.requests.datastores import (
    DiffQuery,
    Documents,
    LearnRequest,
    LoadRequest,
    NewDocument,
    PurgeRequest,
    VerifyRequest,
)
from knnlm_client.requests.neighbors import NeighborsOptions, NeighborsRequest
from knnlm_client.requests.scoring import AfterContext, DocumentInput, ScoreInput, ScoreOptions, ScoreRequest
from knnlm_client.requests.tokenizer import DetokenizeRequest, TokenizeChatRequest, TokenizeOptions, TokenizeRequest

__all__ = [
    "AfterContext",
    "ChatMessage",
    "ChatOptions",
    "ChatRequest",
    "CompletionOptions",
    "CompletionRequest",
    "DetokenizeRequest",
    "DiffQuery",
    "DocumentInput",
    "Documents",
    "GenerationOptions",
    "GenerationRequest",
    "KnnOptions",
    "LearnRequest",
    "LoadRequest",
    "Messages",
    "NeighborsOptions",
    "NeighborsRequest",
    "NewDocument",
    "Prompt",
    "PurgeRequest",
    "RequestPart",
    "ScoreInput",
    "ScoreOptions",
    "ScoreRequest",
    "StreamChatOptions",
    "StreamCompletionOptions",
    "StreamOptions",
    "TextPart",
    "TokenizeChatRequest",
    "TokenizeOptions",
    "TokenizeRequest",
    "VerifyRequest",
    "WeightedDatastore",
]
