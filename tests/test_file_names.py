"""Names of files that are not UTF-8, or look like markup or a terminal's commands: read, and shown as text."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from torch import nn

from register_adapter.commands.output import collect_skipped, make_console, print_skipped
from register_adapter.commands.runs.fit import write_skipped
from register_adapter.data import DataArguments, ImageBatches, load_data, load_image
from register_adapter.data.datasets import read_image_folder
from register_adapter.testbed import load_image_processor
from register_adapter.training.launch import _messages
from register_adapter.utils.text import first_few, path_text, printable
from register_adapter.viz.page.markup import element

#: Names as bytes, and how they are shown.
NAMES = {
    b"\xe9t\xe9": r"\xe9t\xe9",
    b"[bold]x[": "[bold]x[",
    b"esc\x1b[31mred": r"esc\x1b[31mred",
    b"two\nlines": r"two\nlines",
    b"<b>&": "<b>&",
    b":warning:": ":warning:",
    "turned\u202e".encode(): r"turned\u202e",
    "日本 é".encode(): "日本 é",
}


class Tower(nn.Module):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values


def save(path: Path, seed: int = 0) -> None:
    values = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)
    with path.open("wb") as file:
        Image.fromarray(values).save(file, "PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, of odd names themselves: images of odd names, and as many bad files."""
    root = tmp_path / "images"
    for place in (b"a[b]", b"cl\xe9"):
        (root / os.fsdecode(place)).mkdir(parents=True)
        for index, name in enumerate(NAMES):
            path = root / os.fsdecode(place + b"/" + name)
            save(path.with_name(f"{path.name}.png"), index)
            path.with_name(f"{path.name}.bad").write_bytes(b"nothing")
    return root


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_and_its_file_is_read(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    save(path)
    assert printable(os.fsdecode(name)) == NAMES[name]
    assert printable(NAMES[name]).encode("utf-8")
    assert load_image(path_text(path)).size == (20, 20)
    path_text(path).encode("utf-8")


def test_text_keeps_what_it_is_told_to() -> None:
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable(7) == "7"
    assert first_few([str(number) for number in range(22)]).endswith("19; and 2 more")
    assert path_text("a b%20.png") == "a b%20.png"


def test_the_page_shows_names_as_text() -> None:
    assert element("p", "<b>\x1b\udce9\n", title="\x00\udce9") == '<p title="\\x00\\xe9">&lt;b&gt;\\x1b\\xe9\n</p>'


def test_a_console_interprets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    console = make_console()
    table = Table(title="[/title]:warning:")
    table.add_column("[red]heading")
    table.add_row("x[/b]\x1b[31m")
    console.print(table)
    console.print("[bold]x[/b] :warning: \udce9t\udce9\x1b]0;title\x07")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    texts = ["[/title]:warning:", "[red]heading", r"x[/b]\x1b[31m", r"[bold]x[/b] :warning: \xe9t\xe9\x1b]0;title\x07"]
    for text in texts:
        assert text in shown


def test_a_terminal_of_no_width_is_printed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    make_console().print("said")
    assert capsys.readouterr().out == "said\n"


def test_bad_files_are_listed_once_and_shortened(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index:02}.bad").write_bytes(b"")
    save(tmp_path / "good.png")
    with collect_skipped() as skipped:
        for _ in range(2):
            batches = ImageBatches(tmp_path, load_image_processor(), batch_size=4)
            assert len(list(batches.on(torch.device("cpu"), torch.float32, Tower()))) == 1
            batches.report_skipped()
    assert len(skipped) == 30
    assert capsys.readouterr().err == ""
    print_skipped(skipped, write_skipped(skipped, str(tmp_path / "out")))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "30 images are bad and skipped:"
    assert said[-1] == f"  and 10 more; all are named in {tmp_path / 'out' / 'skipped.txt'}"
    assert (tmp_path / "out" / "skipped.txt").read_text().splitlines() == skipped
    write_skipped([], str(tmp_path / "out"))
    assert not (tmp_path / "out" / "skipped.txt").exists()
    print_skipped(skipped, None)
    assert len(capsys.readouterr().err.splitlines()) == 31


def test_a_command_shows_every_name_as_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x[b]\x1b[31m"
    assert call(monkeypatch, "audit", "planted", str(folder), "--out", str(out)) == 0
    shown = capfd.readouterr()
    assert "\x1b[31m" not in shown.out + shown.err
    assert r"x[b]\x1b[31m" in shown.out.replace("\n", "")
    named = json.loads((out / "audit.json").read_text())["reports"][0]["environment"]["skipped"]
    assert len(named) == 2 * len(NAMES)
    for line in named:
        assert shown.err.count(f"{line}\n") == 1
    # The list comes after the bar.
    assert shown.err.rindex("image/s") < shown.err.index("images are bad")
    assert call(monkeypatch, "audit", "planted", f"{folder}\x1b[31m", "--out", str(out)) == (
        f"error: {folder}\\x1b[31m is neither a folder nor a file"
    )


def test_a_training_set_takes_names_that_are_not_utf8(folder: Path) -> None:
    data = load_data(DataArguments(train_dir=str(folder)), progress=False)
    assert data.labels == ["a[b]", r"cl\xe9"]
    assert len(data.train) + len(data.validation) == 2 * len(NAMES)
    assert len(data.skipped) == 2 * len(NAMES)
    shown = "".join(data.skipped)
    assert all(name in shown for name in NAMES.values())
    assert printable(shown) == shown
    again = read_image_folder(folder, data.labels)
    assert sum(load_image(item["image"]).width == 20 for item in again if "bad" not in item["image"]["path"]) == 16


def test_class_folders_that_are_shown_as_one_are_refused(tmp_path: Path) -> None:
    for name in (b"a\nb", rb"a\nb", b"c"):
        (tmp_path / os.fsdecode(name)).mkdir()
    with pytest.raises(ValueError, match=re.escape(r"2 class folders that are shown as 'a\\nb': [b'a\nb', b'a\\nb']")):
        read_image_folder(tmp_path)


def test_training_says_every_name_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Or pytest keeps the record for its report, which workers of pytest-xdist cannot send.
    monkeypatch.setattr(logging.getLogger("register_adapter"), "propagate", False)
    said = "/out/\x1b[31mred\udce9 holds\ntwo lines \u202e"
    with _messages(is_main_process=True, quiet=False):
        logging.getLogger("register_adapter.training").error("%s", said)
    assert capsys.readouterr().err == "ERROR: /out/\\x1b[31mred\\xe9 holds\ntwo lines \\u202e\n"
