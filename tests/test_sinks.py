"""Attention sinks: no-op and broadcast ones that are there by construction, wherever they stand, and their figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import stacks_cases
import torch
from command_line import call
from families import make_inputs
from helpers import attention_layers
from page_cases import make_report
from torch import nn
from transformers import ViTConfig, ViTModel

from register_adapter import ArtifactReport, RegisterAdapterError, add_registers, audit, capture, find_tower
from register_adapter.artifacts import collect_statistics, resolve_rule
from register_adapter.artifacts.attention_sketch import Layout
from register_adapter.artifacts.auditing import build_report
from register_adapter.artifacts.sink_report import HeadSinks, Sinks, advise, head_kind
from register_adapter.artifacts.sink_sketch import SinkSketch
from register_adapter.artifacts.statistics import Statistics
from register_adapter.commands.audit import print_reports
from register_adapter.features import projections
from register_adapter.viz import write_page

WIDTH, HEADS, DEPTH, SIDE = 16, 2, 4, 5
# What the first head of the toy looks for: the mark is in channel 0, all else is in the others.
MARK = 60.0
BRIGHT = (0, 2, 3, 5)  # images with a patch that has the mark


def centred(*shape: int) -> torch.Tensor:
    values = torch.randn(*shape)
    return values - values.mean(-1, keepdim=True)


def toy(broadcast: bool = False, place: str = "patch") -> nn.Module:
    """A ViT whose first head looks at the token with the mark, and writes much of it or nearly nothing."""
    torch.manual_seed(0)
    shape = {"image_size": SIDE * DEPTH, "patch_size": DEPTH, "num_hidden_layers": 2}
    model: Any = ViTModel(
        ViTConfig(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=32, **shape), add_pooling_layer=False
    ).eval()
    tower = find_tower(model)
    embed, attention = tower.part("patch_embedding"), attention_layers(tower.part("blocks")[0])
    with torch.no_grad():
        embed.weight *= 10
        embed.weight[1:] -= embed.weight[1:].mean(0)  # so that the LayerNorm moves nothing into channel 0
        embed.weight[0] = 0
        embed.weight[0, 0] = 1.0 if place == "patch" else 0.0
        embed.bias.zero_()
        model.embeddings.cls_token[..., 0] = MARK if place == "cls" else 0.0
        model.embeddings.cls_token[..., 1:] = centred(1, WIDTH - 1)
        model.embeddings.position_embeddings.zero_()
        for part in (attention.q_proj, attention.k_proj):
            part.weight.zero_()
            part.bias.zero_()
        attention.q_proj.bias[0] = 20.0
        attention.k_proj.weight[0, 0] = 1.0
        attention.v_proj.weight.normal_()
        attention.v_proj.weight[:, 0] = 4.0 if broadcast else 0.0
        attention.v_proj.weight[:, 1:] -= attention.v_proj.weight[:, 1:].mean(1, keepdim=True)
    if place == "register":
        model = add_registers(model, num_registers=2).eval()
        with torch.no_grad():
            (registers,) = [p for name, p in model.named_parameters() if "registers" in name]
            registers[:, 1:] = centred(2, WIDTH - 1)
            registers[:, 0] = torch.tensor([0.0, MARK])
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pixels = torch.randn(6, 3, SIDE * DEPTH, SIDE * DEPTH, generator=torch.Generator().manual_seed(1))
    pixels[:, 0] = 0
    for place, image in enumerate(BRIGHT):
        row, column = divmod(7 * place + 1, SIDE)
        pixels[image, 0, row * DEPTH : (row + 1) * DEPTH, column * DEPTH : (column + 1) * DEPTH] = MARK / DEPTH**2
    return pixels


def look(model: nn.Module, pixels: torch.Tensor, rule: str = "fixed:30") -> ArtifactReport:
    return audit(model, pixels, rule=rule, progress=False, sinks=True, batch_size=4)


def summed(model: nn.Module, *batches: torch.Tensor) -> Statistics:
    with torch.no_grad(), collect_statistics(find_tower(model), sinks=True) as statistics:
        for pixels in batches:
            model(pixel_values=pixels)
    return statistics


def same(ours: Any, theirs: Any) -> None:
    """All numbers to rounding, in two reports of sinks as dictionaries."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            same(value, theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-3) if isinstance(ours, float) else theirs)


# Kinds and places


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize(
    ("place", "rule", "token"),
    [
        *(("cls", "fixed:30", "cls"), ("register", "fixed:30", "register")),
        *(("patch", "fixed:30", "outlier"), ("patch", "fixed:1000", "other")),
    ],
)
def test_sinks_are_told_by_kind_and_place(
    place: str, rule: str, token: str, broadcast: bool, images: torch.Tensor
) -> None:
    report = look(toy(broadcast, place), images, rule)
    assert report.sinks is not None
    first, second, *others = report.sinks.heads
    kind = "broadcast" if broadcast else "no-op"
    assert (first.block, first.head, first.kind, list(first.tokens)) == (0, 0, kind, [token])
    sinks = first.tokens[token]
    assert sinks.per_image == pytest.approx(len(BRIGHT) / len(images) if place == "patch" else 1)
    assert sinks.attention > 0.99
    assert (sinks.value_ratio > 1) if broadcast else (sinks.value_ratio < 0.2)
    assert sinks.stable_rank == pytest.approx(1, abs=1e-3)
    assert [head.kind for head in (second, *others)] == [None] * 3
    (advice,) = report.sinks.advice
    words = {"cls": "CLS", "register": "registers"}.get(token, "patches")
    assert advice.startswith(f"{kind.capitalize()} sinks on {words} in one head (block 0)")
    assert ("nothing to repair" in advice or "what registers are for" in advice) == (place != "patch")
    assert report.sinks.summary == f"1 of 4 heads have sinks: 1 {kind}."


@pytest.mark.parametrize(("broadcast", "helps"), [(False, "Gates help this kind"), (True, "Registers help this kind")])
def test_what_helps_depends_on_the_kind(broadcast: bool, helps: str, images: torch.Tensor) -> None:
    sinks = look(toy(broadcast), images).sinks
    assert sinks is not None
    assert helps in sinks.advice[0]


def test_a_model_without_sinks_has_none(images: torch.Tensor) -> None:
    sinks = look(toy(), images[[1, 4]]).sinks
    assert sinks is not None
    assert sinks.summary == "None of 4 heads has a sink."
    assert (sinks.advice, sinks.by_block(), [head.tokens for head in sinks.heads]) == ([], [], [{}] * 4)
    assert all(head.stable_rank > 0.999 for head in sinks.heads)


@pytest.mark.parametrize(
    ("shares", "per_image", "kind"),
    [((0.6, 0.1), 1, "no-op"), ((0.1, 0.6), 1, "broadcast"), ((0.5, 0.5), 1, "unclear"), ((1.0, 0.0), 0.001, None)],
)
def test_a_head_is_what_most_of_its_sinks_are(shares: tuple[float, float], per_image: float, kind: str | None) -> None:
    tokens = {"other": Sinks(10, per_image, 0.9, 0.3, 1.2, *shares)}
    assert head_kind(tokens) == kind
    assert len(advise([HeadSinks(0, 0, head_kind(tokens), 1.2, tokens)])) == (kind is not None)


def test_patches_that_share_the_attention_are_sinks_together(images: torch.Tensor) -> None:
    pixels = images.clone()
    pixels[:, 0] = 0
    pixels[:, 0, :DEPTH, : 2 * DEPTH] = MARK / DEPTH**2  # the first two patches
    sinks = look(toy(), pixels).sinks
    assert sinks is not None
    first, *others = sinks.heads
    assert (first.kind, list(first.tokens)) == ("no-op", ["outlier"])
    assert first.tokens["outlier"].per_image == pytest.approx(2)
    assert first.tokens["outlier"].attention == pytest.approx(0.5, abs=0.05)
    assert [head.kind for head in others] == [None] * 3


# Figures


def naive(model: nn.Module, pixels: torch.Tensor, lines: Sequence[float]) -> list[dict[str, Any]]:
    """The figures of each head of the toy, computed image by image from the published definition."""
    tower, kept = find_tower(model), {}
    for block in range(2):
        layer = attention_layers(tower.part("blocks")[block]).v_proj
        layer.register_forward_hook(lambda module, args, output, block=block: kept.update({block: output}))
    with torch.no_grad(), capture(model) as trace:
        model(pixel_values=pixels)
    made = []
    for block in range(2):
        weight = attention_layers(tower.part("blocks")[block]).o_proj.weight.detach().double()
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            ranks, events = [], []
            for image in range(len(pixels)):
                attention = trace.attentions[block][image, head].double().numpy()
                written = (kept[block][image, :, part].double() @ weight[:, part].T).numpy()
                singular = np.linalg.svd(attention @ written, compute_uv=False)
                ranks.append((singular**2).sum() / singular[0] ** 2)
                norms = np.linalg.norm(written, axis=1)
                mean = trace.attentions[block][image].double().numpy().mean((0, 1))
                gathering = mean * len(mean) >= 5
                draws = gathering & (attention.mean(0) * len(mean) >= 5) & (mean[gathering].sum() >= 0.5)
                together = draws & ((attention[:, draws].sum(1) >= 0.5).mean() >= 0.75)
                sinks = together | ((attention >= 0.5).mean(0) >= 0.9)
                for token in np.flatnonzero(sinks):
                    others = np.sort(norms[~sinks])
                    ratio = norms[token] / others[(len(others) - 1) // 2]
                    norm = trace.hidden_states[block][image, token].norm()
                    name = "cls" if token == 0 else "outlier" if norm > lines[block] else "other"
                    broadcast = ratio >= 0.5 and ranks[-1] <= 1.5
                    events.append((name, attention[:, token].mean(), ratio, ranks[-1], ratio <= 0.2, broadcast))
            tokens = {}
            for name in ("cls", "outlier", "other"):
                if mine := [event[1:] for event in events if event[0] == name]:
                    attention, ratio, rank, no_op, broadcast = np.array(mine, float).T
                    figures = (attention.mean(), np.exp(np.log(ratio).mean()), rank.mean(), no_op.mean())
                    tokens[name] = (len(mine), len(mine) / len(pixels), *figures, broadcast.mean())
            made.append({"stable_rank": float(np.mean(ranks)), "tokens": tokens})
    return made


def random_toy() -> nn.Module:
    """A ViT with sharp attention, some of whose heads have sinks in some images."""
    model = toy()
    torch.manual_seed(4)
    with torch.no_grad():
        for block in range(2):
            attention = attention_layers(find_tower(model).part("blocks")[block])
            attention.q_proj.bias.normal_(std=12)
            for part in (attention.k_proj, attention.v_proj, attention.o_proj):
                part.weight.normal_()
    return model


def test_figures_are_those_of_a_plain_loop() -> None:
    pixels = torch.randn(40, 3, SIDE * DEPTH, SIDE * DEPTH, generator=torch.Generator().manual_seed(2))
    model = random_toy()
    report = look(model, pixels, "percentile:50")
    lines = [layer.threshold.high for layer in report.layers]
    assert report.sinks is not None
    expected = naive(model, pixels, lines)
    names = [set(head["tokens"]) for head in expected]
    assert set().union(*names) >= {"outlier", "other"}
    for head, wanted in zip(report.sinks.heads, expected, strict=True):
        assert head.stable_rank == pytest.approx(wanted["stable_rank"], rel=1e-3)
        assert {name: list(vars(sinks).values()) for name, sinks in head.tokens.items()} == {
            name: pytest.approx(list(values), rel=1e-3, abs=1e-6) for name, values in wanted["tokens"].items()
        }


@pytest.mark.parametrize("parts", [(2, 4), (0, 6), (1, 2, 3)])
def test_sums_of_parts_are_those_of_the_whole(parts: Sequence[int], images: torch.Tensor) -> None:
    model = toy()
    first, *others = (summed(model, *([part] if len(part) else [])) for part in torch.split(images, list(parts)))
    for statistics in others:
        first.add_sums(statistics.sums(torch.device("cpu")))
    whole = summed(model, images)
    assert first.nbytes == whole.nbytes == summed(model, images, images).nbytes
    ours, theirs = (
        build_report(sums, resolve_rule("fixed:30"), "fixed", "toy").to_dict()["sinks"] for sums in (first, whole)
    )
    same(ours, theirs)


def test_the_line_is_drawn_after_the_pass(images: torch.Tensor) -> None:
    statistics = summed(toy(), images)
    for rule, token in (("fixed:30", "outlier"), ("fixed:1000", "other")):
        sinks = build_report(statistics, resolve_rule(rule), rule, "toy").sinks
        assert sinks is not None
        assert list(sinks.heads[0].tokens) == [token]


def sketched(attention: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> Sinks:
    """The sinks among the patches, behind one CLS."""
    sketch = SinkSketch(attention.device, attention.shape[1])
    patches = attention.shape[2] - 1
    bins = torch.zeros(len(attention), patches, dtype=torch.long)
    sketch.add(attention, values, None, bins, Layout(1, 1, patches), valid)
    statistics = [tensor.sum(-1)[:, 0] for tensor in (sketch.patches, sketch.others)]
    number, attended, ratio, rank, no_op, broadcast = (statistics[0] + statistics[1]).tolist()
    return Sinks(round(number), number, attended, 2**ratio, rank, no_op, broadcast)


@pytest.mark.parametrize(("queries", "number"), [(8, 0), (9, 1), (10, 1)])
def test_nine_of_ten_queries_are_enough(queries: int, number: int) -> None:
    attention = torch.full((1, 1, 10, 10), 0.5 / 9)
    attention[..., 3] = 0.4
    attention[:, :, :queries, 3] = 0.5
    assert sketched(attention, torch.randn(1, 10, 4)).number == number


def test_padding_is_neither_query_nor_value() -> None:
    attention, values = torch.rand(1, 1, 10, 10), torch.randn(1, 10, 4)
    attention[..., 3] = 9
    attention = attention / attention.sum(-1, keepdim=True)
    wide, long = torch.zeros(1, 1, 16, 16), torch.full((1, 16, 4), 1e4)
    wide[..., 3] = 0.1
    wide[..., 12] = 0.9
    wide[..., :10, :10], wide[..., :10, 10:], long[:, :10] = attention, 0.0, values
    valid = (torch.arange(15) < 9).float()[None]
    assert vars(sketched(wide, long, valid)) == pytest.approx(vars(sketched(attention, values)), rel=1e-4)


def test_zero_values_and_ties_have_finite_figures() -> None:
    attention = torch.zeros(1, 1, 10, 10)
    attention[..., 2:4] = 0.5
    sinks = sketched(attention, torch.zeros(1, 10, 4))
    assert (sinks.number, sinks.no_op, sinks.broadcast, sinks.stable_rank) == (2, 2, 0, 0)
    assert 0 < sinks.value_ratio < 1e-6


# Families


@pytest.mark.parametrize("name", ["yolos", "data2vec", "molmo2-vision", "pix2struct-vision", "mlcd-vision"])
def test_families(name: str) -> None:
    if name not in families.CASES:
        pytest.skip(f"this transformers has no {name}")
    model = families.build(name)
    with torch.no_grad(), collect_statistics(find_tower(model), sinks=True) as statistics:
        model(**make_inputs(name))
    sinks = build_report(statistics, resolve_rule("auto"), "auto", name).sinks
    assert sinks is not None
    assert (sinks.missing, sinks.projected, len(sinks.heads)) == ("", True, families.BLOCKS * families.HEADS)
    assert all(1 - 1e-4 <= head.stable_rank < 12 for head in sinks.heads)


@pytest.mark.parametrize("name", ["timm", "eva", "open_clip", "torchvision"])
def test_the_output_layer_is_asked_without_its_bias(name: str) -> None:
    model = stacks_cases.build_stack(name)
    tower = find_tower(model)
    part = tower.block_part(1, "attention")
    layer = part.proj if hasattr(part, "proj") else part.out_proj
    nn.init.normal_(layer.bias)
    made = projections.output_map(tower, 1, layer.weight)
    torch.testing.assert_close(made, layer.weight.T, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), collect_statistics(tower, sinks=True) as statistics:
        tower.run(stacks_cases.images())
    sinks = build_report(statistics, resolve_rule("auto"), "auto", name).sinks
    assert sinks is not None
    assert sinks.projected


def test_without_values_the_section_says_why(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(projections._SEPARATE, "values", ("nothing",))
    report = look(toy(), images)
    assert report.sinks is not None
    assert (report.sinks.heads, report.sinks.advice) == ([], [])
    assert "has no layer for values" in report.sinks.missing
    assert report.sinks.missing in report.definitions["sinks"]
    assert report.sinks.summary.startswith("Sinks were not measured: block 0")
    assert not attention_layers(find_tower(toy()).part("blocks")[0]).v_proj._forward_hooks


# Around it


def test_hooks_are_gone_and_outputs_as_before(images: torch.Tensor) -> None:
    model = toy()
    with torch.no_grad():
        before = model(pixel_values=images).last_hidden_state
        look(model, images)
        assert torch.equal(model(pixel_values=images).last_hidden_state, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_being_asked_there_is_no_section(images: torch.Tensor) -> None:
    report = audit(toy(), images, progress=False)
    assert report.sinks is None
    assert "sinks" not in report.definitions
    old = {key: value for key, value in report.to_dict().items() if key != "sinks"}
    assert ArtifactReport.from_dict(old) == report


def test_sinks_need_attention_maps(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention maps"):
        audit(toy(), images, progress=False, attentions=False, sinks=True)
    words = ("audit", "planted", "scenes", "--sinks", "--no-attentions", "--out", str(tmp_path / "out"))
    assert call(monkeypatch, *words) != 0
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_refused_as_ever(images: torch.Tensor) -> None:
    with pytest.raises(RegisterAdapterError, match="layer 0"):
        look(toy(), images * torch.nan)


def test_the_report_survives_its_file(tmp_path: Path, images: torch.Tensor) -> None:
    report = look(toy(), images)
    assert ArtifactReport.load(report.save(tmp_path / "report.json")) == report
    written = json.loads((tmp_path / "report.json").read_text())["sinks"]["heads"][0]
    assert (written["kind"], written["tokens"]["outlier"]["number"]) == ("no-op", len(BRIGHT))


def test_command_and_page_show_them(
    tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    report = look(toy(), images)
    print_reports([report], "out")
    said = " ".join(capsys.readouterr().out.split())
    page = write_page(tmp_path / "page.html", [report, make_report()]).read_text("utf-8")
    assert report.sinks is not None
    for text in (said, page):
        assert report.sinks.summary in text
        assert "No-op sinks on patches in one head (block 0)" in text
        assert "outlier patches" in text
    assert "Attention sinks, head by head" in page
    assert page.count("Attention sinks</h3>") == 1
