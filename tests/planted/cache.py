"""The cache of a teacher's top k."""

from planted.mutant import Mutant

TESTS = ("test_cache.py",)
WRITER, READER = "kdfast/cache/writer.py", "kdfast/cache/reader.py"
FORMAT, ROUNDING = "kdfast/cache/format.py", "kdfast/cache/rounding.py"

MUTANTS = [
    Mutant("cache-rounds-to-nearest", ROUNDING,
           "    if not len(at_risk):\n", "    if True:\n",
           "A row's probabilities sum up to more than 1 after rounding.", TESTS),
    Mutant("cache-writes-what-an-error-left", WRITER,
           "        if error is None:\n", "        if True:\n",
           "An interrupted writer leaves a shorter shard, so that a resumed cache has other bytes.", TESTS),
    Mutant("cache-digest", FORMAT,
           "        digest = file_sha256(temporary)\n", "        digest = name\n",
           "The manifest has another digest than the file's.", TESTS),
    Mutant("cache-end-of-offsets", READER,
           " or offsets[-1] != shard.rows", "",
           "Sequences that end beyond a shard's rows are read.", TESTS),
    Mutant("cache-order-of-offsets", READER,
           " or (np.diff(offsets) < 0).any()", "",
           "Sequences whose offsets are out of order are read.", TESTS),
    Mutant("cache-other-tokens", READER,
           "own[:n].to(token_ids.dtype) != token_ids.cpu()[: len(own)]", "own[:0] != own[:0]",
           "A cache of another text is taken for this one's.", TESTS),
]  # fmt: skip
