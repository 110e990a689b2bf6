"""A teacher's most probable classes on disk: written once, read in every training. Needs safetensors, kdfast[cache]."""

from kdfast.cache.distillkit import read_distillkit
from kdfast.cache.format import CacheError
from kdfast.cache.reader import CachedSequence, TopKCache
from kdfast.cache.writer import TopKWriter

__all__ = ["CacheError", "CachedSequence", "TopKCache", "TopKWriter", "read_distillkit"]
