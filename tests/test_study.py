"""A study: what it recommends and writes, that it goes on where it stopped, and that its command works when pasted."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, run_here
from PIL import Image

from register_adapter import UnsupportedModelError, add_registers
from register_adapter.commands.runs.inputs import load_base, load_images, load_processor
from register_adapter.commands.runs.study import StudyArguments, run_study
from register_adapter.data import load_image
from register_adapter.studies import ARMS, Accuracy, Figures, study
from register_adapter.studies.choice import LEAVE, NOTHING, choose
from register_adapter.studies.records import Records
from register_adapter.testbed import LABELS, SceneDataset, load_grown

MADE = ("1 random register", "fit: 1 register", "train: 4 registers")
GIVEN = ("grown-tiles", "tiles", "--steps", "2", "--max-images", "24", "--seeds", "2", "--batch-size", "32")
CHOSEN = tuple(word for arm in MADE for word in ("--arm", arm))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of a small model whose artifacts grew."""
    out = tmp_path_factory.mktemp("study") / "out"
    said = run_here("study", *GIVEN, *CHOSEN, "--out", str(out), "--quiet")
    assert said == ""
    return out


@pytest.fixture(scope="module")
def values(done: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((done / "study.json").read_text("utf-8"))
    return values


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What must be the same however often a study was interrupted."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("figures.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# What it writes


def test_every_arm_is_measured_with_every_seed_on_images_of_its_own(values: dict[str, Any]) -> None:
    assert [row["name"] for row in values["rows"]] == ["as it is", *MADE]
    assert [row["seeds"] for row in values["rows"]] == [1, 2, 1, 2]
    assert values["parts"] == {"make": 12, "choose": 6, "report": 6}
    base, random, fitted, _ = values["rows"]
    assert base["outlier_share"] == random["outlier_share"] > 0.03
    assert fitted["outlier_share"] == 0
    assert (base["verdict"], fitted["verdict"]) == ("present", "present")
    assert (base["clean_kept"], base["drift"]) == pytest.approx((1, 0), abs=1e-5)
    assert base["attention_on_outliers"] > 0.7
    assert fitted["task"] > base["task"] > 0


@pytest.mark.parametrize("name", ["settings", "seeds", "versions", "hardware", "commit", "definitions", "task"])
def test_it_says_how_it_was_made(name: str, values: dict[str, Any]) -> None:
    assert values[name] is not None or name == "commit"


def test_the_page_has_the_arms_the_rule_and_the_command(done: Path, values: dict[str, Any]) -> None:
    page = (done / "index.html").read_text("utf-8")
    recommended = values["recommendation"]
    for words in (*MADE, "What to do", "An arm repairs if", recommended["commands"][0].split(" --")[0]):
        assert words in page
    assert page.count("<img") > 8


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("1-random-register/seed-1", ("Nothing was trained", "a control, for comparison", "| Seed | 1 |")),
        ("fit-1-register", ("| Images | 12 |", "## Training data\n\ntiles\n")),
        (
            "train-4-registers/seed-0",
            ("| Training images | 12 |", "| Steps | 2 of 16 images |", "| Objective | smooth |"),
        ),
    ],
)
def test_an_arms_card_says_what_it_is_and_how_it_compares(arm: str, said: tuple[str, ...], done: Path) -> None:
    card = (done / "arms" / arm / "adapter" / "README.md").read_text("utf-8")
    figures = json.loads((done / "arms" / arm / "figures.json").read_text("utf-8"))["report"]
    base = json.loads((done / "arms" / "as-it-is" / "figures.json").read_text("utf-8"))["report"]
    for words in (
        *said,
        "Measured on tiles, images that were held out.",
        f"| outlier_share | {figures['outlier_share']:.6g} |",
        f"outlier_share {base['outlier_share']:.4g}, ",
        f"| task loss | {figures['task']:.6g} |",
    ):
        assert words in card


def test_it_prints_a_table_and_what_to_do(done: Path) -> None:
    said = run_here("study", *GIVEN, *CHOSEN, "--out", str(done))
    for words in (*MADE, "What to do", "Verdict: present", "register-adapter "):
        assert words in said


@pytest.mark.parametrize("arm", MADE[1:])
@pytest.mark.slow
def test_the_command_it_recommends_works_when_pasted(
    arm: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    run_here("study", *GIVEN, "--arm", arm, "--out", "out", "--quiet")
    make, look = json.loads(Path("out/study.json").read_text("utf-8"))["recommendation"]["commands"]
    assert make.split()[1] == arm.partition(":")[0]
    run_here(*shlex.split(make)[1:], "--quiet")
    monkeypatch.setattr("register_adapter.commands.runs.audit._read_examples", lambda *_: ((), None))
    assert "repaired" in run_here(*shlex.split(look)[1:], "--no-attentions", "--max-images", "16")


def test_every_arm_that_can_be_recommended_has_a_command_that_parses(tmp_path: Path) -> None:
    from typer.main import get_command

    from register_adapter.commands.cli import build_app
    from register_adapter.training.launch import _make_parser, _parse

    app: Any = get_command(build_app())
    for arm in (arm for arm in ARMS if arm.recommended):
        words = arm.command("planted", str(tmp_path), steps=3, seed=1, rule="auto", teacher="hidden")
        if words[1] == "fit":
            app.commands["fit"].make_context("fit", words[2:])
        else:
            _parse(_make_parser("train", arm.objective or "", ["norm"]), words[2:])


# It goes on where it stopped


@pytest.mark.slow
def test_a_study_that_was_killed_ends_with_the_same_files_also_with_more_seeds(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, keep = tmp_path / "out", Records.keep
    made: list[str] = []

    def counted(records: Records, arm: Any, *given: Any) -> None:
        made.append(arm.name)
        keep(records, arm, *given)

    def killed(records: Records, arm: Any, *given: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        counted(records, arm, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study(_arguments(out, seeds=1))
    assert not (out / "study.json").exists()
    monkeypatch.setattr(
        Records, "keep", lambda records, arm, *given: made.append(arm.name) or keep(records, arm, *given)
    )
    run_study(_arguments(out, seeds=2))
    assert sorted(made) == sorted(["as it is", "1 random register", *MADE, "train: 4 registers"])
    assert bytes_of(out) == bytes_of(done)


def _arguments(out: Path, seeds: int) -> StudyArguments:
    settings = {"steps": 2, "max_images": 24, "batch_size": 32, "progress": False}
    return StudyArguments("grown-tiles", "tiles", str(out), arms=MADE, seeds=seeds, **settings)  # type: ignore[arg-type]


def test_a_folder_with_another_study_is_refused(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bytes_of(done)
    said = call(monkeypatch, "study", "grown-tiles", "tiles", "--steps", "3", "--max-images", "24", "--out", str(done))
    assert "other settings" in str(said)
    assert "steps 2 there, 3 here" in str(said)
    assert bytes_of(done) == before


def _asked(**changed: Any) -> dict[str, Any]:
    """A study of the clean packaged model, which ends behind the audit; labels as its task."""
    images = [load_image(item["image"]) for item in load_images("scenes", 16)]
    given = {"model": load_base("clean"), "images": images, "image_processor": load_processor("clean")}
    return {**given, "task": Accuracy(range(16)), "progress": False, **changed}


def _halved(part: str) -> Any:
    """With the first matrix of a part halved."""
    model: Any = load_base("clean")
    matrices = (value for name, value in model.named_parameters() if part in name and value.ndim == 2)
    with torch.no_grad():
        next(matrices).mul_(0.5)
    return model


def _flipped(asked: dict[str, Any]) -> list[Image.Image]:
    return [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in asked["images"]]


def _in_memory(images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """As a data set has them whose images are not decoded."""
    files = [io.BytesIO() for _ in images]
    for file, image in zip(files, images, strict=True):
        image.save(file, "PNG")
    return [{"image": {"bytes": file.getvalue(), "path": None}} for file in files]


def _processor(**changed: Any) -> Any:
    processor = load_processor("clean")
    for name, value in changed.items():
        setattr(processor, name, value)
    return processor


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of the clean model."""
    out = tmp_path_factory.mktemp("clean") / "out"
    study(output_dir=out, **_asked())
    return out


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        # What a LoRA that was merged changes: no bias, no norm, no embedding.
        (lambda: {"model": _halved("layer")}, "weights"),
        (lambda: {"model": _halved("classifier")}, "weights"),
        (lambda: {"image_processor": _processor(image_mean=[0.2] * 3)}, "processor"),
        (lambda: {"task": Accuracy([1] * 16)}, "task"),
        (lambda: {"images": _flipped(_asked())}, "images"),
    ],
    ids=["weights of a block", "head", "image processor", "labels", "images"],
)
def test_what_another_study_differs_in_is_refused_by_name(changed: Any, named: str, clean: Path) -> None:
    before = (clean / "study.json").read_bytes()
    with pytest.raises(ValueError, match=f"other settings \\({named} "):
        study(output_dir=clean, **_asked(**changed()))
    assert (clean / "study.json").read_bytes() == before


def _bitmaps(images: Sequence[Image.Image], folder: Path) -> str:
    """Files whose size does not tell them apart, under the same names."""
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.bmp")
    return str(folder)


@pytest.mark.parametrize("form", ["files", "in memory"])
def test_images_are_told_by_their_content(form: str, tmp_path: Path) -> None:
    def given(images: Sequence[Image.Image]) -> Any:
        return _bitmaps(images, tmp_path / "images") if form == "files" else _in_memory(images)

    asked, out = _asked(), tmp_path / "out"
    others = _flipped(asked)
    study(output_dir=out, **{**asked, "images": given(asked["images"])})
    study(output_dir=out, **{**asked, "images": given(asked["images"])})
    with pytest.raises(ValueError, match=r"other settings \(images "):
        study(output_dir=out, **{**asked, "images": given(others)})


def test_without_a_task_it_goes_on_whatever_the_head_says(tmp_path: Path) -> None:
    """A head that the checkpoint lacks is another one at every load."""
    for model in (load_base("clean"), _halved("classifier")):
        study(output_dir=tmp_path, **_asked(task=None, model=model))
    with pytest.raises(ValueError, match=r"other settings \(weights "):
        study(output_dir=tmp_path, **_asked(task=None, model=_halved("layer")))


def test_an_adapter_that_was_removed_is_made_again(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    for place in ("train-4-registers/seed-1", "fit-1-register"):
        shutil.rmtree(out / "arms" / place / "adapter")
    run_here("study", *GIVEN, *CHOSEN, "--out", str(out), "--quiet")
    assert bytes_of(out) == bytes_of(done)


def _cut(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"cut")


def _replace(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parents[1] / "1-random-register" / "seed-1" / "adapter", folder)


def _take_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _pipe(folder: Path) -> None:
    _take_config(folder)
    os.mkfifo(folder / "adapter_config.json")


@pytest.mark.parametrize("damage", [_cut, _replace, _take_config, _pipe], ids=lambda damage: damage.__name__[1:])
def test_figures_are_not_taken_for_an_adapter_that_they_are_not_of(damage: Any, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    place = out / "arms" / "fit-1-register"
    damage(place / "adapter")
    result = (out / "study.json").read_bytes()
    with pytest.raises(ValueError, match=f"{place} is damaged .*; remove {place}, or name another folder"):
        _again(out)
    assert (out / "study.json").read_bytes() == result
    shutil.rmtree(place)
    _again(out)
    assert bytes_of(out) == bytes_of(done)


def test_an_edited_card_of_an_arm_is_left(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    card = out / "arms" / "fit-1-register" / "adapter" / "README.md"
    card.write_text("mine", "utf-8")
    _again(out)
    assert card.read_text("utf-8") == "mine"


def _again(out: Path) -> None:
    run_study(_arguments(out, seeds=2))


# Models to leave as they are, and what is refused


def test_what_a_kill_behind_the_last_file_of_an_arm_leaves_is_removed(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    place = Records(out).place(ARMS[0], 0)
    names = sorted(path.name for path in place.iterdir())
    (place / ".register_adapter.killed").mkdir()
    for name in (".register_adapter.killed/.lock", ".register_adapter-moving.lock"):
        (place / name).touch()
    assert Records(out).read(ARMS[0], 0) is not None
    assert sorted(path.name for path in place.iterdir()) == names


@pytest.mark.parametrize("there", [False, True], ids=["gone", "a pipe"])
def test_figures_without_their_settings_are_not_taken(there: bool, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    (out / "settings.json").unlink()
    if there:
        os.mkfifo(out / "settings.json")
    before = bytes_of(out)
    with pytest.raises(ValueError, match=f"{out} has audit.json and arms of a study, and no settings.json that says"):
        Records(out).check({"steps": 3})
    assert bytes_of(out) == before
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for _ in range(2):
        Records(fresh).check({"steps": 3})


@pytest.mark.parametrize("name", ["clean", "registers from the start"])
def test_a_clean_model_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    if name == "clean":
        model, images, processor = load_base("clean"), list(load_images("scenes", 16)), load_processor("clean")
    else:
        model, images, processor = load_grown("tiles", "registers").backbone, list(load_images("tiles", 32)), None
        processor = load_processor("grown-tiles")
    result = study(model, images, tmp_path / "out", image_processor=processor, progress=False)
    assert (result.verdict, result.headline, result.command) == ("none", LEAVE, None)
    assert [row["name"] for row in result.rows] == ["as it is"]
    assert "Leave it" in (tmp_path / "out" / "index.html").read_text("utf-8")
    assert not (tmp_path / "out" / "arms").exists()


def _grown(**options: Any) -> dict[str, Any]:
    return {"model": load_grown("tiles").backbone, "images": list(load_images("tiles", 32)), **options}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": list(load_images("tiles", 11))}, "11 good images are too few"),
        ({"arms": ["train: 5 registers"]}, "there is no arm 'train: 5 registers'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rule": "nonsense"}, "nonsense"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = _grown(**options)
    processor = load_processor("grown-tiles")
    with pytest.raises(ValueError, match=words):
        study(given.pop("model"), given.pop("images"), tmp_path / "out", image_processor=processor, **given)
    assert not (tmp_path / "out").exists()


def test_an_arm_that_is_trained_is_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ("study", "grown-tiles", "tiles", "--out", str(tmp_path / "out"), "--no-training", "--max-images", "12")
    assert "'train: 4 registers' is trained" in str(call(monkeypatch, *given, "--arm", "train: 4 registers"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    said = call(monkeypatch, "study", "no/such/model", "tiles", "--out", str(tmp_path / "file"))
    assert "is a file" in str(said)


def test_models_of_open_clip_are_refused_with_what_takes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = call(monkeypatch, "study", "hf-hub:somebody/something", "tiles", "--out", str(tmp_path / "out"))
    assert "audit" in str(said)


def test_a_model_with_adapters_and_artifacts_is_refused(tmp_path: Path) -> None:
    given = _grown()
    model = add_registers(given["model"], 1, init="zeros")
    with pytest.raises(ValueError, match="give the base without adapters"):
        study(model, given["images"], tmp_path, image_processor=load_processor("grown-tiles"), progress=False)


def test_bad_images_are_skipped_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, item in enumerate(load_images("tiles", 32)):
        item["image"].save(folder / f"{number:02}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:100])
    model = load_grown("tiles", "registers").backbone
    result = study(model, folder, tmp_path / "out", image_processor=load_processor("grown-tiles"), progress=False)
    assert [Path(line.partition(":")[0]).name for line in result.values["skipped"]] == ["07.png"]
    assert sum(result.values["parts"].values()) == 31


def _of_every_kind(folder: Path) -> list[Any]:
    """Paths, a JPEG that is to be turned, and CMYK."""
    sources: list[Any] = [item["image"] for item in load_images("tiles", 24)]
    for number in range(8):
        sources[number].save(folder / f"{number}.jpg")
        sources[number] = folder / f"{number}.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    sources[8].crop((0, 0, 32, 20)).save(folder / "turned.jpg", exif=turned)
    sources[8] = Image.open(folder / "turned.jpg")
    sources[9] = sources[9].convert("CMYK")
    return sources


def test_a_list_of_images_of_every_kind_is_written_for_the_command_whole_and_upright(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    sources = _of_every_kind(tmp_path / "given")
    processor = load_processor("grown-tiles")
    options: dict[str, Any] = {"arms": ["train: 4 registers"], "steps": 1, "batch_size": 8, "progress": False}
    result = study(load_grown("tiles").backbone, sources, tmp_path / "out", image_processor=processor, **options)
    assert str(tmp_path / "out" / "images") in str(result.command)
    written = sorted((tmp_path / "out" / "images").iterdir())
    assert len(written) == len(sources)
    for path, source in zip(written, sources, strict=True):
        assert load_image(path).tobytes() == load_image(source).tobytes()


# The task, and the rule


def test_class_folders_that_the_models_head_knows_are_its_task(tmp_path: Path) -> None:
    from register_adapter.commands.runs.study import _task

    SceneDataset(12, seed=3, split=None).write(tmp_path)
    paths = load_images(str(tmp_path))
    task = _task("planted", load_base("planted"), paths)
    assert isinstance(task, Accuracy)
    assert [LABELS[label].replace(" ", "_") for label in task.labels] == [path.parent.name for path in paths]
    assert _task("grown", load_grown("mosaics").backbone, paths) is None


BASE = Figures("present", 0.04, 8.0, 0.8, 0.8, 0.0, 1.0, 0.9)
GOOD = Figures("none", 0.0, 2.0, 0.1, 0.1, 0.1, 0.98, 0.9)


def _with(**changes: Any) -> Figures:
    return Figures(**{**GOOD.to_dict(), **changes})


CASES = {
    "the cheapest that repairs": ({"fit: 1 register": [GOOD], "train: 4 registers": [GOOD]}, "fit: 1 register"),
    "not in every seed": ({"fit: 1 register": [GOOD, BASE], "train: 4 registers": [GOOD]}, "train: 4 registers"),
    "artifacts inside": (
        {"fit: 1 register": [_with(verdict="present inside only")], "train: 4 registers": [GOOD]},
        "train: 4 registers",
    ),
    "outliers left": (
        {"fit: 1 register": [_with(outlier_share=0.01)], "train: 4 registers": [GOOD]},
        "train: 4 registers",
    ),
    "attention stays": (
        {"fit: 1 register": [_with(attention_on_outliers=0.5)], "train: 4 registers": [GOOD]},
        "train: 4 registers",
    ),
    "clean patches change": (
        {"fit: 1 register": [_with(clean_kept=0.8)], "train: 4 registers": [GOOD]},
        "train: 4 registers",
    ),
    "the task suffers": ({"fit: 1 register": [_with(task=0.87)], "train: 4 registers": [GOOD]}, "train: 4 registers"),
    "far better at the task": (
        {"fit: 1 register": [GOOD], "train: 4 registers": [_with(task=0.95)]},
        "train: 4 registers",
    ),
    "a control repairs": ({"1 random register": [GOOD], "fit: 1 register": [BASE]}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rule_recommends(case: str) -> None:
    runs, wanted = CASES[case]
    arms = [arm for arm in ARMS if arm.name in runs or arm.kind == "base"]
    choice = choose(arms, {"as it is": [BASE], **runs}, BASE, Accuracy([]))
    if wanted is None:
        assert choice.headline == NOTHING
        assert any("controls" in reason and "1 random register" in reason for reason in choice.reasons)
    else:
        assert choice.arm == wanted
        assert "from 4.00%" in choice.reasons[0]


def test_models_that_training_cannot_call_are_refused(tmp_path: Path) -> None:
    model = load_grown("tiles").backbone
    model.forward = lambda image: image
    with pytest.raises(UnsupportedModelError, match="as model\\(pixel_values"):
        study(model, list(load_images("tiles", 12)), tmp_path / "out", image_processor=load_processor("grown-tiles"))
    assert not (tmp_path / "out").exists()
