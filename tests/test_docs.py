"""The documentation keeps its word: files, flags and tests that it names exist."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Lines of code blocks that start one of the project's scripts, continuation lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"\b(train|eval|data|models)/\w+\.py\b", line):
                    found.append(" ".join(line.split("#")[0].split()))
    return sorted(set(found))


def test_there_are_commands() -> None:
    assert len(commands()) >= 8


@functools.cache
def help_text(*command: str) -> str:
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_named_scripts_take_the_flags_shown(command: str) -> None:
    script = re.search(r"\b((?:train|eval|data|models)/\w+\.py)((?: \w+)?)", command)
    assert script is not None
    own = command[script.end(1) :]
    launcher = command[: script.start()]
    for file in re.findall(r"(?:train|data|eval)/[\w/.]+\.(?:yaml|py)", command):
        assert (ROOT / file).is_file(), file
    subcommand = [script.group(2).strip()] if script.group(2) and "--" not in script.group(2) else []
    shown = help_text(script.group(1), *subcommand)
    for flag in re.findall(r"--\w+", own):
        assert re.search(rf"{flag}\b(?!_)", shown), f"{flag} is no flag of {script.group(1)}"
    if "accelerate launch" in launcher:
        from accelerate.commands.launch import launch_command_parser

        known = {option for action in launch_command_parser()._actions for option in action.option_strings}
        assert set(re.findall(r"--\w+", launcher)) <= known


def test_pages_are_written() -> None:
    assert all(len(page.read_text()) > 500 for page in PAGES)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tests_named_for_faults_exist() -> None:
    defined = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "faults.md").read_text()))
    assert len(named) > 40
    assert named <= defined, named - defined
