"""One layer's keys and values in the worker's pages, and the cache object that transformers' modules see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from kernels.attention import key_words


@dataclass(frozen=True, eq=False)
class Pages:
    """One layer of the paged cache; a layer may use fewer heads and dims than the pages have.

    Attributes:
        keys: see `kernels.attention.cache_shape`.
        values: see `kernels.attention.cache_shape`.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.values.shape[2]

    def fits(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether tokens' keys and values, [..., heads, dims], have the pages' own shape and type."""
        own = (self.values.shape[1], self.values.shape[3])
        return keys.shape[-2:] == own == values.shape[-2:] and keys.dtype == self.values.dtype

    def write(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        """Store tokens' keys and values, [T, heads, dims] each, at `places`, int64[T]; -1 is nowhere."""
        live = places >= 0
        keys, values, places = keys[live], values[live], places[live]
        block, offset = places // self.block_size, places % self.block_size
        heads, dim = keys.shape[1], self.values.shape[3]
        words = key_words(F.pad(keys, (0, dim - keys.shape[2])), self.keys.shape[4])
        self.keys[block, :heads, :, offset] = words.to(self.keys.dtype)
        self.values[block, :heads, offset, : values.shape[2]] = values.to(self.values.dtype)

    def read(
        self, blocks: torch.Tensor, length: int, heads: int, key_dim: int, value_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, length, key_dim] and values [heads, length, value_dim] of a row with these blocks."""
        blocks = blocks[: -(-length // self.block_size)].long()
        keys = self.keys[blocks, :heads].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
        values = self.values[blocks, :heads].transpose(0, 1).flatten(1, 2)
        return keys[:, :length, :key_dim], values[:, :length, :value_dim]


@dataclass(eq=False)
class Row:
    """The tokens of one forward, where they go, and how the row that they belong to looks.

    Attributes:
        places: int64[T], where each token's keys and values go; -1: nowhere.
        blocks: int32[blocks] of the row; None when the tokens are of several rows, flat.
        length: tokens of the row, the forward's included.
        updated: the layer that stored keys and values last.
    """

    places: torch.Tensor
    blocks: torch.Tensor | None = None
    length: int = 0
    updated: Pages | None = field(default=None, init=False)


class PagedLayer(CacheLayerMixin):
    """What `Cache` asks of a layer. A row's past is read from its pages; a flat batch gets its own tokens
    back, for its attention reads the pages itself."""

    is_sliding = False

    def __init__(self, pages: Pages, row: Row) -> None:
        super().__init__()
        self._pages, self._row = pages, row

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The pages are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, heads, T, dims]; all that attention is to look at, in the same form."""
        row, pages = self._row, self._pages
        pages.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), row.places)
        row.updated = pages
        if row.blocks is None:
            return key_states, value_states
        shape = (row.length, key_states.shape[1], key_states.shape[3], value_states.shape[3])
        keys, values = pages.read(row.blocks, *shape)
        return keys.unsqueeze(0), values.unsqueeze(0)

    def get_seq_length(self) -> int:
        """Tokens before this forward's."""
        return 0 if self._row.blocks is None else self._row.length - len(self._row.places)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens a mask is over, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None that the layer knows of."""
        return -1


def paged_cache(layers: list[Pages], row: Row) -> Cache:
    """The cache of one forward."""
    return Cache(layers=[PagedLayer(pages, row) for pages in layers])
