"""An audit as one HTML page: everything is inside, nothing is fetched, and it opens from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...artifacts.report import ArtifactReport
from ...artifacts.sink_report import SinkReport
from ...utils.staging import write_text
from ..examples import Example
from .advice import Origin, next_step
from .charts import attention_profile, histogram, norm_profile, norm_range
from .frame import environment_block, page_text, section
from .gallery import highest_norms, image_article, images_note, place_maps
from .markup import Markup, element
from .tables import (
    Table,
    channel_table,
    head_table,
    layer_table,
    model_table,
    norm_table,
    over_median,
    percent,
    place_table,
    rule_table,
    show_table,
    sink_table,
)

__all__ = ["image_section", "report_card", "write_page"]

#: Verdict -> class of its badge, the sign on it, and what it says.
_BADGES = {
    "none": ("good", "✓", "No artifacts"),
    "present": ("bad", "▲", "Artifacts at the output"),
    "present inside only": ("warn", "◆", "Artifacts inside only"),
}
#: The badge where norms show nothing, and attention does.
_UNEXPLAINED = ("warn", "◆", "No outlying norms, but a few patches draw most of the attention")


def write_page(
    path: str | Path,
    reports: ArtifactReport | Sequence[ArtifactReport],
    examples: Sequence[Example] = (),
    *,
    title: str = "Artifact audit",
    tables: Sequence[Table] = (),
    origin: Origin | None = None,
) -> Path:
    """Write what an audit found as one self-contained HTML page.

    The page has its images, style and script inside and forbids itself to fetch anything. It opens from disk, works
    without JavaScript but for sorting tables, and follows the reader's light or dark scheme. Names of models and files
    are text, whatever is in them.

    Args:
        path: File to write; folders above it are made.
        reports: What :func:`register_adapter.artifacts.audit` found, for one model or several side by side.
        examples: Images with their maps, from :func:`read_examples`; a handful, for their size is the page's.
        title: Heading of the page.
        tables: Further tables, such as those of probes, shown before the definitions.
        origin: The model and images as the command line names them, for the commands that the page suggests.

    Returns:
        The path of the file.

    Raises:
        ValueError: There is no report.
    """
    several = [reports] if isinstance(reports, ArtifactReport) else list(reports)
    if not several:
        raise ValueError("no report to show: reports is empty")
    models = (_model(number, report) for number, report in enumerate(several, 1))
    sections = [_verdicts(several, origin or Origin()), *models]
    if examples:
        sections.append(image_section(examples))
    if tables:
        sections.append(section("tables", "Further tables", [show_table(table) for table in tables]))
    sections.append(_definitions(several))
    links = [("verdict", "Verdict"), *((f"model-{n}", report.name) for n, report in enumerate(several, 1))]
    links += [("images", "Images")] if examples else []
    links += [("tables", "Tables")] if tables else []
    links += [("definitions", "Definitions")]
    lead = [_count(len(several), "model"), _count(several[0].num_images, "image"), f"rule: {several[0].rule}"]
    environments = [environment_block(f"Environment: {r.name}", r.environment) for r in several if r.environment]
    write_text(path, page_text(title, lead, links, sections, environments))
    return Path(path)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _verdicts(reports: Sequence[ArtifactReport], origin: Origin) -> Markup:
    cards = element("div", [report_card(report, origin) for report in reports], class_="cards")
    side_by_side = show_table(model_table(reports)) if len(reports) > 1 else None
    return section("verdict", "Verdict", cards, side_by_side)


def report_card(report: ArtifactReport, origin: Origin | None = None) -> Markup:
    """The verdict of a report with its figures, and what to do next if it is said what the report was made of."""
    kind, sign, words = _UNEXPLAINED if report.unexplained else _BADGES[report.verdict]
    badge = element("p", element("span", sign, aria_hidden="true"), f" {words}", class_="badge")
    last, largest = report.layers[-1], over_median(report.layers[-1])
    grid = " × ".join(map(str, report.grid)) if report.grid else "unknown"
    figures = [
        ("outlier patches, last layer", percent(last.outlier_share)[1]),
        ("images with outliers", percent(last.images_with_outliers)[1]),
        ("largest norm / median", f"{largest:.1f} ×" if largest is not None else "–"),
        ("separate from layer", "–" if report.first_layer is None else str(report.first_layer)),
        ("most attention to few patches", _attention(report)),
        ("evidence", _evidence(report)),
        ("registers", _registers(report)),
        ("family, patches", f"{report.family}, {grid}"),
    ]
    listed = [element("div", element("dt", name), element("dd", value)) for name, value in figures]
    return element(
        "article",
        element("h3", report.name),
        badge,
        element("p", report.reason, class_="reason"),
        element("dl", listed, class_="figures"),
        next_step(report, origin) if origin is not None else None,
        class_=f"card {kind}",
    )


def _attention(report: ArtifactReport) -> str:
    layer = report.most_gathered
    if layer is None or layer.gathered is None:
        return "–"
    gathered = layer.gathered
    return f"{gathered.attention:.0%} to {gathered.patches:.2%}, block {layer.layer}" if gathered.attention else "none"


def _evidence(report: ArtifactReport) -> str:
    words = {"both": "norms and attention", None: "none"}
    return words.get(report.evidence, report.evidence or "") + (f", {report.kind}" if report.kind else "")


def _registers(report: ArtifactReport) -> str:
    own = f"{report.native_registers} native" if report.native_registers else ""
    added = f"{report.num_registers} added" if report.num_registers else ""
    return ", ".join(filter(None, [own, added])) or "none"


def _model(number: int, report: ArtifactReport) -> Markup:
    limits = norm_range(report)
    charts = [
        element("figure", histogram(layer, limits), element("figcaption", _layer_name(layer.layer)), class_="histogram")
        for layer in report.layers
    ]
    heads = head_table(report)
    tables = [rule_table(report), place_table(report), norm_table(report), channel_table(report)]
    tables += [heads] if heads is not None else []
    more = element(
        "details",
        element("summary", "What the rule says, places, attention, quantiles, massive channels, heads"),
        map(show_table, tables),
    )
    return section(
        f"model-{number}",
        report.name,
        element("div", _profiles(report), class_="profiles"),
        show_table(layer_table(report)),
        element("h3", "Norms in every layer"),
        element("p", _key(_HISTOGRAM), class_="note"),
        element("div", charts, class_="histograms"),
        element("p", _AXES, class_="note"),
        place_maps(report),
        _sinks(report.sinks) if report.sinks is not None else None,
        more,
    )


def _sinks(sinks: SinkReport) -> Iterator[Markup]:
    """What is known of attention sinks, and what follows."""
    yield element("h3", "Attention sinks")
    yield element("p", sinks.summary)
    yield from (element("p", advice) for advice in sinks.advice)
    if (table := sink_table(sinks)) is not None:
        yield show_table(table)


_PROFILE = (("median", "median"), ("band", "1st to 99th percentile"), ("dot", "largest"), ("threshold", "threshold"))
_SHARES = (("outlier", "outliers"), ("cls", "CLS"), ("register", "registers"), ("other", "other patches"))
_HISTOGRAM = (
    *(("usual", "patches"), ("outlier", "outliers"), ("threshold", "threshold")),
    *(("mark cls", "median of CLS"), ("mark register", "median of registers")),
)
_AXES = (
    "Both axes are logarithmic; all layers share the axis of norms. A pale threshold is one that the rule does not "
    "hold to separate two kinds of tokens."
)


def _profiles(report: ArtifactReport) -> Iterator[Markup]:
    charts = [("Patch norms by layer", norm_profile(report), _PROFILE)]
    charts += [("Attention received by layer", shares, _SHARES) for shares in [attention_profile(report)] if shares]
    for heading, chart, entries in charts:
        yield element("figure", element("h3", heading), chart, element("figcaption", _key(entries)))


def _layer_name(layer: int) -> str:
    return "layer 0 · input of the first block" if layer == 0 else f"layer {layer} · output of block {layer - 1}"


def _key(entries: Sequence[tuple[str, str]]) -> Markup:
    """A legend."""
    return element(
        "span", [element("span", element("i", class_=f"key {k}"), words) for k, words in entries], class_="legend"
    )


def image_section(examples: Sequence[Example]) -> Markup:
    """A few images with their maps."""
    highest = highest_norms(examples)
    articles = [image_article(example, highest) for example in examples]
    return section("images", "Images", images_note(examples), articles)


def _definitions(reports: Sequence[ArtifactReport]) -> Markup:
    words = {name: text for report in reports for name, text in report.definitions.items()}
    error = max(report.relative_error for report in reports)
    sketch = f"Norms in quantiles and histograms are within {error:.2%} of the true ones." if error else None
    listed = [
        element("div", element("dt", name.replace("_", " ")), element("dd", text)) for name, text in words.items()
    ]
    return section(
        "definitions",
        "Definitions",
        element("p", sketch) if sketch else None,
        element("dl", listed, class_="definitions"),
    )
