"""The page of an audit, read as a file and opened from disk in a real browser without a window."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from page_cases import make_report

from register_adapter import add_registers, audit
from register_adapter.artifacts import Threshold
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit
from register_adapter.viz import Example, read_examples, write_page
from register_adapter.viz.page.tables import Table, show_table

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def _examples(names: tuple[str, ...]) -> list[Example]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_registers(build("vit"), 2).eval()
    subjects = {name: (model, "default" if place else None) for place, name in enumerate(names)}
    pixels = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    return read_examples(subjects, pixels, names=["a cat", HOSTILE])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them of a hostile name, with images, and a table of a caller's own."""
    reports = [make_report(), make_report(HOSTILE, first=None, registers=2)]
    table = Table("Probes", ["token", "top-1"], [["normal", 0.5], [HOSTILE, 0.25], ["CLS", None]])
    path = tmp_path_factory.mktemp("report") / "deep" / "index.html"
    return write_page(path, reports, _examples(("planted", HOSTILE)), title=f"Audit {HOSTILE}", tables=[table])


# As a file


class _Reader(HTMLParser):
    """Tags with their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))


def test_it_is_well_formed_and_every_name_is_text(page: Path) -> None:
    reader = _Reader(page.read_text("utf-8"))
    assert reader.open == []
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 1
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    for tag in ("h1", "h3", "h4", "td", "figcaption"):
        assert any(HOSTILE in words for kind, words in reader.words if kind == tag), tag
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert {f"#{name}" for name in ids} == set(links)


def test_everything_is_inside(page: Path) -> None:
    text = page.read_text("utf-8")
    reader = _Reader(text)
    for _, attributes in reader.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_every_image_and_chart_has_a_text_instead(page: Path) -> None:
    reader = _Reader(page.read_text("utf-8"))
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    charts = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert len(images) > 40
    assert len(charts) == 2 * (5 + 2)
    assert all(len(attributes["alt"] or "") > 5 for attributes in images)
    assert all(attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20 for attributes in charts)


def test_it_says_what_was_found(page: Path) -> None:
    report = make_report()
    text = page.read_text("utf-8")
    for words in (report.reason, "Artifacts at the output", "No artifacts", *report.definitions.values(), "2.15.0"):
        assert words in text
    assert f"{report.layers[-1].outlier_share:.2%}" in text
    assert text.index("Artifacts at the output") < text.index("Patch norms by layer") < text.index("<h2>Definitions")


def test_it_repeats_byte_for_byte(tmp_path: Path) -> None:
    paths = [write_page(tmp_path / name, make_report(), _examples(("a", "b"))) for name in ("1.html", "2.html")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    (example, _) = _examples(("a", "b"))
    noise = np.random.default_rng(0).integers(0, 255, (3000, 2000, 3), dtype=np.uint8)
    path = write_page(tmp_path / "page.html", make_report(), [replace(example, image=noise)] * 4)
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("verdict", ["none", "present", "present inside only"])
def test_reports_that_lack_what_was_not_measured(verdict: Any, tmp_path: Path) -> None:
    """No attention statistics, no places, no CLS, no definitions, one layer only."""
    report = make_report(layers=1, first=0)
    (layer,) = report.layers
    bare = replace(
        layer,
        norms={"patch": layer.norms["patch"]},
        threshold=Threshold("mad"),
        massive_channels=[],
        similarity=None,
        border_distance=None,
        position_map=None,
        recurrence=None,
        attention=None,
    )
    report = replace(
        report, verdict=verdict, layers=[bare], grid=None, definitions={}, environment={}, first_layer=None
    )
    text = write_page(tmp_path / "page.html", report).read_text("utf-8")
    assert _Reader(text).open == []
    assert "Where outliers fall" not in text
    assert "Images" not in text


def test_a_page_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reports is empty"):
        write_page(tmp_path / "page.html", [])
    assert not (tmp_path / "page.html").exists()


def test_cells_of_a_table() -> None:
    table = Table("t", ["a", "b"], [[1.23456, "x"], [None, float("inf")], [(0.5, "half"), HOSTILE]])
    text = show_table(table)
    assert re.findall(r'<td[^>]*data-value="([^"]*)"', text)[:4] == ["1.23456", "x", "", ""]
    assert ">1.23<" in text
    assert ">half<" in text
    assert "<img" not in text


# In a browser


@dataclass
class _Log:
    """What a page did that a quiet page does not."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def check(self, path: Path) -> None:
        assert self.errors == []
        assert self.dialogs == []
        assert self.requests == [path.as_uri()]


_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next((path for path in map(shutil.which, names) if path), None)
    if executable is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(names)} (Debian: apt-get install chromium)")
    interface = pytest.importorskip("playwright.sync_api")
    with interface.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=list(_FLAGS))
        yield browser
        browser.close()


_Open = Callable[..., tuple[Any, _Log]]


@pytest.fixture
def opened(browser: Any) -> Iterator[_Open]:
    """Opens a file; gives the tab and the log of what it did."""
    contexts = []

    def open_file(path: Path, **options: Any) -> tuple[Any, _Log]:
        context = browser.new_context(**options)
        contexts.append(context)
        tab, log = context.new_page(), _Log()
        tab.on("console", lambda message: log.errors.append(message.text))
        tab.on("pageerror", lambda error: log.errors.append(str(error)))
        tab.on("requestfailed", lambda request: log.errors.append(request.url))
        tab.on("request", lambda request: None if request.url.startswith("data:") else log.requests.append(request.url))
        tab.on("dialog", lambda dialog: (log.dialogs.append(dialog.message), dialog.dismiss()))
        tab.goto(path.as_uri(), wait_until="load")
        return tab, log

    yield open_file
    for context in contexts:
        context.close()


def _open_all(tab: Any) -> None:
    """Opens every fold of the page; returns when the images in them can be shown."""
    tab.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    tab.evaluate("Promise.all([...document.images].map((image) => image.decode()))")


@pytest.mark.slow
def test_it_opens_from_disk_and_shows_its_images(page: Path, opened: _Open) -> None:
    tab, log = opened(page)
    _open_all(tab)
    sizes = tab.evaluate("[...document.images].map((node) => [node.complete, node.naturalWidth, node.clientWidth])")
    assert len(sizes) > 40
    assert all(complete and natural > 0 and shown > 50 for complete, natural, shown in sizes)
    charts = tab.evaluate("[...document.querySelectorAll('svg')].map((node) => node.getBoundingClientRect().width)")
    assert min(charts) > 100
    assert tab.title() == f"Audit {HOSTILE}"
    assert tab.locator("script").count() == 1
    log.check(page)


@pytest.mark.slow
def test_it_forbids_itself_to_fetch_and_to_run_what_is_not_its_own(page: Path, opened: _Open) -> None:
    tab, log = opened(page)
    blocked = tab.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            document.body.insertAdjacentHTML("beforeend", "<img src='nowhere.png'>");
        })"""
    )
    assert blocked == "img-src"
    tab.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
    }""")
    assert tab.evaluate("window.ran") is None
    assert log.requests[0] == page.as_uri()
    assert all("nowhere.png" in request for request in log.requests[1:])  # asked for, and blocked before it was read
    assert any("nowhere.png" in error for error in log.errors)


def _column(tab: Any, table: str, heading: str) -> list[str]:
    cells: list[str] = tab.evaluate(
        """([caption, heading]) => {
            const all = [...document.querySelectorAll("table")];
            const table = all.find((node) => node.caption.textContent === caption);
            const place = [...table.tHead.rows[0].cells].findIndex((node) => node.textContent === heading);
            return [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
        }""",
        [table, heading],
    )
    return cells


def _heading(tab: Any, table: str, heading: str) -> Any:
    box = tab.locator("table", has=tab.locator("caption", has_text=re.compile(f"^{table}$"))).first
    return box.locator("th", has_text=re.compile(f"^{re.escape(heading)}$")).first


@pytest.mark.slow
def test_tables_are_sorted_by_clicking_a_heading(page: Path, opened: _Open) -> None:
    tab, log = opened(page)
    layers = make_report().layers
    by_layer = [str(layer.layer) for layer in layers]
    assert _column(tab, "Layer by layer", "layer") == by_layer
    heading = _heading(tab, "Layer by layer", "median norm")
    medians = [layer.norms["patch"].quantiles["0.5"] for layer in layers]
    order = [str(place) for place in np.argsort(medians)]
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert _column(tab, "Layer by layer", "layer") == order
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert _column(tab, "Layer by layer", "layer") == order[::-1]
    other = _heading(tab, "Layer by layer", "layer")
    other.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert other.get_attribute("aria-sort") == "ascending"
    assert heading.get_attribute("aria-sort") == "none"
    assert _column(tab, "Layer by layer", "layer") == by_layer
    log.check(page)


@pytest.mark.slow
def test_numbers_are_sorted_as_numbers_words_as_words_and_what_is_missing_stands_last(
    page: Path, opened: _Open
) -> None:
    tab, log = opened(page)
    number = _heading(tab, "Probes", "top-1").get_by_role("button")
    number.click()
    assert _column(tab, "Probes", "top-1") == ["0.25", "0.5", "–"]
    number.click()
    assert _column(tab, "Probes", "top-1") == ["0.5", "0.25", "–"]
    _heading(tab, "Probes", "token").get_by_role("button").click()
    assert _column(tab, "Probes", "token")[1:] == ["CLS", "normal"]
    # "10.4 ×" comes after "9.2 ×", although not in the alphabet.
    ratio = _heading(tab, "Layer by layer", "largest /\u00a0median").get_by_role("button")
    ratio.click()
    ratios = [float(words.split()[0]) for words in _column(tab, "Layer by layer", "largest /\u00a0median")]
    assert ratios == sorted(ratios)
    assert ratios[0] < 9.5
    log.check(page)


@pytest.mark.slow
def test_it_works_without_javascript_but_for_sorting(page: Path, opened: _Open) -> None:
    tab, log = opened(page, java_script_enabled=False)
    assert tab.locator("button").count() == 0
    assert tab.locator("tbody tr").count() > 20
    assert tab.get_by_text("Artifacts at the output").first.is_visible()
    assert tab.locator("img").first.is_visible()
    details = tab.locator("#images details").first
    details.locator("summary").click()
    assert details.locator("img").first.is_visible()
    log.check(page)


@pytest.mark.slow
def test_it_follows_the_readers_scheme_and_has_contrast(page: Path, opened: _Open) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        tab, log = opened(page, color_scheme=scheme)
        colours = tab.evaluate(
            """() => {
                const style = (selector) => getComputedStyle(document.querySelector(selector));
                return [style("body").color, style("section").backgroundColor, style(".note").color,
                        ...[...document.querySelectorAll(".badge")].map((badge) => getComputedStyle(badge).color)];
            }"""
        )
        text, back, *others = (_luminance(colour) for colour in colours)
        assert _contrast(text, back) > 10
        assert all(_contrast(colour, back) > 4.5 for colour in others)  # WCAG 2.1, level AA
        backgrounds.append(back)
        log.check(page)
    assert backgrounds[0] > 0.9
    assert backgrounds[1] < 0.05


def _luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.1 defines it."""
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: float, second: float) -> float:
    high, low = max(first, second), min(first, second)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_it_fits_every_width(page: Path, opened: _Open, width: int) -> None:
    tab, log = opened(page, viewport={"width": width, "height": 800})
    _open_all(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    log.check(page)


@pytest.mark.slow
def test_the_page_of_a_real_audit(opened: _Open, tmp_path: Path) -> None:
    """The shipped model with planted artifacts, and the same with registers that nobody trained."""
    scenes, processor = SceneDataset(32, seed=10_001, split=None), load_image_processor()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_registers(load_planted_vit().model, 2)
    subjects = {"planted": (model, None), "random registers": (model, "default")}
    with model.disable_adapter():
        reports = [audit(model, scenes, image_processor=processor, name="planted", progress=False)]
    reports.append(audit(model, scenes, image_processor=processor, name="random registers", progress=False))
    images = [scenes[index]["image"] for index in range(4)]
    examples = read_examples(subjects, images, image_processor=processor)
    path = write_page(tmp_path / "index.html", reports, examples)
    assert path.stat().st_size < 1_000_000
    tab, log = opened(path)
    assert tab.locator(".card").count() == 2
    assert tab.locator(".card").first.get_by_text("Artifacts at the output").is_visible()
    _open_all(tab)
    assert tab.evaluate("[...document.images].every((node) => node.complete && node.naturalWidth > 0)")
    shares = [layer.outlier_share for layer in reports[0].layers]
    _heading(tab, "Layer by layer", "outliers").get_by_role("button").click()
    layers = [int(layer) for layer in _column(tab, "Layer by layer", "layer")]
    assert [shares[layer] for layer in layers] == sorted(shares)
    for definition in reports[0].definitions.values():
        assert definition in tab.locator("#definitions").inner_text()
    log.check(path)
