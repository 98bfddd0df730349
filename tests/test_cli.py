import subprocess
import sys
from pathlib import Path

PERSONVIT = Path(sys.executable).with_name("personvit")


def personvit(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([PERSONVIT, *map(str, arguments)], capture_output=True, text=True)


def test_help_lists_the_commands():
    process = personvit("--help")
    assert process.returncode == 0
    assert "convert" in process.stdout


def test_wrong_input_is_one_line_without_a_traceback(tmp_path):
    process = personvit("convert", tmp_path / "missing.pth", tmp_path / "out")
    assert process.returncode == 1
    assert process.stderr.startswith("personvit: ") and "missing.pth" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_refused(tmp_path):
    process = personvit("convert", "a.pth", tmp_path, "--taget", "reid")
    assert process.returncode == 2
    assert "--taget" in process.stderr
