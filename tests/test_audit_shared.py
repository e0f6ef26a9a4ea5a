"""An audit, and a fit, over several processes have the sums of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SCRIPTS, run_two_processes
from safetensors.torch import load_file
from training_helpers import write_planted

from register_adapter import audit, find_tower, fit_test_time_registers
from register_adapter.artifacts.auditing import build_report
from register_adapter.artifacts.rules.rules import resolve_rule
from register_adapter.artifacts.sharing import share_of
from register_adapter.artifacts.statistics import Statistics, collect_statistics
from register_adapter.neurons import parts
from register_adapter.testbed import load_planted_vit

PIXELS = torch.randn(7, 3, 80, 80, generator=torch.Generator().manual_seed(0))


def same(ours: Any, theirs: Any) -> None:
    """Numbers to the rounding of batches of another size; what else there is exactly."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"environment"}:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one_of_ours, other in zip(ours, theirs, strict=True):
            same(one_of_ours, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("parts", [(7,), (3, 4), (0, 7), (2, 0, 5)])
def test_sums_of_shares_are_those_of_the_whole(parts: tuple[int, ...]) -> None:
    model = load_planted_vit().model
    tower = find_tower(model)

    def look(pixels: torch.Tensor) -> Statistics:
        with torch.no_grad(), collect_statistics(tower) as statistics:
            if len(pixels):
                model(pixel_values=pixels)
        return statistics

    first, *others = (look(part) for part in torch.split(PIXELS, parts))
    for statistics in others:
        first.add_sums(statistics.sums(torch.device("cpu")))
    reports = [build_report(sums, resolve_rule("auto"), "auto", "model").to_dict() for sums in (first, look(PIXELS))]
    same(*reports)


def test_images_of_different_sizes_have_no_grid_in_common() -> None:
    model = load_planted_vit().model
    sums = []
    for size in (80, 64):
        with torch.no_grad(), collect_statistics(find_tower(model), attentions=False) as statistics:
            model(pixel_values=torch.zeros(1, 3, size, size), interpolate_pos_encoding=True)
        sums.append(statistics)
    sums[0].add_sums(sums[1].sums(torch.device("cpu")))
    assert (sums[0].grid, sums[0].no_grid) == (None, "the images have different sizes")


@pytest.mark.parametrize("kind", ["list", "iterator", "tensor"])
@pytest.mark.parametrize("limit", [None, 5])
def test_shares_are_all_images_once(kind: str, limit: int | None) -> None:
    numbers = [{"image": number} for number in range(7)]
    made = {"list": lambda: numbers, "iterator": lambda: iter(numbers), "tensor": lambda: PIXELS}[kind]
    shares = [share_of(made(), limit, index, 3) for index in range(3)]
    assert sum(len(list(share)) for share in shares) == (limit or 7)
    assert share_of(made(), 2, 2, 3) is None


def test_ready_batches_cannot_be_limited() -> None:
    with pytest.raises(ValueError, match="leave out max_images"):
        share_of([PIXELS], 3, 0, 2)


def test_alone_it_is_the_usual_audit() -> None:
    model = load_planted_vit().model
    same(*(audit(model, PIXELS, progress=False, shared=shared).to_dict() for shared in (True, False)))


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = write_planted(tmp_path / "few", 11) / "images", write_planted(tmp_path / "many", 29) / "images"
    for bad in (few / "bad.png", many / "0bad.png", many / "9bad.png"):  # among the first images, and behind them
        bad.write_bytes(b"no image")
    given = ["--device", "cpu", "--json"]
    audited = ["audit", "planted", few, "--batch-size", "4", "--out", tmp_path / "two", *given]
    fitted = ["fit", "planted", many, "--out", tmp_path / "fitted", *given]
    nothing = ["fit", "clean", few, "--out", tmp_path / "nothing", *given]
    broken = ["broken", "fit", "planted", few, "--out", tmp_path / "broken", *given]
    words = [*audited, "then", *fitted, "then", *nothing, "then", *broken]
    main, other = run_two_processes(SCRIPTS / "in_turn.py", *words)
    said, named = main.stdout.split("\0"), main.stderr.split("\0")
    assert other.stdout.split("\0")[::2] == [""] * 5
    assert other.stdout.split("\0")[1::2] == said[1::2], main.stderr + other.stderr
    assert said[1::2] == ["0", "0", "0", "error: a process broke down"]

    assert "bad.png" in named[0]
    (report,) = json.loads(said[0])["reports"]
    assert json.loads((tmp_path / "two" / "audit.json").read_text())["reports"] == [report]
    assert (tmp_path / "two" / "index.html").is_file()
    assert len(report["environment"]["skipped"]) == 1
    alone = audit(load_planted_vit().model, few, batch_size=4, progress=False, name="planted")
    same(report, json.loads(json.dumps(alone.to_dict())))

    monkeypatch.setattr(parts, "NUM_FIRST", 14)
    monkeypatch.setattr(parts, "NUM_HELD_OUT", 6)
    once = fit_test_time_registers(load_planted_vit().model, many, progress=False)
    config, result = once.peft_config["default"], json.loads(said[2])
    same(result["test_time_fit"], json.loads(json.dumps(config.test_time_fit)))
    assert result["test_time_fit"]["num_images"] == {"detect": 29, "rank": 9, "held_out": 6}
    assert [Path(line.partition(":")[0]).name for line in result["skipped"]] == ["0bad.png", "9bad.png"]
    once.save_pretrained(str(tmp_path / "once"))
    pair = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fitted", "once")]
    assert pair[0].keys() == pair[1].keys()
    for key, value in pair[1].items():
        torch.testing.assert_close(pair[0][key], value, rtol=1e-5, atol=1e-5)

    assert "needs no registers" in json.loads(said[4])["reason"]
    assert not [name for name in ("nothing", "broken") if (tmp_path / name).exists()]
