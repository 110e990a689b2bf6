"""A teacher's top-k on disk: what is read is what was written, whatever stops the writer, or it is an error."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import TopKTargets, topk_targets
from kdfast.cache import CacheError, TopKCache, TopKWriter, read_distillkit
from kdfast.cache.__main__ import main
from kdfast.cache.rounding import round_down_to_a_distribution

VOCAB, K = 200, 8
LENGTHS = [30, 5, 0, 12, 30, 7]
OPTIONS: dict[str, Any] = {"k": K, "vocab_size": VOCAB, "metadata": {"teacher": "random"}, "rows_per_shard": 40}


def text() -> tuple[Tensor, Tensor]:
    """Logits (6, 30, V) and tokens (6, 30)."""
    torch.manual_seed(0)
    return 3 * torch.randn(6, 30, VOCAB), torch.randint(VOCAB, (6, 30))


def write(path: Path, **options: Any) -> TopKCache:
    logits, tokens = text()
    with TopKWriter(path, **(OPTIONS | options)) as writer:
        done = writer.sequences_done
        writer.write(logits[done:], tokens[done:], LENGTHS[done:])
    return TopKCache(path, verify="sha256")


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name != ".lock"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [VOCAB, 70_000])  # indices of 2 and of 4 bytes
def test_what_is_read_is_what_topk_targets_gives(tmp_path: Path, dtype: torch.dtype, vocab: int) -> None:
    logits, tokens = text()
    cache = write(tmp_path, dtype=dtype, vocab_size=vocab, temperature=2.0)
    want = topk_targets(logits, K, 2.0)
    assert len(cache) == 6
    assert cache.lengths.tolist() == LENGTHS
    for i, n in enumerate(LENGTHS):
        own_tokens, targets = cache[i]
        assert torch.equal(own_tokens, tokens[i, :n])
        assert torch.equal(targets.indices.long(), want.indices[i, :n])
        assert targets.log_probs.dtype == dtype
        rtol = 2**-10 if dtype == torch.float16 else 0
        torch.testing.assert_close(targets.log_probs.float(), want.log_probs[i, :n], rtol=rtol, atol=0)
    assert torch.equal(cache[-2].token_ids, tokens[4])
    assert torch.equal(cache[4, 3:8].targets.indices.long(), want.indices[4, 3:8])
    with pytest.raises(IndexError, match="6 is out of range: the cache has 6 sequences"):
        cache[6]


def test_a_student_trains_from_a_batch_of_the_cache(tmp_path: Path) -> None:
    logits, tokens = text()
    cache = write(tmp_path, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(cache, batch_size=3, collate_fn=cache.collate, num_workers=2)
    student = torch.randn(6, 30, VOCAB)
    losses = []
    for at, (token_ids, targets) in enumerate(loader):
        assert token_ids.shape == targets.indices.shape[:2] == (3, 30)
        s = student[3 * at : 3 * at + 3].requires_grad_()
        losses.append(kdfast.kd_loss(s, targets, reduction="none"))
    real = torch.arange(30) < torch.tensor(LENGTHS)[:, None]
    want = torch.where(real, kdfast.kd_loss(student, topk_targets(logits, K), reduction="none"), 0)
    torch.testing.assert_close(torch.cat(losses), want)
    assert cache.collate([cache[0]], length=4)[0].tolist() == [tokens[0, :4].tolist()]


def test_other_tokens_than_those_of_the_cache_are_an_error(tmp_path: Path) -> None:
    cache, (_, tokens) = write(tmp_path), text()
    cache.check(0, tokens[0])
    cache.check(1, tokens[1, :3])  # cut
    changed = tokens[0].clone()
    changed[17] = (changed[17] + 1) % VOCAB
    with pytest.raises(CacheError, match="sequence 0 has token .* at position 17"):
        cache.check(0, changed)
    with pytest.raises(CacheError, match="sequence 1 has token"):
        cache.collate([(0, tokens[0]), (1, tokens[2, :5])])
    with pytest.raises(CacheError, match="sequence 1 has 5 tokens in the cache, but 30 are given"):
        cache.check(1, torch.cat([tokens[1, :5], tokens[1, 5:]]))


def test_several_caches_are_one(tmp_path: Path) -> None:
    caches = [write(tmp_path / name) for name in "ab"]
    both = TopKCache.concat(caches)
    assert len(both) == 12
    assert both.lengths.tolist() == 2 * LENGTHS
    assert torch.equal(both[9].token_ids, caches[1][3].token_ids)
    other = write(tmp_path / "c", temperature=3.0)
    with pytest.raises(CacheError, match=r"temperature: one cache has 1\.0, another 3\.0"):
        TopKCache.concat([caches[0], other])


def test_a_cache_can_be_pickled(tmp_path: Path) -> None:
    cache = write(tmp_path)
    cache[0]  # opens a file
    assert torch.equal(pickle.loads(pickle.dumps(cache))[4].token_ids, cache[4].token_ids)


# ---- numbers ----


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 70), st.floats(0.05, 8))
def test_stored_log_probabilities_never_sum_up_to_more_than_1(seed: int, k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(spread * torch.randn(20, k, generator=generator), -1)
    stored = round_down_to_a_distribution(log_probs, torch.float16)
    assert (stored <= 0).all()
    assert (stored.double().exp().sum(-1) <= 1 + 1e-6 * (log_probs.double().exp().sum(-1) > 1)).all()
    near = log_probs.to(torch.float16)
    ulp = near.float() - torch.nextafter(near, torch.full_like(near, -torch.inf)).float()
    assert ((stored.float() == near.float()) | (near.float() - stored.float() <= ulp)).all()


def test_log_probabilities_below_float16_are_absent(tmp_path: Path) -> None:
    log_probs = torch.tensor([[[-0.1, -65504.0, -65505.0, -torch.inf]]])
    with TopKWriter(tmp_path, k=5, vocab_size=9) as writer:
        writer.write(TopKTargets(torch.tensor([[[3, 4, 5, 77]]]), log_probs), torch.tensor([[1]]))
    found = TopKCache(tmp_path)[0].targets.log_probs
    assert found.isinf().tolist() == [[False, False, True, True, True]]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=4), st.integers(1, 5), st.integers(1, 20))
def test_any_lengths_come_back(tmp_path: Path, batches: list[list[int]], k: int, rows_per_shard: int) -> None:
    path = tmp_path / str(len(list(tmp_path.iterdir())))
    torch.manual_seed(1)
    with TopKWriter(path, k=k, vocab_size=5, rows_per_shard=rows_per_shard) as writer:
        for lengths in batches:
            writer.write(torch.randn(len(lengths), 9, 5), torch.randint(5, (len(lengths), 9)), torch.tensor(lengths))
    cache = TopKCache(path)
    assert cache.lengths.tolist() == [n for lengths in batches for n in lengths]
    assert [len(sequence.token_ids) for sequence in cache] == cache.lengths.tolist()


# ---- interruptions ----


def die_at(call: int, kind: str) -> None:
    """Makes this process die at a call: before it, or in the middle of a file."""
    import safetensors.numpy

    left = call
    original = safetensors.numpy.save_file if kind == "save" else getattr(os, kind)

    def dying(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            if kind == "save":
                data = safetensors.numpy.save(args[0])
                args[1].write_bytes(data[: len(data) // 2])
            os._exit(9)
        return original(*args)

    setattr(safetensors.numpy if kind == "save" else os, "save_file" if kind == "save" else kind, dying)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is killed in a forked process")
@pytest.mark.parametrize("kind", ["save", "fsync", "replace"])
def test_a_writer_that_is_killed_and_resumed_leaves_the_same_bytes(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "whole")
    want = files(tmp_path / "whole")
    for call in range(30):
        path = tmp_path / f"{kind}{call}"
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # a forked process has none of the others
            die_at(call, kind)
            write(path)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        if (path / "manifest.json").exists():
            TopKCache(path, verify="sha256")  # as far as it goes, it is whole
        write(path, resume=True)
        assert files(path) == want
        if status == 0:
            break
    assert 2 <= call < 29, "the writer was killed at no call, or never finished"


def test_an_error_in_the_middle_leaves_what_the_manifest_names(tmp_path: Path) -> None:
    logits, tokens = text()
    with pytest.raises(KeyboardInterrupt), TopKWriter(tmp_path, **OPTIONS) as writer:
        writer.write(logits[:5], tokens[:5], LENGTHS[:5])
        raise KeyboardInterrupt
    assert len(TopKCache(tmp_path)) == 4  # 47 rows; the fifth sequence was not on disk yet
    write(tmp_path, resume=True)
    found = files(tmp_path)
    write(tmp_path / "whole")
    assert found == files(tmp_path / "whole")


def test_a_full_disk_leaves_what_the_manifest_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy

    def save(tensors: Any, path: Path) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    logits, tokens = text()
    writer = TopKWriter(tmp_path, **OPTIONS)
    writer.write(logits[:4], tokens[:4], LENGTHS[:4])
    monkeypatch.setattr(safetensors.numpy, "save_file", save)
    with pytest.raises(OSError, match=r"No space left.*4 sequences"):
        writer.write(logits[4:], tokens[4:], LENGTHS[4:])
        writer.close()
    monkeypatch.undo()
    assert len(TopKCache(tmp_path)) == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_two_writers_of_one_folder_are_an_error(tmp_path: Path) -> None:
    with TopKWriter(tmp_path, **OPTIONS), pytest.raises(BlockingIOError, match="another writer"):
        TopKWriter(tmp_path, **OPTIONS, resume=True)


def test_resuming_with_other_options_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileExistsError, match="holds a cache already; pass resume=True"):
        write(tmp_path)
    for other in ({"k": 9}, {"vocab_size": 300}, {"temperature": 2.0}, {"dtype": torch.float32}, {"metadata": {}}):
        (name,) = other
        with pytest.raises(CacheError, match=f"^{name}: .*, but the cache at"):
            write(tmp_path, resume=True, **other)
    assert len(write(tmp_path, resume=True)) == 6


# ---- damage ----


def shard_of(path: Path) -> Path:
    return path / "shard-00000.safetensors"


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    write(tmp_path)
    shard = shard_of(tmp_path)
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    TopKCache(tmp_path)
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors: its contents"):
        TopKCache(tmp_path, verify="sha256")
    shard.write_bytes(data[:-1])
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors: has \d+ bytes, but the manifest says \d+"):
        TopKCache(tmp_path)
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors: has"):
        TopKCache(tmp_path, verify=None)[0]
    shard.unlink()
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors: is missing"):
        TopKCache(tmp_path)


def change_manifest(path: Path, **changes: Any) -> None:
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    shards = changes.pop("shard", {})
    content |= changes
    content["shards"][0] |= shards
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2, but this kdfast reads version 1"),
        ({"k": 0}, "k is not what it may be"),
        ({"k": "many"}, "is not a manifest"),
        ({"dtype": "bfloat16"}, "dtype is not what it may be"),
        ({"temperature": float("nan")}, "temperature is not"),
        ({"shard": {"file": "../shard"}}, "shards is not"),
        ({"shard": {"rows": -1}}, "shards is not"),
    ],
    ids=str,
)
def test_a_wrong_manifest_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path)
    change_manifest(tmp_path, **changes)
    with pytest.raises(CacheError, match=message):
        TopKCache(tmp_path, verify=None)


def test_a_folder_without_a_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds no cache: it has no manifest\.json"):
        TopKCache(tmp_path)


def malicious(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


OFFSETS = {"offsets out of order": [0, 40, 5, 47, 47], "offsets beyond the rows": [0, 30, 35, 35, 2**40]}


@pytest.mark.parametrize("fault", ["header size", "no JSON", "data offsets", "shape", "dtype", *OFFSETS])
def test_a_malicious_shard_is_an_error(tmp_path: Path, fault: str) -> None:
    write(tmp_path)
    shard = shard_of(tmp_path)
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if fault == "header size":
        new = (2**62).to_bytes(8, "little") + data[8:]
    elif fault == "no JSON":
        new = data[:8] + b"x" * size + body
    elif fault == "data offsets":
        header["indices"]["data_offsets"] = [2**60, 2**60 + 47 * K * 2]
        new = malicious(header, body)
    elif fault == "shape":
        header["indices"]["shape"] = [2**61, K]
        new = malicious(header, body)
    elif fault == "dtype":
        header["indices"]["dtype"] = "F64"
        new = malicious(header, body)
    else:
        begin, end = header["offsets"]["data_offsets"]
        new = data[: 8 + size] + body[:begin] + np.array(OFFSETS[fault], np.int64).tobytes() + body[end:]
    shard.write_bytes(new)
    change_manifest(tmp_path, shard={"bytes": len(new)})
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors: "):
        TopKCache(tmp_path)[1]


# ---- wrong arguments ----

WRONG = {
    "bf16": ({"dtype": torch.bfloat16}, "dtype: torch.bfloat16 is refused: a gradient is 1.1 to 33 % off"),
    "a dtype": ({"dtype": torch.int8}, "dtype: torch.int8 is not torch.float16 or torch.float32"),
    "k": ({"k": 0}, r"k: 0 must lie in \[1, 200\]"),
    "k above V": ({"k": 201}, r"k: 201 must lie in \[1, 200\]"),
    "V": ({"vocab_size": 2**31}, "vocab_size: 2147483648 must lie in"),
    "T": ({"temperature": 0}, "temperature: 0 must be finite and > 0"),
    "metadata": ({"metadata": {"a": object()}}, "metadata: must be a dict of JSON's types"),
    "rows": ({"rows_per_shard": 0}, "rows_per_shard: 0 must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_errors(tmp_path: Path, case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        TopKWriter(tmp_path, **(OPTIONS | options))


def test_wrong_batches_are_errors(tmp_path: Path) -> None:
    logits, tokens = text()
    indices, log_probs = topk_targets(logits, K)
    with TopKWriter(tmp_path, **OPTIONS) as writer:
        for arguments, message in (
            ((TopKTargets(indices, log_probs), tokens[:, :5]), r"teacher: indices of shape \(6, 30, 8\)"),
            ((topk_targets(logits, 9), tokens), r"must be \(B, S, K\) with K in \[1, 8\]"),
            ((TopKTargets(indices + VOCAB, log_probs), tokens), "teacher: class 2.. with log-probability"),
            ((TopKTargets(indices, log_probs * torch.nan), tokens), "with log-probability nan"),
            ((logits, tokens, [31] * 6), r"lengths: must be 6 numbers in \[0, 30\]"),
            ((logits, tokens.float()), "token_ids: must be integers"),
            ((logits, tokens - 1000), r"token_ids: must be in \[0, 2\^31\)"),
            (([logits], tokens), "teacher: must be logits or kdfast.TopKTargets, not list"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                writer.write(*arguments)
        assert writer.sequences_done == 0
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.write(logits, tokens)


# ---- the rest ----


def test_a_reader_of_a_large_cache_stays_small(tmp_path: Path) -> None:
    """Ten GB in a sparse file, of which sequences all over are read."""
    rows, length = 10 * 2**30 // 386, 4096
    write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    header, at = {}, 0
    sequences = rows // length
    shapes = {
        "offsets": ("I64", [sequences + 1], 8), "indices": ("I32", [rows, 64], 4),
        "log_probs": ("F16", [rows, 64], 2), "token_ids": ("I32", [rows], 4),
    }  # fmt: skip
    for name, (dtype, shape, size) in shapes.items():
        count = int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    offsets = np.arange(sequences + 1, dtype=np.int64) * length
    offsets[-1] = rows
    start = malicious(header, offsets.tobytes())
    shard = shard_of(tmp_path)
    with shard.open("wb") as file:
        file.write(start)
        file.truncate(len(malicious(header, b"")) + at)
    one = content["shards"][0] | {"rows": rows, "sequences": sequences, "bytes": shard.stat().st_size}
    content |= {"k": 64, "vocab_size": 152_064, "shards": [one]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    program = (
        "import resource, sys; from kdfast.cache import TopKCache; cache = TopKCache(sys.argv[1]); cache[0]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for i in range(0, len(cache), 20): cache[i]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # kB


def test_the_command_tells_what_a_cache_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "sequences          6\n" in shown
    assert "metadata: teacher  random\n" in shown
    assert main(["verify", str(tmp_path)]) == 0
    assert "2 shards are as they were written" in capsys.readouterr().out
    assert main(["head", str(tmp_path), "--rows", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    shard_of(tmp_path).unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert "is missing" in capsys.readouterr().err


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'kdfast\[cache\]'"):
        TopKWriter(tmp_path, **OPTIONS)


def test_rows_of_distillkit_are_read_as_distillkit_reads_them(tmp_path: Path) -> None:
    """distillkit_rows.npz: rows that its LogprobCompressor has written, three configurations, and what it reads."""
    pyarrow = pytest.importorskip("pyarrow", reason="DistillKit's tables are parquet files, which pyarrow reads")
    parquet = pytest.importorskip("pyarrow.parquet")
    found = np.load(Path(__file__).with_name("distillkit_rows.npz"))
    for at in range(3):
        config = json.loads(str(found[f"config_{at}"]))
        columns = {name: [found[f"{name}_{at}"].tolist()] for name in ("compressed_logprobs", "bytepacked_indices")}
        kind = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
        schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.uint64())), *((name, kind) for name in columns)])
        table = pyarrow.table({"input_ids": [[5, 6, 7, 8, 9]], **columns}, schema=schema)
        parquet.write_table(table, tmp_path / f"{at}.parquet")
        for source in (table, tmp_path / f"{at}.parquet"):
            ((tokens, targets),) = read_distillkit(source, config)
            assert tokens.tolist() == [[5, 6, 7, 8, 9]]
            assert torch.equal(targets.indices[0], torch.from_numpy(found[f"indices_{at}"]))
            # they round the sums to the narrowest type, of which the second configuration has bfloat16
            tolerance = 2**-8 if config.get("exact_dtype") == "bfloat16" else 1e-6
            want = torch.from_numpy(found[f"log_probs_{at}"])
            torch.testing.assert_close(targets.log_probs[0], want, rtol=tolerance, atol=tolerance)
    with pytest.raises(CacheError, match="are shorter than the config says"):
        list(read_distillkit(table, config | {"k": 1000}))
    with pytest.raises(CacheError, match="config: has no 'd'"):
        list(read_distillkit(table, {}))
    with pytest.raises(CacheError, match="table: has no column 'compressed_logprobs'"):
        list(read_distillkit(table.drop(["compressed_logprobs"]), config))
