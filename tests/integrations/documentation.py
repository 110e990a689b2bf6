"""The code of docs/trainers.md, which tests run."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(heading: str) -> list[str]:
    """The Python blocks between this heading, of any level, and the next one.

    The page's sections are files of their own, docs/trainers-*.part.md, until they are put together.
    """
    for page in (DOCS / "trainers.md", *DOCS.glob("trainers-*.part.md")):
        text = page.read_text() if page.exists() else ""
        if found := re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE):
            return re.findall(r"^```python\n(.*?)^```", found[1], re.DOTALL | re.MULTILINE)
    raise ValueError(f"heading: {heading!r} is not in docs/trainers.md")
