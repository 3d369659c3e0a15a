"""Examples in the documents run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/feedback.md"])
def test_every_python_block_runs_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = ROOT / name
    text = document.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, "no example"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # Blank lines before the code make a traceback name the line of the document.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(document), "exec"), names)
