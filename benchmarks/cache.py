"""How fast a cache is written and read, beside parquet and Megatron-LM's way, and what its dtype costs a gradient.

    python -m benchmarks.cache

k = 64, 2^18 tokens in sequences of 512, warm page cache, median of 5 rounds in turn. Megatron-LM's logits saver keeps
each micro-batch as torch.save of fp16 values, uint16 indices and a 17th bit, compressed by zstd, in a tar.
"""

import importlib.util
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kdfast
from kdfast import TopKTargets, topk_targets
from kdfast.cache import TopKCache, TopKWriter

K, VOCAB, LENGTH, SEQUENCES, BATCH = 64, 32000, 512, 512, 8
ROUNDS = 5


def data() -> tuple[TopKTargets, Tensor]:
    """Rows of a Zipf teacher, without their logits: (sequences, length, k)."""
    shape = SEQUENCES, LENGTH
    mean = torch.log_softmax(-1.1 * torch.arange(1, VOCAB + 1.0).log(), -1)[:K] - 0.1
    log_probs = (mean + 0.05 * torch.randn(*shape, K)).sort(-1, descending=True).values
    return TopKTargets(torch.randint(VOCAB, (*shape, K), dtype=torch.int32), log_probs), torch.randint(VOCAB, shape)


def write_ours(path: Path, targets: TopKTargets, tokens: Tensor) -> None:
    with TopKWriter(path, k=K, vocab_size=VOCAB, rows_per_shard=2**17) as writer:
        for at in range(0, SEQUENCES, BATCH):
            writer.write(TopKTargets(*(x[at : at + BATCH] for x in targets)), tokens[at : at + BATCH])


def read_ours(path: Path) -> None:
    cache = TopKCache(path)
    for at in range(0, SEQUENCES, BATCH):
        cache.collate([cache[i] for i in range(at, at + BATCH)])


def write_parquet(path: Path, targets: TopKTargets, tokens: Tensor) -> None:
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    flat = {"indices": targets.indices, "log_probs": targets.log_probs.half()}
    columns = {name: [row.numpy() for row in x.view(SEQUENCES, -1)] for name, x in flat.items()}
    table = pyarrow.table({"token_ids": [row.numpy() for row in tokens], **columns})
    pyarrow.parquet.write_table(table, path / "rows.parquet", compression="zstd", row_group_size=BATCH)


def read_parquet(path: Path) -> None:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path / "rows.parquet").iter_batches(BATCH):
        for name in ("indices", "log_probs"):
            torch.from_numpy(batch.column(name).values.to_numpy(zero_copy_only=False).copy()).view(-1, LENGTH, K)


def write_megatron(path: Path, targets: TopKTargets, tokens: Tensor) -> None:
    import zstandard

    path.mkdir()
    compressor = zstandard.ZstdCompressor()
    with tarfile.open(path / "rows.tar", "w") as tar:
        for at in range(0, SEQUENCES, BATCH):
            indices, file = targets.indices[at : at + BATCH], io.BytesIO()
            low = (indices & 0xFFFF).to(torch.uint16)
            torch.save(
                {"values": targets.log_probs[at : at + BATCH].half(), "low": low, "bit": indices >> 16 > 0}, file
            )
            content = compressor.compress(file.getvalue())
            entry = tarfile.TarInfo(f"{at}.pt.zst")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def read_megatron(path: Path) -> None:
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    with tarfile.open(path / "rows.tar") as tar:
        for entry in tar:
            file = tar.extractfile(entry)
            assert file is not None
            found = torch.load(io.BytesIO(decompressor.decompress(file.read())))
            found["low"].to(torch.int32) + found["bit"].to(torch.int32) * 65536


WAYS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "kdfast.cache": (write_ours, read_ours),
    "parquet, zstd": (write_parquet, read_parquet),
    "tar of torch.save, zstd": (write_megatron, read_megatron),
}
if importlib.util.find_spec("zstandard") is None:  # of PyPI; no extra of kdfast's has it
    del WAYS["tar of torch.save, zstd"]


def speeds() -> dict[str, tuple[float, float, float]]:
    """Mtok/s written and read, and bytes a token."""
    targets, tokens = data()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    size = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS + 1):
            for name, (write, read) in WAYS.items():
                path = Path(folder) / f"{name}{turn}"
                start = time.perf_counter()
                write(path, targets, tokens)
                middle = time.perf_counter()
                read(path)
                seconds[name].append((middle - start, time.perf_counter() - middle))
                size[name] = sum(file.stat().st_size for file in path.iterdir()) / tokens.numel()
                for file in path.iterdir():
                    file.unlink()
    return {
        name: (*(tokens.numel() / 1e6 / statistics.median(x) for x in zip(*times[1:], strict=True)), size[name])
        for name, times in seconds.items()
    }


def gradient_errors() -> dict[str, list[float]]:
    """How far a row's gradient is off, of its size, by the dtype of the log-probabilities; KL of 8e-2, 3e-3, 1e-4."""
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(VOCAB) for _ in range(64)])
    teacher = (-1.1 * (order + 1.0).log()).double()
    errors: dict[str, list[float]] = {"float16": [], "bfloat16": []}
    for noise in (0.4, 0.0775, 0.0141):
        student = teacher + noise * torch.randn_like(teacher)
        exact = topk_targets(teacher, K)

        def gradient(targets: TopKTargets, student: Tensor = student) -> Tensor:
            leaf = student.clone().requires_grad_()
            kdfast.kd_loss(leaf, targets, divergence="forward_kl", reduction="sum").backward()
            assert leaf.grad is not None
            return leaf.grad

        want = gradient(exact)
        for name, found in errors.items():
            off = gradient(TopKTargets(exact.indices, exact.log_probs.to(getattr(torch, name)))) - want
            found.append(float((off.norm(dim=-1) / want.norm(dim=-1)).median()))
    return errors


def main() -> None:
    table = Table("", title=f"k = {K}, {SEQUENCES * LENGTH} tokens, {torch.get_num_threads()} threads")
    for column in ("written, Mtok/s", "read, Mtok/s", "bytes a token"):
        table.add_column(column, justify="right")
    for name, (written, read, size) in speeds().items():
        table.add_row(name, f"{written:.2f}", f"{read:.2f}", f"{size:.0f}")
    console = Console()
    console.print(table)
    table = Table("dtype", "at a KL of 8e-2", "3e-3", "1e-4", title="error of a row's gradient")
    for name, errors in gradient_errors().items():
        table.add_row(name, *(f"{error:.1%}" for error in errors))
    console.print(table)


if __name__ == "__main__":
    main()
