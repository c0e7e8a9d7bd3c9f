"""The work of a step's attention, cut into equal tasks on the host: numpy, no device.

A decode's context is cut into splits of SPLIT tokens wherever it stands in a batch, and a prompt's chunk into tiles of
TILE tokens, so that what is computed for a row never depends on the other rows. Kernels walk the lists; their grids
depend on no length.
"""

from __future__ import annotations

import numpy as np

SPLIT = 256  # tokens of a context that one task of a decode reads
TILE = 128  # tokens of a prompt that one task of a prefill computes


def decode_splits(context_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (D,) context lengths, one a decode: (W, 2) int32, row and split of it, row by row; and (D + 1,) int32.

    Those of row i are [starts[i], starts[i + 1]). A row of length 0 has none.
    """
    counts = -(-context_lens.astype(np.int64) // SPLIT)
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return _pairs(counts, starts), starts


def prefill_tiles(counts: np.ndarray, num_decodes: int) -> np.ndarray:
    """Of (R,) tokens a row: (N, 2) int32, row and the first of its tokens, of rows from ``num_decodes`` on."""
    num_tiles = -(-counts[num_decodes:].astype(np.int64) // TILE)
    tiles = _pairs(num_tiles, np.cumsum(num_tiles) - num_tiles)
    return tiles * np.array([1, TILE], dtype=np.int32) + np.array([num_decodes, 0], dtype=np.int32)


def max_splits(num_rows: int, max_context_len: int, num_tokens: int) -> int:
    """How many splits ``num_rows`` decodes can have, none longer than ``max_context_len``, ``num_tokens`` in all.

    Contexts that share pages count each token as often as it is shared.
    """
    return min(num_rows * -(-max_context_len // SPLIT), num_rows + num_tokens // SPLIT)


def _pairs(counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(row, 0), (row, 1) … for each row as often as counted."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return np.stack((rows, np.arange(len(rows)) - starts[rows]), axis=1).astype(np.int32)
