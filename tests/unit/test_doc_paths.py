"""Every file and folder that the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "shards/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMED = re.compile(r"`((?:uniemox_dist|shards|launch|slurm|tools|tests|docs)/[\w./-]+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_existing_files(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = {name for name in NAMED.findall(text) if not name.endswith("...")}
    missing = {name for name in named if not (ROOT / name).exists()}
    missing |= {link for link in LINK.findall(text) if not ((ROOT / document).parent / link).exists()}
    assert missing == set()


def test_the_architecture_names_the_packages_in_the_order_of_imports() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(?:uniemox_dist/)?(\w+)` \|", text, re.M)
    source = (ROOT / "tests/unit/test_imports.py").read_text(encoding="utf-8")
    order = re.search(r"^ORDER = \((.*?)^\)", source, re.M | re.S)
    assert order is not None
    assert rows == re.findall(r'"(\w+)"', order.group(1))
