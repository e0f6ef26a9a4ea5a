"""``register-adapter eval`` as a user runs it: tasks side by side, folders, files and pages, what is refused."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call, run_here
from pairs import make_tokenizer, write_pair
from PIL import Image
from safetensors.torch import save_file

from register_adapter import add_registers
from register_adapter.commands.runs.inputs import load_base
from register_adapter.commands.runs.open_clip_models import open_clip_tokenizer
from register_adapter.commands.runs.task_data import class_folders
from register_adapter.commands.runs.tasks import EvalArguments, run_eval
from register_adapter.evaluation import evaluate_zero_shot
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit
from register_adapter.viz import write_task_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted ViT on disk, two adapters for it and one of another base, scenes in two sets, a model of pairs."""
    folder = tmp_path_factory.mktemp("eval")
    planted = load_planted_vit().model
    planted.save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    add_registers(load_planted_vit().model, 2).save_pretrained(folder / "adapter")
    add_registers(load_planted_vit().model, 1).save_pretrained(folder / "second" / "adapter")
    other = load_vit()
    for parameter in other.parameters():
        parameter.data.mul_(1.0 + 0.5 * np.sin(parameter.numel()))
        parameter.data.add_(0.3)
    add_registers(other, 2).save_pretrained(folder / "foreign")
    write_pair(folder / "pair", "clip")
    for part, count, seed in (("train", 24, 4), ("val", 10, 5)):
        scenes = SceneDataset(count, seed=seed, split=None)
        for number in range(count):
            scene = scenes.scene(number)
            place = folder / "classes" / part / ("red_circle", "blue_star")[scene.label % 2]
            place.mkdir(parents=True, exist_ok=True)
            scene.pil.save(place / f"{part}{number}.png")
            for kind, array in (("images", scene.image), ("masks", scene.mask.astype(np.uint8))):
                (folder / "masks" / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / "masks" / part / kind / f"{number}.png")
    return folder


@pytest.mark.parametrize("task", ["knn", "zero-shot"])
def test_a_report_among_classes_is_refused(task: str, folder: Path) -> None:
    classes = folder / "classes" / "train"
    with pytest.raises(ValueError, match=r"is in the folder of images .* taken for a class"):
        run_eval(EvalArguments(task, str(folder / "model"), str(classes), output_dir=str(classes / "report")))
    assert not (classes / "report").exists()
    assert class_folders(task, str(folder / "classes")) == [classes, folder / "classes" / "val"]


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[dict[str, Any], str, str]:
    """What k-NN on folders with two adapters wrote and printed, and its page."""
    adapters = ("--adapter", str(folder / "adapter"), "--adapter", str(folder / "second" / "adapter"))
    said = run_here(
        *("eval", "knn", str(folder / "model"), str(folder / "classes"), *adapters),
        *("--k", "3", "--k", "5", "--out", str(folder / "out"), "--store", str(folder / "store"), "--seed", "7"),
    )
    written = json.loads((folder / "out" / "eval.json").read_text())
    return written, said, (folder / "out" / "index.html").read_text()


@pytest.mark.slow
def test_adapters_stand_beside_the_model(folder: Path, measured: Any) -> None:
    written, said, _ = measured
    names = [str(folder / "model"), "adapter", str(folder / "second" / "adapter")]
    assert [(row["setting"], row["model"]) for row in written["rows"]] == [
        (f"k = {k}", name) for k in (3, 5) for name in names
    ]
    assert [row["difference"] is None for row in written["rows"]] == [True, False, False] * 2
    assert (written["num_train"], written["num_test"]) == (24, 10)
    assert [written["models"][name]["registers"] for name in names] == [0, 2, 1]
    for row in written["rows"]:
        assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"]
        assert np.mean(row["values"]) == pytest.approx(row["score"]["value"])
    assert "top-1 accuracy" in said
    assert "difference" in said
    assert len(list((folder / "store").rglob("*.safetensors"))) == 6


@pytest.mark.slow
def test_every_choice_is_in_the_result(folder: Path, measured: Any) -> None:
    settings = measured[0]["settings"]
    assert settings["seed"] == 7
    assert settings["feature"] == "cls"
    assert settings["block"] == -1
    assert settings["temperature"] == 0.07
    assert settings["classes"] == ["blue_star", "red_circle"]
    assert settings["layout"] == "train, val"
    assert settings["adapters"] == [str(folder / "adapter"), str(folder / "second" / "adapter")]
    assert {"register-adapter", "torch", "transformers"} <= set(settings["versions"])
    assert measured[0]["models"]["adapter"]["norm"] == {"cls": True, "patches": True}


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_whole_and_has_table_and_chart(measured: Any) -> None:
    page = measured[2]
    parser = _Parser()
    parser.feed(page)
    assert not parser.open
    assert parser.seen.count("circle") == len(measured[0]["rows"])
    assert parser.seen.count("table") == 3
    assert "Content-Security-Policy" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("task", "data", "extra", "settings"),
    [
        ("segmentation", "masks", (), {"linear, last block"}),
        ("depth", "scenes", ("--head", "ridge", "--max-images", "12"), {"ridge, last block"}),
        ("discovery", "scenes", ("--no-sweep", "--max-images", "6"), {"lost, reference", "tokencut, reference"}),
        ("linear", "scenes", ("--max-images", "12"), None),
    ],
)
def test_other_tasks(folder: Path, task: str, data: str, extra: Any, settings: Any) -> None:
    place = data if data == "scenes" else str(folder / data)
    out = folder / f"out-{task}"
    said = run_here("eval", task, str(folder / "model"), place, *extra, "--json", "--quiet", "--out", str(out))
    report = json.loads(said[said.index("{") :])
    assert report == json.loads((out / "eval.json").read_text())
    assert report["task"] == task
    assert settings is None or {row["setting"] for row in report["rows"]} == settings
    assert all(row["difference"] is None for row in report["rows"])
    assert f"Evaluation: {task}" in (out / "index.html").read_text()


def test_zero_shot_with_names_and_templates(folder: Path) -> None:
    (folder / "names.json").write_text(json.dumps({"blue_star": "blue star", "red_circle": ["red circle", "red ring"]}))
    (folder / "templates.txt").write_text("a photo of a {}\nthe {}\n")
    said = run_here(
        *("eval", "zero-shot", str(folder / "pair"), str(folder / "classes"), "--json", "--quiet"),
        *("--classes", str(folder / "names.json"), "--templates", str(folder / "templates.txt")),
    )
    report = json.loads(said[said.index("{") :])
    assert report["num_test"] == 10
    assert report["rows"][0]["setting"] == "2 templates"
    assert report["settings"]["classes"]["red_circle"] == ["red circle", "red ring"]


@pytest.mark.slow
def test_zero_shot_of_open_clip_and_with_a_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    own = tmp_path / "open_clip"
    own.mkdir()
    (own / "open_clip_config.json").write_text(json.dumps(config))
    name = f"local-dir:{own}"
    with pytest.raises(ValueError, match="cannot be loaded by OpenCLIP"):
        load_base(name)
    model = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, own / "open_clip_model.safetensors"
    )
    add_registers(load_base(name), 2).save_pretrained(tmp_path / "adapter")
    arguments = ("eval", "zero-shot", name, str(folder / "classes"), "--adapter", str(tmp_path / "adapter"))
    said = run_here(*arguments, "--json", "--quiet")
    report = json.loads(said[said.index("{") :])
    assert [row["model"] for row in report["rows"]] == [name, "adapter"]
    assert report["models"]["adapter"]["registers"] == 2

    # A tokenizer from elsewhere is that one, not OpenCLIP's own, which it takes for every name that it does not know.
    elsewhere, said = open_clip_tokenizer(name, str(folder / "pair")), ["a photo of a red circle", "circle"]
    expected = make_tokenizer()(said, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    assert torch.equal(elsewhere(said), expected)
    assert open_clip_tokenizer(name, "ViT-B-32")(said).shape == (2, 16)
    with pytest.raises(ValueError, match="no model 'not-there'"):
        open_clip_tokenizer(name, "not-there")
    text["vocab_size"], text["hf_tokenizer_name"] = 64, "somewhere"
    model = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).eval()
    with pytest.raises(ValueError, match="another model's: it has a token 49407, and the text tower knows 64"):
        evaluate_zero_shot(model, str(folder / "classes" / "val"), tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    (own / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no tokenizer could be read in 'local-dir:.*or name one with --tokenizer"):
        open_clip_tokenizer(name)

    shutil.copytree(folder / "pair", tmp_path / "pair")
    (tmp_path / "pair" / "tokenizer.json").unlink()
    arguments = ("eval", "zero-shot", str(tmp_path / "pair"), str(folder / "classes"), "--json", "--quiet")
    reports = [
        json.loads(said[said.index("{") :])
        for said in (
            run_here(*arguments, "--tokenizer", str(folder / "pair")),
            run_here(*arguments[:2], str(folder / "pair"), *arguments[3:]),
        )
    ]
    assert reports[0]["rows"][0]["values"] == reports[1]["rows"][0]["values"]


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        ("knn", ("--size", "64"), "--size is for segmentation, depth, discovery; knn takes no such thing"),
        ("linear", ("--k", "3"), "--k is for knn"),
        ("zero-shot", ("--store", "features"), "--store is for knn, linear, segmentation, depth"),
        ("depth", ("--no-sweep",), "sweep is for discovery"),
        ("knn", ("--split", "val"), "--split is for discovery"),
        ("depth", ("--features", "values"), "--features is for discovery"),
    ],
)
def test_flags_of_other_tasks_are_refused(
    folder: Path, task: str, flags: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in str(call(monkeypatch, "eval", task, str(folder / "model"), str(folder / "classes"), *flags))


def test_a_wrong_size_or_kind_of_features_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("eval", "discovery", str(folder / "model"), "scenes", "--max-images", "4")
    for size in ("0x32", "32x", "-3", "big"):
        assert call(monkeypatch, *command, f"--size={size}") == 2
        assert f"'{size}' is no size" in " ".join(capfd.readouterr().err.split())
    wrong = str(call(monkeypatch, *command, "--features", "norms"))
    assert "--features 'norms', expected one of keys, queries, values, tokens" in wrong


@pytest.mark.slow
def test_one_folder_is_split_by_the_seed(folder: Path) -> None:
    arguments = ("eval", "knn", str(folder / "model"), str(folder / "classes" / "train"), "--k", "2", "--json")
    reports = [json.loads(run_here(*arguments, "--quiet", "--seed", seed)) for seed in ("1", "1", "2")]
    values = [report["rows"][0]["values"] for report in reports]
    assert values[0] == values[1]
    assert [report["num_test"] for report in reports] == [5, 5, 5]
    assert reports[0]["settings"]["layout"] == "20% drawn for the test"


@pytest.mark.slow
def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, data = str(folder / "model"), str(folder / "classes")

    def said(*arguments: str) -> str:
        return str(call(monkeypatch, "eval", *arguments))

    assert "task 'dogs', expected one of knn, linear" in said("dogs", model, data)
    wrong = said("knn", model, data, "--adapter", str(folder / "foreign"), "--out", str(tmp_path / "out"))
    assert "they differ in weights" in wrong
    assert not (tmp_path / "out").exists()
    for word, task in (("mosaics", "knn"), ("tiles", "discovery"), ("mosaics", "depth")):
        meant = said(task, model, word)
        assert f"no folder '{word}'" in meant
        assert "audit, probe, fit and features take it" in meant
    assert "named twice" in said("knn", model, data, *("--adapter", str(folder / "adapter")) * 2)
    assert "must hold images/ and masks/" in said("segmentation", model, data)
    assert "ImageSets" in said("discovery", model, data)
    (tmp_path / "eval.json").write_text('{"task": "depth"}')
    assert "eval.json is the result of 'depth', which knn would" in said("knn", model, data, "--out", str(tmp_path))
    assert (tmp_path / "eval.json").read_text() == '{"task": "depth"}'
    leaky = tmp_path / "leaky"
    shutil.copytree(data, leaky)
    image = next((leaky / "train").rglob("*.png"))
    shutil.copy(image, leaky / "val" / image.parent.name / "copied.png")
    assert "copied.png is" in said("knn", model, str(leaky), "--k", "3")


def test_a_store_says_why_no_image_may_be_bad(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(folder / "classes", tmp_path / "classes")
    bad = sorted((tmp_path / "classes" / "val").rglob("*.png"))[-1]
    bad.write_bytes(bad.read_bytes()[:99])
    arguments = ("eval", "knn", str(folder / "model"), str(tmp_path / "classes"), "--store", str(tmp_path / "store"))
    said = str(call(monkeypatch, *arguments, "--k", "3"))
    assert bad.name in said
    assert "A store holds the features of every image" in said
    assert "leave out --store" in said
    assert "strict" not in said  # which nobody asked for
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10}))
    said = str(call(monkeypatch, *arguments[:3], str(folder / "classes"), *arguments[4:], "--k", "3"))
    assert said.strip().endswith("has 10 bytes left: choose another folder or fewer images")


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    from register_adapter.evaluation.downstream import Metric, TaskReport

    with pytest.raises(ValueError, match="no rows"):
        write_task_page(tmp_path / "page.html", TaskReport("knn", Metric("a", "b"), (), 0, 0))
