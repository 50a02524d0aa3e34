"""Key-value caches whose rows can be taken out and put together, and which do not copy themselves for each token."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values `(B, H, W, D)` with room for tokens to come.

    transformers' own layer copies all keys and values for every token, which takes longer than the attention to them.
    """

    keys: Any
    values: Any
    _views: tuple[Tensor, ...] = ()  # what `update` gave last: parts of the tensors below
    _whole: tuple[Tensor, ...] = ()  # each (B, H, W + room, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        width = self.get_seq_length()
        after = width + key_states.shape[-2]
        now = self.keys, self.values
        is_ours = len(self._views) == 2 and all(map(_same, now, self._views))  # not if rows were taken out since
        if not (is_ours and after <= self._whole[0].shape[-2]):
            self._whole = tuple(_with_room(*pair, width) for pair in zip(now, new, strict=True))
        for whole, states in zip(self._whole, new, strict=True):
            whole[:, :, width:after] = states
        self.keys, self.values = self._views = tuple(whole[:, :, :after] for whole in self._whole)
        return self.keys, self.values


def _same(one: Any, other: Any) -> bool:
    return one is other


def _with_room(old: Tensor, new: Tensor, width: int) -> Tensor:
    rows, heads, more, size = new.shape
    whole = new.new_empty(rows, heads, width + more + ROOM, size)
    if width:
        whole[:, :, :width] = old
    return whole


# Layers whose state is one key and one value per row and token. Others share state between rows, or hide it.
_GROWING = (DynamicLayer, RoomyLayer)
_PLAIN_LAYERS = (*_GROWING, DynamicSlidingWindowLayer)


def can_select_rows(cache: Any) -> bool:
    """Whether rows can be taken out of a cache, by what its layers are."""
    return isinstance(cache, Cache) and all(type(layer) in _PLAIN_LAYERS for layer in cache.layers)


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache of no row, with the layers that the model wants."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    give_room(cache)
    return cache


def give_room(cache: Cache) -> None:
    """Let the layers of a cache that hold nothing yet have room for tokens to come."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer for layer in cache.layers
    ]


def trim(cache: Cache, first: int) -> bool:
    """Cut off the columns before the first that is used. Whether the layers could be cut."""
    if not all(type(layer) in _GROWING for layer in cache.layers):
        return False
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
    return True


def joined(first: Cache, second: Cache) -> Cache:
    """The rows of two caches as those of one, which is the first. Both end at the same column."""
    for layer, other in zip(first.layers, second.layers, strict=True):
        if not other.is_initialized:  # it reads another layer's keys
            continue
        layer.keys = torch.cat(equally_wide(layer.keys, other.keys, dim=-2))
        layer.values = torch.cat(equally_wide(layer.values, other.values, dim=-2))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)
    return first


def equally_wide(*tensors: Tensor, dim: int = -1) -> list[Tensor]:
    """Each with zeros before it in one dimension, counted from the last, up to the widest."""
    width = max(tensor.shape[dim] for tensor in tensors)
    return [pad(tensor, (0, 0) * (-1 - dim) + (width - tensor.shape[dim], 0)) for tensor in tensors]
