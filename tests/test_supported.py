"""The README's table of supported models is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import call
from torch import nn

from register_adapter import FAMILIES, UnsupportedModelError, add_registers
from register_adapter.towers import REFUSED, STACKS
from register_adapter.towers.supported import END, START, full_table, short_table

ROOT = Path(__file__).parents[1]
TABLES = {"README.md": short_table, "docs/families.md": full_table}


@pytest.mark.parametrize("document", TABLES)
def test_the_documents_hold_the_tables_of_the_registry(document: str) -> None:
    inside = (ROOT / document).read_text("utf-8").partition(START)[2].partition(END)[0].strip()
    assert inside == TABLES[document](), "run: make families"


def test_the_command_prints_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "families", "--full") == 0
    assert capsys.readouterr().out.strip() == full_table()
    document = tmp_path / "document.md"
    document.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert call(monkeypatch, "families", "--into", str(document)) == 0
    assert document.read_text() == f"before\n{START}\n{short_table()}\n{END}\nafter\n"
    document.write_text("no place")
    assert "no place for the table" in str(call(monkeypatch, "families", "--into", str(document)))
    assert document.read_text() == "no place"


def test_every_row_is_in_the_tables() -> None:
    names = [name.rpartition(".")[2] for name in (*FAMILIES, *STACKS)]
    assert all(f"{name}`" in full_table() for name in names)
    assert {anatomy.family for anatomy in FAMILIES.values()} <= set(re.findall(r"[\w-]+", short_table()))


def test_the_document_of_refused_models_is_the_tables() -> None:
    text = (ROOT / "docs" / "refused.md").read_text("utf-8")
    refused = text.partition("## Accepted")[0]
    assert set(re.findall(r"`([A-Z]\w+)`", refused)) - {"REFUSED"} == set(REFUSED)
    for reason in set(REFUSED.values()):
        assert f"## {reason[0].upper()}{reason[1:]}" in text


def test_no_family_is_both_supported_and_refused() -> None:
    assert not set(FAMILIES) & set(REFUSED)


def test_a_refused_model_is_named_with_its_reason() -> None:
    for name, reason in REFUSED.items():
        model = nn.Sequential(type(name, (nn.Linear,), {})(2, 2))
        with pytest.raises(UnsupportedModelError, match=re.escape(f"0 is a {name}, which is refused: {reason}")):
            add_registers(model)
