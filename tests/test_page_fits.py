"""A page tells what to do next and what is seen, fits its width, and shows zero registers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from page_cases import make_report

from register_adapter import ArtifactReport, add_registers, audit
from register_adapter.artifacts.report import GatheredAttention
from register_adapter.viz import (
    Example,
    plot_attention,
    plot_before_after,
    plot_norm_maps,
    plot_registers,
    read_examples,
    read_maps,
    write_page,
)
from register_adapter.viz.page import Origin
from register_adapter.viz.page.seen import colours_seen, peak_seen


def _page(tmp_path: Path, report: ArtifactReport, examples: Sequence[Example] = (), **options: Any) -> str:
    return write_page(tmp_path / "page.html", report, examples, **options).read_text("utf-8")


def _unexplained() -> ArtifactReport:
    report = make_report(first=None)
    layers = list(report.layers)
    layers[2] = replace(layers[2], gathered=GatheredAttention(0.016, 0.87, 4.0))
    return replace(report, layers=layers)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_registers(build("vit"), 2).eval()
        return read_examples(
            {"base": (model, None), "two": (model, "default")}, torch.randn(1, 3, 32, 40), names=["cat"]
        )


# What to do next


@pytest.mark.parametrize(
    ("report", "steps"),
    [
        (make_report(first=None), ["Leave it: it needs no registers"]),
        (make_report(first=None, registers=2), ["Leave it: with these registers"]),
        (
            replace(make_report(), rule="auto"),
            [
                "register-adapter fit 'my model' photos --out fitted --max-images 9<",
                "register-adapter audit 'my model' photos --adapter fitted --max-images 9<",
            ],
        ),
        (make_report(), ["fit 'my model' photos --out fitted --rule mad --max-images 9<"]),
        (make_report(registers=2), ["These registers leave artifacts", "fit 'my model' photos"]),
        (_unexplained(), ["attention maps", "audit 'my model' photos --rule sigma"]),
    ],
    ids=["none", "repaired", "present", "the same rule", "left", "attention"],
)
def test_what_to_do_next(report: ArtifactReport, steps: list[str], tmp_path: Path) -> None:
    text = unescape(_page(tmp_path, report, origin=Origin("my model", "photos", 9)))
    assert text.count("What to do next") == 1
    for step in steps:
        assert step in text
    assert ("Leave it" in text) == (report.verdict == "none" and not report.unexplained)


def test_patches_that_draw_the_attention_take_the_good_sign_away(tmp_path: Path) -> None:
    text = _page(tmp_path, _unexplained())
    assert "No outlying norms, but a few patches draw most of the attention" in text
    assert "87% to 1.60%, block 2" in text
    assert 'class="card good"' not in text


# What is seen


def test_a_map_in_words() -> None:
    values = np.zeros((6, 9))
    values[0, 8] = 0.5
    assert peak_seen(values, ".0%") == "6 × 9 patches, largest 50% in row 1, column 9 (upper right), median 0%"
    assert "(middle)" in peak_seen(np.eye(3) * [0, 1, 0])
    assert peak_seen(np.zeros((2, 3))) == "2 × 3 patches, all 0"
    assert peak_seen(np.array([[np.nan, 1.0]])).startswith("1 × 2 patches, largest 1 in row 1, column 2")
    assert colours_seen(np.array([[[1, 0, 0], [0, 0, 1]]])) == "1 × 2 patches, 50% mostly red, 50% mostly blue"


def test_alternative_texts_say_what_is_seen_and_every_map_has_its_colour_bar(
    examples: list[Example], tmp_path: Path
) -> None:
    text = _page(tmp_path, make_report(), examples)
    maps = re.findall(r'<img[^>]*alt="([^"]*)"[^>]*class="map"[^>]*>(.{0,60})', text)
    assert len(maps) > 20
    for alt, behind in maps:
        if "Principal" in alt:
            assert "mostly" in alt
        else:
            assert re.search(r"patches, (largest .* in row \d+, column \d+|all 0)", alt), alt
            assert 'class="range"' in behind, alt
    assert 'alt="The image cat, 40 × 32 pixels"' in text
    charts = re.findall(r'<svg[^>]*aria-label="([^"]*)"', text)
    assert any("the median goes from" in label and "thresholds are drawn at layers 3, 4" in label for label in charts)
    assert any("outliers receive at most" in label for label in charts)


def test_lines_are_thresholds(examples: list[Example], tmp_path: Path) -> None:
    text = _page(tmp_path, make_report(), examples)
    assert not re.search(r"\bcuts?\b", re.sub(r'src="[^"]*"', "", text))
    assert 'class="threshold"' in text
    assert ".threshold {" in text
    assert 'class="key threshold"' in text


@pytest.mark.parametrize("draw", [plot_attention, plot_norm_maps, plot_registers], ids=lambda draw: draw.__name__)
@pytest.mark.slow
def test_figures_have_a_colour_bar_and_the_ends_of_each_map(draw: Any, examples: list[Example]) -> None:
    figure = draw(examples[0])
    ticks = [[label.get_text() for label in axis.get_xticklabels()] for axis in figure.axes]
    assert ["0", "largest of each map"] in ticks
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles
    assert all("\n0 to " in title for title in titles)


def test_a_comparison_has_a_colour_bar_for_norms_and_one_for_attention() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixels = torch.randn(2, 3, 32, 32)
        maps = read_maps("base", build("vit").eval(), pixels)
    figure = plot_before_after([np.zeros((32, 32, 3), np.uint8)] * 2, [maps])
    labels = {axis.get_xlabel() for axis in figure.axes}
    assert "share of the attention that a patch receives" in labels
    assert any(label.startswith("L2 norm") for label in labels)
    assert sum(label.startswith("0 to ") for label in labels) == 2


# What a page must bear


def test_registers_that_are_zero(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_registers(build("vit"), 1, init="zeros").eval()
        pixels = torch.randn(4, 3, 32, 32)
    report = audit(model, pixels, progress=False)
    assert report.layers[0].norms["register"].quantiles["1"] == 0
    example = read_examples({"zero": (model, "default")}, pixels[:1])
    assert "median of registers" in _page(tmp_path, report, example)
    plot_registers(example[0], path=tmp_path / "registers.png")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_table_of_layers_fits(width: int, examples: list[Example], tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(names)}")
    interface = pytest.importorskip("playwright.sync_api")
    path = write_page(tmp_path / "page.html", make_report(layers=13), examples)
    with interface.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto(path.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
        page = tab.evaluate("document.documentElement.scrollWidth")
        boxes = tab.evaluate(
            "[...document.querySelectorAll('.scroll')].map((box) => [box.ariaLabel, box.scrollWidth, box.clientWidth])"
        )
        browser.close()
    assert page <= width
    wide = {label: (inner, outer) for label, inner, outer in boxes if inner > outer}
    assert "Layer by layer" not in wide or width < 1280, wide
    assert all(inner < 1200 for inner, _ in wide.values()), wide
