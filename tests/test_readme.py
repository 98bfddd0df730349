"""README's Python examples run as they stand there, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# A Python block, and the comment that may stand right above it: <!-- not run: needs the Hub -->
PYTHON_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
FOLDERS = r"(?:\.ci|benchmarks|examples|hub_cards|src|tests)"


def python_blocks() -> list[tuple[int, str, str | None]]:
    """(line, code, reason for not running it or None) of each Python block, in README's order."""
    text = README.read_text()
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in PYTHON_BLOCK.finditer(text)
    ]


@pytest.fixture
def checkout(tmp_path):
    """A folder in which README's relative paths lead to the examples, and what is written does no harm."""
    for folder in ("examples", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


def test_every_python_block_is_found():
    assert len(python_blocks()) == README.read_text().count("```python") > 0


def test_python_blocks_run_in_order(checkout):
    # Blocks share their variables, and stand on README's own line numbers in a traceback.
    script = "".join(
        f"exec(compile({chr(10) * (line - 1) + code!r}, 'README.md', 'exec'))\n"
        for line, code, reason in python_blocks()
        if reason is None
    )
    process = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", script],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


def test_only_blocks_that_need_the_network_are_not_run():
    for line, code, reason in python_blocks():
        if reason is not None:
            assert re.search(r"\b(Hub|network)\b", reason), f"README.md:{line}: {reason}"
            assert re.search(r"from_pretrained|push_to_hub|load_reid_dataset|load_person_images|load_dataset", code)
            compile(code, f"README.md:{line}", "exec")


def test_files_that_readme_names_exist():
    text = README.read_text()
    linked = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text))
    named = set(re.findall(rf"(?<![\w./-]){FOLDERS}/[\w./-]*\w", text))
    assert linked | named
    assert not {path for path in linked | named if not (ROOT / path).exists()}


def test_make_targets_that_readme_names_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", README.read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets
