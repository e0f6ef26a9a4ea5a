"""What texts tell a user to install: nothing on PyPI has the package's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from register_adapter.errors import MissingExtraError, install_command

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(ROOT / "register_adapter").rglob("*.py"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "examples").glob("*.py"),
    ROOT / "README.md",
    ROOT / "SECURITY.md",
]
#: Up to the next command, so that the address may stand on the next line.
COMMAND = re.compile(r"pip\s+install[^`\n]*")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_text_installs_the_package_by_its_name_alone(path: Path) -> None:
    for command in COMMAND.findall(path.read_text("utf-8")):
        assert "register-adapter" not in command or "git+https://" in command, command


def test_commands_name_the_repository_and_the_extra() -> None:
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    source = f"git+{project['urls']['Repository']}"
    assert install_command() == f"pip install {source}"
    assert install_command(upgrade=True) == f"pip install -U {source}"
    for extra in project["optional-dependencies"]:
        command = f'pip install "register-adapter[{extra}] @ {source}"'
        assert install_command(extra) == command
        assert str(MissingExtraError("figures", "matplotlib", extra)).endswith(f"'matplotlib': {command}")


def test_the_first_pages_say_how_to_install_it() -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert f"    {install_command('demo')}\n" in path.read_text("utf-8")
