"""`python -m kdfast.cache info|verify|head PATH`: what a cache holds, whether it is whole, its first rows."""

import argparse
import sys

from kdfast.cache.format import CacheError
from kdfast.cache.reader import TopKCache


def info(cache: TopKCache) -> None:
    m = cache.manifest
    size = sum(shard.bytes for shard in m.shards)
    rows = [
        ("sequences", f"{m.sequences:,}"), ("tokens", f"{m.rows:,}"), ("entries a token", f"{m.k}"),
        ("classes", f"{m.vocab_size:,}"), ("temperature", f"{m.temperature:g}"), ("log-probabilities", m.dtype),
        ("shards", f"{len(m.shards):,}"), ("bytes", f"{size:,}"),
        ("bytes a token", f"{size / m.rows:.1f}" if m.rows else "-"),
        *((f"metadata: {name}", str(value)) for name, value in m.metadata.items()),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def head(cache: TopKCache, count: int) -> None:
    if not len(cache):
        print("no sequences")
        return
    tokens, targets = cache[0, :count]
    print("token    the teacher's most probable next tokens, with their probabilities")
    for token, indices, log_probs in zip(tokens, targets.indices, targets.log_probs.float(), strict=True):
        entries = [f"{i} {p:.3f}" for i, p in zip(indices[:5].tolist(), log_probs[:5].exp().tolist(), strict=True) if p]
        print(f"{int(token):<8} {', '.join(entries)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdfast.cache", description=__doc__)
    parser.add_argument("command", choices=("info", "verify", "head"))
    parser.add_argument("path")
    parser.add_argument("--rows", type=int, default=10, help="the rows that head shows (default: 10)")
    given = parser.parse_args(arguments)
    try:
        cache = TopKCache(given.path, verify="sha256" if given.command == "verify" else "size")
    except CacheError as error:
        print(error, file=sys.stderr)
        return 1
    if given.command == "info":
        info(cache)
    elif given.command == "head":
        head(cache, given.rows)
    else:
        print(f"{len(cache.manifest.shards)} shards are as they were written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
