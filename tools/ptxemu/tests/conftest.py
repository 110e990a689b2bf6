import os
import sys

sys.dont_write_bytecode = True
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import both_ways  # noqa: E402
from ptxemu.pytest_plugin import gpu  # noqa: E402,F401

both_ways.install()
