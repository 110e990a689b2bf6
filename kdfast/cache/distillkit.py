"""Reads the compressed log-probabilities of DistillKit's data sets (arcee-ai, distillkit/compression).

A row of its tables is a sequence; of each token `compressed_logprobs` has, byte after byte,

    exact      exact_k numbers of exact_dtype: the highest log-probabilities
    terms      the coefficients, of term_dtype, of a polynomial in the place among the rest: sum_j c_j * f_j(place)
    bins       what the polynomial leaves: for each bin its scale, then num_elements whole numbers of element_bits bits,
               which the scale multiplies

and, with delta_encoding, all of these are differences, whose running sums are the log-probabilities. Places are 0, 1, 2
... or, with normalize_t, 0 to 1. `bytepacked_indices` has k whole numbers of ceil(log2(d)) bits. Bits are packed from
the highest on.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.cache.format import CacheError
from kdfast.sparse import TopKTargets

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def read_distillkit(table: Any, config: Mapping[str, Any]) -> Iterator[tuple[Tensor, TopKTargets]]:
    """The sequences of a table, one after the other, as TopKWriter.write takes them, one to a batch.

    Args:
        table: a pyarrow.Table, or the path of a parquet file or of a folder of them (needs pyarrow).
        config: the contents of the data set's `compression_config.yaml`.

    Yields:
        (1, S) token ids and TopKTargets of (1, S, k).

    Examples:
        >>> for token_ids, targets in read_distillkit("data", yaml.safe_load(open("compression_config.yaml"))):
        ...     writer.write(targets, token_ids)
    """
    for name in ("d", "k", "exact_k", "residual_bins"):
        if name not in config:
            raise CacheError(f"config: has no {name!r}; it must be a compression_config.yaml of DistillKit")
    for token_ids, values, indices in _rows(table):
        count = len(token_ids)
        log_probs = _decode(_matrix(values, count), config)
        bits = math.ceil(math.log2(config["d"]))
        classes = _unpack(_matrix(indices, count), bits, config["k"])
        yield (
            torch.from_numpy(np.asarray(token_ids.values).astype(np.int64)).view(1, count),
            TopKTargets(classes.unsqueeze(0), log_probs.unsqueeze(0)),
        )


def _rows(table: Any) -> Iterator[tuple[Any, Any, Any]]:
    names = ["input_ids", "compressed_logprobs", "bytepacked_indices"]
    if isinstance(table, (str, bytes)) or hasattr(table, "__fspath__"):
        try:
            import pyarrow.dataset
        except ImportError:
            raise ImportError("read_distillkit needs pyarrow to read parquet files: pip install pyarrow") from None
        batches = pyarrow.dataset.dataset(table, format="parquet").to_batches(columns=names)
    else:
        batches = table.to_batches()
    for batch in batches:
        missing = [name for name in names if name not in batch.schema.names]
        if missing:
            raise CacheError(f"table: has no column {missing[0]!r}; it must have {', '.join(names)}")
        for row in range(batch.num_rows):
            yield tuple(batch.column(name)[row] for name in names)


def _matrix(column: Any, rows: int) -> Tensor:
    """(rows, bytes) uint8, of a list of lists."""
    flat = np.asarray(column.values.flatten()).astype(np.uint8)
    if rows == 0 or len(flat) % rows or len(column) != rows:
        raise CacheError(f"table: {len(column)} rows of {len(flat)} bytes in all do not go with {rows} tokens")
    return torch.from_numpy(flat.reshape(rows, -1))


def _take(data: Tensor, at: int, count: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(rows, count) numbers that lie `at` bytes into each row, and where they end."""
    end = at + count * dtype.itemsize
    if end > data.shape[1]:
        raise CacheError(f"table: rows of {data.shape[1]} bytes are shorter than the config says")
    part = data[:, at:end].reshape(-1).clone()  # at the beginning of its memory, as a view of another dtype needs it
    return part.view(dtype).view(len(data), count), end


def _unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """(rows, count) whole numbers of some bits each."""
    if data.shape[1] * 8 < bits * count:
        raise CacheError(f"table: rows of {data.shape[1]} bytes are shorter than the config says")
    digits = np.unpackbits(data.numpy(), axis=1, count=bits * count).reshape(len(data), count, bits)
    return torch.from_numpy(digits.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)))


def _decode(data: Tensor, config: Mapping[str, Any]) -> Tensor:
    """(rows, bytes) to log-probabilities, (rows, k) float32."""
    exact, at = _take(data, 0, config["exact_k"], _DTYPES[config.get("exact_dtype", "float32")])
    places = config["k"] - config["exact_k"]
    rest = torch.zeros(len(data), places)
    terms = config.get("polynomial_terms") or []
    if terms:
        dtype = _DTYPES[config.get("term_dtype", "float32")]
        coefficients, at = _take(data, at, len(terms), dtype)
        x = (
            torch.linspace(0, 1, places, dtype=dtype)
            if config.get("normalize_t")
            else torch.arange(places, dtype=dtype)
        )
        functions = [x**term if isinstance(term, int) else getattr(torch, term)(x) for term in terms]
        rest += (torch.stack(functions) * coefficients.unsqueeze(-1)).sum(1).float()
    first = 0
    for each in config["residual_bins"]:
        bits, count = each["element_bits"], each["num_elements"]
        scale, at = _take(data, at, 1, _DTYPES[each["scale_dtype"]])
        end = at + (bits * count + 7) // 8
        whole = _unpack(data[:, at:end], bits, count)
        at = end
        values = whole * 2 - 1 if bits == 1 else whole - (1 << (bits - 1))
        rest[:, first : first + count] += values * scale.float()
        first += count
    log_probs = torch.cat([exact.float(), rest], 1)
    return log_probs.cumsum(1) if config.get("delta_encoding", True) else log_probs
