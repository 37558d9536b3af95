"""Every Python block of the training client's pages runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

import inft.client

PAGES = Path(inft.client.__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks():
    for page in (PAGES / "README.md", *sorted((PAGES / "docs").glob("*.md"))):
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            yield pytest.param(block, id=f"{page.stem}-{number}")


@pytest.mark.parametrize("block", blocks())
def test_a_block_runs_as_written(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INFT_BASE_URL", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert printed.strip()
    assert "nan" not in printed.split()


def test_links_between_the_pages_lead_somewhere():
    for page in (PAGES / "README.md", *(PAGES / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
