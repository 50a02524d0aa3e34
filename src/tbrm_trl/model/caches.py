"""Key-value caches that can drop and join rows, and that are not copied for each token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values `(B, H, W, D)` with room for further tokens and rows.

    transformers' own layer copies all keys and values for every token, which takes longer than the attention to them.

    Args:
        rows: number of rows to keep room for; 0 for no spare rows.
    """

    keys: Any
    values: Any

    def __init__(self, rows: int = 0):
        super().__init__()
        self.rows = rows
        self._whole: tuple[Tensor, ...] = ()  # keys and values, each (B + room, H, W + room, D)
        self._views: tuple[Tensor, ...] = ()  # the filled parts of both
        self._first = 0  # column where the filled parts begin

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, width, more = (key_states, value_states), self.get_seq_length(), key_states.shape[-2]
        if not (self._is_ours() and self._first + width + more <= self._whole[0].shape[-2]):
            held = self.keys, self.values
            self._whole = tuple(self._with_room(*pair, width) for pair in zip(held, new, strict=True))
            self._first = 0
        last = self._first + width + more
        for whole, states in zip(self._whole, new, strict=True):
            whole[: len(states), :, last - more : last] = states
        self._show(len(key_states), self._first, last)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        sources = indices.tolist()
        if not (self._is_ours() and all(source >= place for place, source in enumerate(sources))):
            super().batch_select_indices(indices)
            return self._let_go()
        held = slice(self._first, self._first + self.get_seq_length())
        for place, source in enumerate(sources):
            if place != source:
                for whole in self._whole:
                    whole[place, :, held] = whole[source, :, held]
        self._show(len(sources), held.start, held.stop)

    def cut(self, columns: int) -> None:
        """Drop the first columns."""
        if self._is_ours():
            self._show(len(self.keys), self._first + columns, self._first + self.get_seq_length())
        else:
            self.keys, self.values = self.keys[:, :, columns:], self.values[:, :, columns:]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the rows of another cache. Both end at the same column; zeros fill the narrower one on the left."""
        rows, width, more, wide = len(self.keys), self.get_seq_length(), len(keys), keys.shape[-2]
        if not (self._is_ours() and rows + more <= len(self._whole[0]) and wide <= width):
            self.keys = torch.cat(equally_wide(self.keys, keys, dim=-2))
            self.values = torch.cat(equally_wide(self.values, values, dim=-2))
            return self._let_go()
        last = self._first + width
        for whole, states in zip(self._whole, (keys, values), strict=True):
            whole[rows : rows + more, :, self._first : last - wide] = 0
            whole[rows : rows + more, :, last - wide : last] = states
        self._show(rows + more, self._first, last)

    def _is_ours(self) -> bool:
        """Whether keys and values are still this class's views: other code may have replaced them."""
        return bool(self._views) and self.keys is self._views[0] and self.values is self._views[1]

    def _let_go(self) -> None:
        self._whole = self._views = ()

    def _show(self, rows: int, first: int, last: int) -> None:
        self._first = first
        self.keys, self.values = self._views = tuple(whole[:rows, :, first:last] for whole in self._whole)

    def _with_room(self, held: Tensor, new: Tensor, width: int) -> Tensor:
        rows, heads, more, size = new.shape
        whole = new.new_empty(max(rows, self.rows), heads, width + more + ROOM, size)
        if width:
            whole[:rows, :, :width] = held
        return whole


# Layers that hold one key and one value per row and token. Others share state between rows, or hide it.
_PLAIN_LAYERS = (DynamicLayer, RoomyLayer, DynamicSlidingWindowLayer)


def can_select_rows(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: it does not offload, and its layers are of types known to allow it."""
    return isinstance(cache, Cache) and not cache.offloading and all(type(one) in _PLAIN_LAYERS for one in cache.layers)


def empty_cache(model: PreTrainedModel, rows: int = 0) -> DynamicCache:
    """An empty cache with the model's types of layer, and room for `rows` rows."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    give_room(cache, rows)
    return cache


def give_room(cache: Cache, rows: int = 0) -> None:
    """Give a cache's empty layers room for further tokens, and for `rows` rows."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    cache.layers = [
        RoomyLayer(rows) if type(layer) is DynamicLayer and not layer.is_initialized else layer
        for layer in cache.layers
    ]


def trim(cache: Cache, columns: int) -> bool:
    """Drop the first columns if the layers can, and return whether they can."""
    if not all(isinstance(layer, RoomyLayer) for layer in cache.layers):
        return False
    for layer in cache.layers:
        layer.cut(columns)
    return True


def joined(first: Cache, second: Cache) -> Cache:
    """Add the rows of the second cache to the first, and return the first. Both end at the same column."""
    for layer, other in zip(first.layers, second.layers, strict=True):
        if not other.is_initialized:  # this layer reads another layer's keys
            continue
        if isinstance(layer, RoomyLayer):
            layer.append(other.keys, other.values)
            continue
        layer.keys = torch.cat(equally_wide(layer.keys, other.keys, dim=-2))
        layer.values = torch.cat(equally_wide(layer.values, other.values, dim=-2))
        layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)
    return first


def closed_up(kept: Sequence[int]) -> list[int]:
    """Order the kept rows so that the last ones fill the gaps and all others stay in place."""
    moved = [row for row in kept if row >= len(kept)]
    staying = set(kept)
    return [place if place in staying else moved.pop() for place in range(len(kept))]


def equally_wide(*tensors: Tensor, dim: int = -1) -> list[Tensor]:
    """Pad tensors on the left with zeros to the width of the widest, in one dimension (a negative index)."""
    width = max(tensor.shape[dim] for tensor in tensors)
    return [pad(tensor, (0, 0) * (-1 - dim) + (width - tensor.shape[dim], 0)) for tensor in tensors]
