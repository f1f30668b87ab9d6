"""KV cache of prompts' beginnings, kept across sequences so that a shared prefix is computed once.

Tokens are cut into blocks. A block is known by its tokens and the block before it, so that equal blocks in equal
contexts, and only those, are one:

    "You are helpful. | Today is  "     blocks 0 ─ 1
    "You are helpful. | Tomorrow  "     blocks 0 ─ 2

Keys of the index are the tokens themselves, never a hash alone. A KV cache depends on the LM and the tokens, on nothing
else: no datastore, no swap and no deletion can make a block stale, and the blocks live and die with their LM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knnlm_core.lm.slot_cache import SlotCache, reserve

BLOCK_TOKENS = 32
_NO_PARENT = -1

_BlockKey = tuple[int, tuple[int, ...]]  # the block before, and this one's tokens


class PrefixCacheUse(NamedTuple):
    """How much the cache holds and has spared."""

    asked_tokens: int  # prompt tokens that were looked up
    reused_tokens: int  # those found
    used_bytes: int
    reserved_bytes: int


class BlockIndex:
    """Which block holds which tokens; evicts what was used longest ago. Pure bookkeeping.

    A block is touched after the blocks that follow it, so the least recently used one never has a successor: evicting
    it leaves no block without the one before it.
    """

    def __init__(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks))
        self._ids: OrderedDict[_BlockKey, int] = OrderedDict()  # least recently used first
        self._keys: dict[int, _BlockKey] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Blocks of the longest known prefix, in order."""
        found: list[int] = []
        for piece in self._pieces(tokens):
            block = self._ids.get((found[-1] if found else _NO_PARENT, piece))
            if block is None:
                break
            found.append(block)
        self._touch(found)
        return found

    def insert(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Make the whole blocks of ``tokens`` known, as many as there is room for beside each other.

        Returns: how many leading blocks were known before, and the ids of the new ones that follow, to be filled.
        """
        chain = self.find(tokens)
        known = len(chain)
        for piece in list(self._pieces(tokens))[known:]:
            block = self._take(chain)
            if block is None:
                break
            key = (chain[-1] if chain else _NO_PARENT, piece)
            self._ids[key], self._keys[block] = block, key
            chain.append(block)
        self._touch(chain)
        return known, chain[known:]

    def forget(self, blocks: Sequence[int]) -> None:
        """Take back what `insert` has just made known: the blocks could not be filled."""
        for block in blocks:
            del self._ids[self._keys.pop(block)]
            self._free.append(block)

    def _pieces(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        for end in range(self.block_tokens, len(tokens) + 1, self.block_tokens):
            yield tuple(tokens[end - self.block_tokens : end])

    def _touch(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            self._ids.move_to_end(self._keys[block])

    def _take(self, kept: Sequence[int]) -> int | None:
        """A block to fill: a free one, else the least recently used; None if that is one of ``kept``."""
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._ids.values()), None)
        if oldest is None or oldest in kept:
            return None
        del self._ids[self._keys.pop(oldest)]
        return oldest


class PrefixCache:
    """Blocks of keys and values beside the slots that sequences live in, copied in and out.

    Args:
        slots: the slot cache that sequences live in; blocks have its layers' shapes and dtype.
        num_bytes: bound on the memory of the blocks, reserved at once (on a CPU, pages are used as blocks are filled).
    """

    def __init__(self, slots: SlotCache, num_bytes: int) -> None:
        self._slots = slots
        self._block_bytes = slots.token_bytes * BLOCK_TOKENS
        num_blocks = num_bytes // self._block_bytes
        self._index = BlockIndex(num_blocks)
        self._layers = [
            tuple(
                reserve((num_blocks, part.shape[1], BLOCK_TOKENS, part.shape[3]), part.dtype, part.device)
                for part in _parts(layer)
            )
            for layer in slots.layers
        ]
        self._num_blocks = num_blocks
        self._asked = self._reused = 0

    @property
    def use(self) -> PrefixCacheUse:
        """How much the cache holds and has spared since it was made."""
        used, reserved = (count * self._block_bytes for count in (len(self._index), self._num_blocks))
        return PrefixCacheUse(self._asked, self._reused, used, reserved)

    def load(self, slot: int, tokens: Sequence[int]) -> int:
        """Fill the beginning of a slot with the longest known prefix of ``tokens``; returns its length in tokens."""
        blocks = self._index.find(tokens)
        length = len(blocks) * BLOCK_TOKENS
        self._asked += len(tokens)
        self._reused += length
        if blocks:
            ids = torch.tensor(blocks, device=self._layers[0][0].device)
            for layer, pools in zip(self._slots.layers, self._layers, strict=True):
                for part, pool in zip(_parts(layer), pools, strict=True):
                    # (blocks, heads, block, size) → (heads, blocks · block, size)
                    part[slot, :, :length] = pool[ids].transpose(0, 1).flatten(1, 2)
        return length

    def save(self, slot: int, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of ``tokens``, which a slot holds at its beginning."""
        known, blocks = self._index.insert(tokens)
        try:
            self._fill(slot, known, blocks)
        except BaseException:
            self._index.forget(blocks)
            raise

    def _fill(self, slot: int, known: int, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        ids = torch.tensor(blocks, device=self._layers[0][0].device)
        span = slice(known * BLOCK_TOKENS, (known + len(blocks)) * BLOCK_TOKENS)
        for layer, pools in zip(self._slots.layers, self._layers, strict=True):
            for part, pool in zip(_parts(layer), pools, strict=True):
                pool[ids] = part[slot, :, span].unflatten(1, (len(blocks), BLOCK_TOKENS)).transpose(0, 1)


def _parts(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, (slots, heads, capacity + 1, size) each."""
    return layer.keys, layer.values
