"""Which sequences a runtime has handed out, and how many tokens each holds; the tokens are the runtime's business."""

from __future__ import annotations

from knnlm_core.errors import InvalidParameter, Overloaded, PromptTooLong
from knnlm_core.lm.protocol import SequenceId

DEFAULT_MAX_LENGTH = 8192  # room is reserved for whole sequences: the longest contexts must be asked for


def choose_max_length(limit: int, requested: int | None) -> int:
    """Tokens that one sequence may hold: as many as asked for, else the model's ``limit``, at most DEFAULT_MAX_LENGTH.

    Raises: InvalidParameter: more than the model was made for, or fewer than two.
    """
    if requested is not None and not 2 <= requested <= limit:
        raise InvalidParameter(
            f"`max_model_len` must be in 2 … {limit} (the model's context), got {requested}", param="max_model_len"
        )
    return requested or min(limit, DEFAULT_MAX_LENGTH)


class Sequences:
    """The sequences 0 … count − 1 of a runtime.

    Args:
        count: how many can be held at once.
        max_length: tokens that each may hold.
    """

    def __init__(self, count: int, max_length: int) -> None:
        self.count = count
        self._max_length = max_length
        self._free = set(range(count))
        self._lengths: dict[SequenceId, int] = {}

    @property
    def num_free(self) -> int:
        """How many can be allocated now."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self._lengths.values())

    def allocate(self, length: int = 0) -> SequenceId:
        """Hand out the lowest free one: live sequences stay neighbours. Raises Overloaded when none is free."""
        if not self._free:
            raise Overloaded(f"all {self.count} sequences are in use")
        sequence = min(self._free)
        self._free.remove(sequence)
        self._lengths[sequence] = length
        return sequence

    def free(self, sequence: SequenceId) -> None:
        """Take one back."""
        del self._lengths[sequence]
        self._free.add(sequence)

    def length(self, sequence: SequenceId) -> int:
        """Tokens that it holds."""
        return self._lengths[sequence]

    def begin(self, sequence: SequenceId, length: int) -> None:
        """Let an empty one hold tokens that were known before."""
        assert self._lengths[sequence] == 0, "only an empty sequence can begin with a known prefix. This is a bug."
        self._lengths[sequence] = length

    def check_room(self, sequence: SequenceId, tokens: int) -> None:
        """Raises PromptTooLong: with so many tokens more it would hold too many."""
        total = self._lengths[sequence] + tokens
        if total > self._max_length:
            raise PromptTooLong(f"a sequence may hold at most {self._max_length} tokens, got {total}")

    def extend(self, sequence: SequenceId, tokens: int) -> None:
        """It holds so many tokens more; `check_room` was asked before."""
        self._lengths[sequence] += tokens

    def rewind(self, sequence: SequenceId, length: int) -> None:
        """It holds its first ``length`` tokens only. Raises InvalidParameter: it does not have so many."""
        if not 0 <= length <= self._lengths[sequence]:
            raise InvalidParameter(f"`length` must be in 0 … {self._lengths[sequence]}, got {length}", param="length")
        self._lengths[sequence] = length

    def clear(self) -> None:
        """There is none any more, and none can be allocated."""
        self._lengths.clear()
        self._free.clear()
