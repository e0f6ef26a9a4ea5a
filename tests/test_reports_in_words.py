"""What people read: texts of reports, reasons in plain words, tables that are whole, flags and names in messages."""

from __future__ import annotations

import io
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from families import build
from page_cases import make_report
from rich.console import Console

from register_adapter import add_registers, capture, get_features
from register_adapter.artifacts import Threshold, apply_rule
from register_adapter.commands import cli
from register_adapter.commands.audit import audit_command, print_reports
from register_adapter.commands.eval import eval_command
from register_adapter.commands.features import features_command
from register_adapter.commands.fit import fit_command
from register_adapter.commands.output import name_flags, print_table
from register_adapter.commands.probe import probe_command
from register_adapter.evaluation import analyse_registers, probe_tokens
from register_adapter.neurons.fit import FitRecord
from register_adapter.testbed import SceneDataset
from register_adapter.towers.supported import END, START, write_table
from register_adapter.utils import staging

# Short texts


def test_a_report_says_its_verdict_and_why() -> None:
    report = make_report()
    text = repr(report)
    assert text.startswith("<ArtifactReport of planted: present; 40 images, 5 layers, rule mad. ")
    assert report.reason in text
    assert len(text) < 600


def test_a_trace_says_what_it_holds() -> None:
    model = add_registers(build("vit"), 2).eval()
    with capture(model) as trace:
        assert repr(trace) == "<Trace: no hidden states, no attention maps, 1 tokens before 2 registers>"
        with torch.no_grad():
            model(pixel_values=torch.randn(1, 3, 32, 32))
    tokens = trace.hidden_states[-1].shape[1]
    assert f"{len(trace.hidden_states)} hidden states (1, {tokens}, " in repr(trace)
    assert f"{len(trace.attentions)} attention maps (1, " in repr(trace)


def test_features_say_how_many_there_are() -> None:
    table = get_features(build("vit"), torch.randn(2, 3, 32, 32), what=["patch", "cls"])
    assert repr(table) == "<FeatureTable: 2 images, patch (2, 16, 32), cls (2, 32), grid 4 × 4, 0 skipped>"


def test_probes_and_registers_say_their_tables() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, pixels = add_registers(build("vit"), 2).eval(), torch.randn(24, 3, 32, 32)
    registers = analyse_registers(model, [pixels], progress=False)
    assert repr(registers).startswith("<RegisterReport of vit: 2 adapter registers, ")
    assert "mean ablation" in repr(registers)
    assert "array" not in repr(registers)
    probes = probe_tokens(model, [pixels], np.arange(24) % 2, tasks=["classification"])
    assert repr(probes).startswith("<ProbeReport of vit: layer 2 of 2, 24 images, 0 outliers")
    assert "\n  normal | " in repr(probes)
    assert len(repr(probes).splitlines()) < 10


def test_a_fit_says_what_it_found() -> None:
    values: dict[str, Any] = {"num_neurons": 1, "top_block": 3, "rule": "auto", "num_images": {"detect": 96}}
    record = FitRecord(values | {"share_before": 0.012, "share_after": 0.0, "curve": {}})
    assert repr(record).startswith("<fit of 1 neuron up to block 3, rule auto, 96 images: ")
    assert "beyond the base's threshold 1.20% before, 0.00% after, of held-out patches" in repr(record)
    assert record == dict(record)


# Plain words


@pytest.mark.parametrize("rule", ["auto", "mixture"])
@pytest.mark.parametrize("kind", ["one group", "two groups", "too near"])
def test_reasons_are_in_plain_words(rule: str, kind: str) -> None:
    norms = np.exp(0.05 * np.random.default_rng(0).standard_normal(4000))
    times = {"one group": 1, "two groups": 8, "too near": 1.5}[kind]
    norms[:60] *= times
    threshold = apply_rule(rule, norms)
    assert threshold.separated == (kind == "two groups")
    assert not re.search(r"valley|mode\b|second mode|kinds? of tokens", threshold.reason)
    if not threshold.separated:
        assert "one group" in threshold.reason
    if rule == "auto":
        expected = {
            "two groups": "a gap sets a group of larger norms apart: 1.50%",
            "too near": "but they are too near",
        }
        assert expected.get(kind, "") in threshold.reason


# Tables


def _printed(width: int, header: list[str], rows: list[list[str]]) -> str:
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), "a title", header, rows)
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_is_whole_at_any_width(width: int) -> None:
    header = ["token", "images", "position top-1 ↑", "position distance ↓", "reconstruction L2 ↓", "classification ↑"]
    cells = ["1725", "0.623 ± 0.016 (0.279)", "1.992 ± 0.120 (3.260)", "1.290 ± 0.030 (6.420)", "-"]
    rows = [[name, *cells] for name in ("normal", "outlier", "CLS", "register [b]0[/b]")]
    text = _printed(width, header, rows)
    assert "…" not in text
    for words in (*header[1:], *cells, *(row[0] for row in rows)):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= width
    assert text.count("a title") == 1


@pytest.mark.parametrize("width", ["80", "120"])
def test_the_table_of_an_audit_is_whole(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    print_reports([make_report("a [b] model")], "out")
    text = capsys.readouterr().out
    assert "…" not in text
    assert "a [b] model" in text
    for word in ("median", "largest", "patches", "threshold", "attention", "outliers"):
        assert word in text


# Messages


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        (fit_command, "give threshold= and top_block=.", "give --threshold and --top-block."),
        (fit_command, "threshold is a norm: give top_block too", "threshold is a norm: give --top-block too"),
        (fit_command, "a register (attention_bias=False).", "a register (without --attention-bias)."),
        (audit_command, "or capture with attentions=False", "or capture with --no-attentions"),
        (audit_command, "give threshold= and top_block=.", "give threshold= and top_block=."),
        (probe_command, "min_images=100, rule='mad:6'", "--min-images 100, --rule 'mad:6'"),
        (eval_command, "give more images, or sweep=None (also", "give more images, or --no-sweep (also"),
        (features_command, "norm=False and norm=True", "--no-norm and --norm"),
        (fit_command, "give threshold=None", "give threshold=None"),
        (fit_command, "the file /a/top_block.png, test_time_fit", "the file /a/top_block.png, test_time_fit"),
        (fit_command, "call add_registers(model, remove='mean')", "call add_registers(model, remove='mean')"),
    ],
)
def test_arguments_are_named_as_flags(command: Any, message: str, expected: str) -> None:
    assert name_flags(message, command) == expected


@pytest.mark.parametrize("quoted", ["x" * 200_000, "x_" * 100_000, "x=" * 100_000, "x(" * 100_000, "x='" * 70_000])
def test_an_error_that_quotes_a_file_at_length_is_told_at_once(quoted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError(f"adapters.json: give top_block=, not {quoted}")

    start = time.process_time()
    name_flags(quoted, fit_command)
    monkeypatch.setattr("sys.argv", ["register-adapter", "fit"])
    with pytest.raises(SystemExit) as stop:
        cli._report(fail)
    assert time.process_time() - start < 10
    assert str(stop.value).startswith("error: adapters.json: give --top-block, not x")
    assert str(stop.value).endswith("characters in all)")
    assert len(str(stop.value)) < 5000


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.0, 1.25, "norms over 1.25"), (2.0, math.inf, "norms under 2"), (0.5, 1e4, "norms over 1e+04 or under 0.5")],
)
def test_a_threshold_is_told_in_words(low: float, high: float, words: str) -> None:
    assert Threshold("fixed", high, low, True).in_words() == words


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    SceneDataset(4, seed=4, split=None).write(folder)
    return folder


@pytest.mark.slow
def test_a_fit_advises_flags(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert call(monkeypatch, "fit", "clean", str(images), "--out", out) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "give --threshold and --top-block" in said
    assert "threshold=" not in said
    error = str(call(monkeypatch, "fit", "clean", str(images), "--out", out, "--threshold", "3"))
    assert "give --top-block too" in error


def _commands(name: str, images: Path, out: Path) -> list[tuple[str, ...]]:
    flags = ("--out", str(out))
    return [
        ("audit", name, str(images), *flags),
        ("probe", name, str(images), *flags),
        ("fit", name, str(images), *flags),
        ("train", "--model-name-or-path", name, "--train-dir", str(images), "--output-dir", str(out), "--use-cpu"),
    ]


@pytest.mark.parametrize("name", ["facebok/dinov2-bse", "nonsense", "a/b/c", "folder"])
def test_a_model_that_is_not_there_is_one_line_and_the_same_everywhere(
    name: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    said = set()
    for arguments in _commands(name, images, tmp_path / "out"):
        error = call(monkeypatch, *arguments)
        printed = capfd.readouterr().err
        text = error if isinstance(error, str) else printed
        line = next(line for line in text.splitlines() if "no model" in line)
        assert "Traceback" not in text + printed
        assert len([part for part in text.splitlines() if part.strip()]) == 1, text
        said.add(line[line.index("no model") :])
    assert len(said) == 1, said
    assert repr(name) in said.pop()


def test_an_adapter_that_is_not_there_is_one_line_and_the_same_everywhere(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ("clean", str(images), "--adapter", "somebody/misspelt", "--out", "out")
    commands = [("audit", *base), ("probe", *base), ("export", "somebody/misspelt", "--out", "out")]
    said = {str(call(monkeypatch, *arguments)) for arguments in commands}
    assert len(said) == 1, said
    line = said.pop()
    assert line.startswith("error: no adapter 'somebody/misspelt': there is no such folder")
    assert len(line.splitlines()) == 1


# Files


def test_a_report_and_a_table_are_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, document = make_report(), tmp_path / "families.md"
    path = report.save(tmp_path / "deep" / "report.json")
    document.write_text(f"{START}\n{END}\n", "utf-8")
    write_table(document, "| old |")
    before = path.read_bytes(), document.read_bytes()

    def full(self: Path, *args: Any, **options: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        make_report("other").save(path)
    with pytest.raises(OSError, match="No space"):
        write_table(document, "| new |")
    assert (path.read_bytes(), document.read_bytes()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["deep", "families.md"]
