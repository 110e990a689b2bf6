"""The sections of docs/trainers.md, and their code, which tests run."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def section(heading: str) -> str:
    """What is between this heading, of any level, and the next one of its level or above."""
    (found,) = re.findall(rf"^(#+) {re.escape(heading)}\n", PAGE.read_text(), re.MULTILINE)
    text = PAGE.read_text().split(f"\n{found} {heading}\n")[1]
    return re.split(rf"^#{{1,{len(found)}}} ", text, flags=re.MULTILINE)[0]


def blocks(heading: str) -> list[str]:
    """The Python blocks of a section that come before its next heading."""
    text = re.split(r"^#+ ", section(heading), flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
