"""The Python examples of README and of docs/*.md run as they stand there, and what the pages name exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from personvit_hf.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]

# A Python block, and the comment that may stand right above it: <!-- not run: needs the Hub -->
PYTHON_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
FOLDERS = r"(?:\.ci|benchmarks|examples|hub_cards|src|tests)"


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def python_blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """(line, code, reason for not running it or None) of each Python block, in the page's order."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in PYTHON_BLOCK.finditer(text)
    ]


@pytest.fixture
def checkout(tmp_path):
    """A folder in which README's paths lead to the examples, and what is written does no harm."""
    for folder in ("examples", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


@each(WITH_PYTHON)
def test_every_python_block_is_found(page):
    assert len(python_blocks(page)) == page.read_text().count("```python") > 0


@each([page for page in WITH_PYTHON if any(reason is None for *_, reason in python_blocks(page))])
def test_python_blocks_run_in_order(checkout, page):
    # A page's blocks share their variables, and stand on its own line numbers in a traceback.
    script = "".join(
        f"exec(compile({chr(10) * (line - 1) + code!r}, {page.name!r}, 'exec'))\n"
        for line, code, reason in python_blocks(page)
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


@each(WITH_PYTHON)
def test_only_blocks_that_need_the_network_are_not_run(page):
    for line, code, reason in python_blocks(page):
        if reason is not None:
            assert re.search(r"\b(Hub|network)\b", reason), f"{page.name}:{line}: {reason}"
            assert re.search(r"from_pretrained|push_to_hub|load_reid_dataset|load_person_images|load_dataset", code)
            compile(code, f"{page.name}:{line}", "exec")


@each(PAGES)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    linked = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text))
    named = set(re.findall(rf"(?<![\w./-]){FOLDERS}/[\w./-]*\w", text))
    assert not {path for path in linked if not (page.parent / path).exists()}
    assert not {path for path in named if not (ROOT / path).exists()}


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README.read_text()))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES[1:]}


@each(PAGES)
def test_flags_of_personvit_that_a_page_shows_exist(page):
    """Each `personvit COMMAND --flag ...` of a shell block is one that the command has."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["personvit"]:
            continue
        command = typer.main.get_command(app)
        for word in words[1:]:
            if not hasattr(command, "commands"):
                break
            command = command.commands[word]
        known = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_make_targets_that_readme_names_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", README.read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets
