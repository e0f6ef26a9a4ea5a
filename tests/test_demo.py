"""``register-adapter demo`` as a user runs it: on what the package ships, and on a model and a folder of one's own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from command_line import call, run_here
from peft import AutoPeftModel
from PIL import Image
from safetensors import safe_open

from register_adapter.commands.demo import print_demo
from register_adapter.commands.runs.spread import combine_runs
from register_adapter.testbed import SceneDataset, load_image_processor

pytestmark = pytest.mark.slow


@dataclass
class Demo:
    folder: Path
    said: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run on the packaged model."""
    out = tmp_path_factory.mktemp("demo")
    given = ("--max_train_steps", "3", "--num_eval_images", "32", "--batch_size", "8")
    said = run_here("demo", "--out", str(out), *given)
    return Demo(out, said, json.loads((out / "demo.json").read_text()))


def test_the_rows_compare_the_packaged_model_with_its_adapters(demo):
    twin, before, control, after, test_time, both = demo.report["rows"]
    assert twin["outlier_share"] == 0
    assert before["outlier_share"] > 0.005
    assert before["largest_norm"] > 5
    assert control["outlier_share"] >= 0.8 * before["outlier_share"]
    assert before["patch_drift"] > 0.01
    assert 0 < after["accuracy"] <= 1
    assert test_time["outlier_share"] == both["outlier_share"] == 0
    assert test_time["patch_drift"] < before["patch_drift"]


@pytest.mark.parametrize(
    "words",
    [
        "clean twin",
        "planted artifacts",
        "random registers",
        "trained registers",
        "test-time register",
        "both",
        "Adapter:",
    ],
)
def test_it_prints_every_row(words, demo):
    assert words in demo.said


def test_it_draws_a_figure(demo):
    with Image.open(demo.folder / "before_after.png") as figure:
        assert min(figure.size) > 400
        assert len(set(figure.convert("L").tobytes())) > 50


def test_the_adapter_is_a_few_kilobytes_and_loads_again(demo):
    path = demo.folder / "adapter" / "adapter_model.safetensors"
    assert demo.report["adapter_bytes"] == path.stat().st_size < 14_000
    assert demo.report["reload_identical"] is True
    with safe_open(path, "pt") as file:
        assert [file.get_slice(key).get_shape() for key in file.keys()] == [[4, 128]]  # noqa: SIM118


def test_the_test_time_register_is_saved(demo):
    fit = demo.report["test_time_fit"]
    assert fit["share_after"] == 0 < fit["share_before"]
    fitted = AutoPeftModel.from_pretrained(demo.folder / "test_time")
    assert sum(map(len, fitted.base_model.model.vit.registers.tokens("default").neurons().values())) == 4


def load_here(folder, pixel_values):
    """In place of the process that loads an adapter again, where that is not what is tested."""
    with torch.no_grad():
        return AutoPeftModel.from_pretrained(folder).eval()(pixel_values=pixel_values).logits


def test_the_cards_say_what_the_table_says(demo):
    rows = {row["arm"]: row for row in demo.report["rows"]}
    for folder, arm in (("adapter", "trained"), ("both", "both")):
        metadata = yaml.safe_load((demo.folder / folder / "README.md").read_text("utf-8").split("---")[1])
        (result,) = metadata["model-index"][0]["results"]
        values = {metric["name"]: metric["value"] for metric in result["metrics"]}
        assert values["eval_accuracy"] == pytest.approx(rows[arm]["accuracy"], abs=1e-6)
        assert result["dataset"]["name"].endswith("test split")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two runs on a model of another family and a folder of images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("own")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=80, patch_size=8
    )
    transformers.Dinov2ForImageClassification(config).save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    SceneDataset(40, size=40, seed=2, split=None).write(folder / "images")
    given = ("--model", str(folder / "model"), "--images", str(folder / "images"), "--out", str(folder / "out"))
    given += ("--max_train_steps", "2", "--num_registers", "2", "--batch-size", "4", "--seeds", "2", "--seed", "3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("register_adapter.commands.runs.demo.logits_in_fresh_process", load_here)
        said = run_here("demo", *given)
    return Demo(folder / "out", said, json.loads((folder / "out" / "demo.json").read_text()))


def test_on_a_model_and_images_of_ones_own(own):
    for report in own.report["runs"]:
        assert report["rows"][0]["name"] == "your model"
        assert report["rows"][2]["accuracy"] is not None
        assert report["test_time_fit"] is None, "random weights have nothing to repair"
        assert report["reload_identical"] is True


def test_numbers_are_counted_and_every_line_has_an_accuracy(own):
    report = own.report
    assert report["eval_images"] == 6
    assert "6 held-out images, seeds 3 to 4: mean (least to largest)" in " ".join(own.said.split())
    for row in report["rows"]:
        values = [line["accuracy"] for run in report["runs"] for line in run["rows"] if line["arm"] == row["arm"]]
        assert row["num_seeds"] == len(values) == 2
        assert row["ranges"]["accuracy"] == [min(values), max(values)]
        assert row["accuracy"] == pytest.approx(sum(values) / 2)
    assert [run["arguments"]["seed"] for run in report["runs"]] == [3, 4]
    assert (own.folder / "seed-4" / "before_after.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x"], "go together"),
        (["--model", "{tmp}", "--images", "{tmp}/none"], "none"),
        (["--num_registers", "0"], "num-registers"),
        (["--max_train_steps", "1", "--batch-size", "2"], "are 2 images, and a fit needs 3"),
    ],
)
def test_wrong_arguments_end_in_one_clear_line(arguments, message, tmp_path, monkeypatch, capfd):
    given = ("demo", "--out", str(tmp_path / "out"), *(a.format(tmp=tmp_path) for a in arguments))
    said = str(call(monkeypatch, *given)) + capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said


def report_of(**rows):
    """A report with shares of outliers alone."""
    values = {"accuracy": 0.5, "largest_norm": 1.0, "patch_drift": None, "cls_drift": None}
    lines = [{"arm": arm, "name": arm, "outlier_share": share, **values} for arm, share in rows.items()]
    return {
        "rows": lines,
        "eval_images": 3,
        "trains_head": False,
        "adapter_bytes": 1,
        "reload_identical": True,
        "arguments": {"seed": 0, "num_eval_images": 256},
        "written": [],
    }


def test_what_is_printed_of_one_seed_and_of_three(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    reports = [report_of(before=0.1, control=0.1, trained=share) for share in (0.001, 0.02, 0.05)]
    print_demo(reports[0], "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "3 held-out images, seed 0" in said
    assert "256" not in said
    assert "trained registers leave 1%, random ones 100%." in said
    assert "This is one seed" in said
    print_demo(combine_runs(reports) | {"arguments": {"seed": 0}, "written": []}, "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "trained registers leave 1% to 50%, random ones 100%. Trained registers alone do not repair" in said
    assert "2.37% (0.10% to 5.00%)" in said
    assert "one seed" not in said
