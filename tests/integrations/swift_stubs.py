"""Import it before ms-swift's trainers: it stands in for modules that they import and these tests do not use.

trl.experimental.ppo is gone since TRL 1, and mcore_bridge needs Transformer Engine, which is for CUDA alone.
"""

import importlib.machinery
import sys
import types
from typing import Any
from unittest.mock import MagicMock

import trl


class Anything(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Finder:
    """Of mcore_bridge and all modules in it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> Any:
        if name.split(".")[0] == "mcore_bridge":
            return importlib.machinery.ModuleSpec(name, Finder(), is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


ppo = types.ModuleType("trl.experimental.ppo")
ppo.PPOConfig = type("PPOConfig", (trl.SFTConfig,), {})
sys.modules[ppo.__name__] = ppo
sys.meta_path.insert(0, Finder())
