"""Mistakes on the command line: one short line, before any work, and nothing read or written that was not named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from command_line import call
from datasets import Dataset, Image
from PIL import Image as PILImage

from register_adapter.commands.audit import _HEADINGS
from register_adapter.commands.output import collect_skipped, make_console, print_table
from register_adapter.data.datasets import skip_bad
from register_adapter.training.launch import main as train_main
from register_adapter.utils.staging import check_target


def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whatever runs a model, or reads an adapter, fail."""

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("the run began")

    for name in ("torch.nn.Module.__call__", "register_adapter.tuner.config.RegisterConfig.from_pretrained"):
        monkeypatch.setattr(name, work)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            PILImage.new("RGB", (16, 16), (index, 9, 9)).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "planted", "scenes", "--image-sizes", "7", "--out", "{out}"), "--image-sizes has 7, and a patch"),
        (("fit", "planted", "scenes", "--image-sizes", "100000", "--out", "{out}"), "pixels are more than 89478485"),
        (("audit", "planted", "", "--out", "{out}"), "name of the folder of images is empty"),
        (("probe", "planted", "", "--out", "{out}"), "name of the folder of images is empty"),
        (("fit", "planted", "", "--out", "{out}"), "name of the folder of images is empty"),
        (("audit", "", "{images}", "--out", "{out}"), "name of the model is empty"),
        (("audit", "planted", "{images}", "--adapter", "", "--out", "{out}"), "name of an adapter is empty"),
        (("audit", "planted", "{images}", "--out", ""), "name of the folder to write into is empty"),
        (("probe", "planted", "{images}", "--out", "{images}/out"), "out is in the folder of images"),
        (
            ("demo", "--model", "planted", "--images", "{images}", "--out", "{images}/out"),
            "out is in the folder of images",
        ),
        (("eval", "discovery", "planted", "{images}", "--annotations", "", "--out", "{out}"), "--annotations is empty"),
        (("eval", "zero-shot", "planted", "{images}", "--tokenizer", "", "--out", "{out}"), "--tokenizer is empty"),
        (("export", "no/such", "--base", "", "--out", "{out}"), "--base is empty"),
        (("audit", "planted", "{images}", "--device", "meta", "--out", "{out}"), "device 'meta' is not there"),
        (("demo", "--learning-rate", "nan", "--out", "{out}"), "--learning-rate must be a finite number"),
        (("probe", "planted", "scenes", "--layer", "99", "--out", "{out}"), "--layer 99 of 9"),
        (("eval", "segmentation", "planted", "scenes", "--size", "1000000", "--out", "{out}"), "more than 89478485"),
        (("eval", "depth", "planted", "scenes", "--size", "8x99999999", "--out", "{out}"), "more than 89478485"),
        (("eval", "discovery", "planted", "scenes", "--size", "1000000", "--out", "{out}"), "more than 89478485"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_value_that_is_no_value_is_one_line(
    words: tuple[str, ...], message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)  # where an empty name would lead
    said = call(monkeypatch, *(word.format(out=tmp_path / "out", images=images) for word in words))
    assert isinstance(said, str)
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said.strip()
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in images.iterdir()) == ["cat", "dog"]


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "planted", "scenes", "--out"),
        ("probe", "planted", "scenes", "--out"),
        ("fit", "planted", "scenes", "--out"),
        ("export", "no/such-adapter", "--out"),
        ("demo", "--out"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("below", ["", "below/it"])
def test_a_file_in_the_place_of_the_folder_is_refused_before_any_work(
    words: tuple[str, ...], below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("the run began")

    file = tmp_path / "file"
    file.write_text("mine")
    for place in ("torch.nn.Module.__call__", "register_adapter.tuner.config.RegisterConfig.from_pretrained"):
        monkeypatch.setattr(place, work)
    said = call(monkeypatch, *words, str(file / below if below else file))
    assert said == f"error: {file} is a file; name a folder to write into"
    assert file.read_text() == "mine"


@pytest.mark.parametrize("kind", ["proc", "read-only"])
@pytest.mark.parametrize(
    "words",
    [
        ("audit", "planted", "scenes", "--out"),
        ("probe", "planted", "scenes", "--out"),
        ("fit", "planted", "scenes", "--out"),
        ("eval", "knn", "planted", "scenes", "--out"),
        ("eval", "knn", "planted", "scenes", "--store"),
        ("export", "no/such-adapter", "--out"),
        ("demo", "--out"),
        ("train", "--model-name-or-path", "no/such", "--train-dir", "no", "--output-dir"),
        ("train", "--model-name-or-path", "no/such", "--train-dir", "no", "--output-dir", "{fine}", "--target-store"),
    ],
    ids=lambda words: f"{words[0]}{words[-1]}",
)
def test_a_place_where_nothing_can_be_made_is_refused_before_any_work(
    words: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    place = Path("/proc") if kind == "proc" else tmp_path
    if not place.is_dir():
        pytest.skip("no such file system here")
    fine = tmp_path / "fine"
    if kind == "read-only" and "{fine}" not in words:
        monkeypatch.setattr("tempfile.mkdtemp", full)
    elif kind == "read-only":
        place = tmp_path / "locked"
        place.write_text("")
    refuse_work(monkeypatch)
    said = call(monkeypatch, *(word.format(fine=fine) for word in words), str(place / "out"))
    said = said if isinstance(said, str) else capsys.readouterr().err
    assert f"nothing can be written into the folder {place}" in said or f"{place} is a file" in said
    assert len(said.strip().splitlines()) == 1


def test_a_folder_that_can_be_made_is_none_of_these(tmp_path: Path) -> None:
    check_target(tmp_path)
    check_target(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to(tmp_path)
    check_target(tmp_path / "link" / "new")


@pytest.mark.parametrize("name", ["link", "link/new"])
def test_a_link_to_nowhere_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="link to nowhere, which is not there"):
        check_target(tmp_path / name)


@pytest.mark.parametrize(
    "words", [["--num-registers", "x"], ["--no-such-flag"], [], ["--output-dir", "o", "--train-dir", "d"]], ids=str
)
def test_a_mistake_in_a_training_command_is_short(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_main(words, prog="register-adapter train")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("register-adapter train: error: ")

    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("word", ["mosaics", "tiles", "scenes"])
@pytest.mark.parametrize("flag", ["--train-dir", "--dataset-name", "--validation-dir"])
def test_training_says_what_words_for_drawn_images_mean(
    flag: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--train-dir", str(tmp_path)] if flag == "--validation-dir" else []
    with pytest.raises(SystemExit):
        train_main(["--model-name-or-path", "planted", "--output-dir", "out", *folders, flag, word])
    said = capsys.readouterr().err
    assert f"no folder '{word}'" in said
    assert "that the package draws" in said


def test_training_takes_the_words_for_shipped_models(images: Path, tmp_path: Path) -> None:
    words = ["--model-name-or-path", "planted", "--train-dir", str(images), "--output-dir", str(tmp_path / "out")]
    train_main([*words, "--max-train-steps", "1", "--use-cpu", "--quiet", "--per-device-train-batch-size", "2"])
    assert "register-adapter://planted" in (tmp_path / "out" / "adapter_config.json").read_text()


@pytest.mark.parametrize("width", [80, 100, 60])
def test_the_audits_headings_are_not_broken(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    console.width = width
    row = ("12", "28.23", "12.34", "12.34%", "> 28.23", "98.7%", "98.7%")
    print_table(console, "title", _HEADINGS, [row] * 3, [True, False, False])
    shown = capsys.readouterr().out
    for word in " ".join(_HEADINGS).split():
        assert word in shown
    assert max(map(len, shown.splitlines())) <= width


def test_bad_files_of_a_data_set_are_listed_up_to_a_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(50):
        (tmp_path / f"{index:02}.png").write_bytes(b"x")
    PILImage.new("RGB", (8, 8)).save(tmp_path / "good.png")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    data = Dataset.from_dict({"image": paths}).cast_column("image", Image(decode=False))
    with caplog.at_level(logging.WARNING):
        _, lines = skip_bad(data, progress=False)
    (record,) = [record for record in caplog.records if "bad and skipped" in record.message]
    assert len(lines) == 50
    assert record.message.startswith("50 of 51 files are bad and skipped: ")
    assert record.message.endswith("; and 30 more")


def test_a_command_that_fails_names_the_files_that_were_read_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    @collect_skipped()
    def run() -> None:
        lines = [f"{index}.png: damaged" for index in range(30)]
        logging.getLogger("register_adapter.data.batches").warning("bad", extra={"skipped": lines})
        raise ValueError("too few")

    with pytest.raises(ValueError, match="too few"):
        run()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "30 images are bad and skipped, of those read before it ended:"
    assert said[-1] == "  and 10 more"


@pytest.mark.parametrize("place", ["out", "cat/out", "../images/out"])
def test_an_output_folder_among_classes_is_refused(place: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is in the folder of images .* taken for a class"):
        check_target(images / place, None, images)
    check_target(tmp_path / "images-out", images)
    check_target(tmp_path / "scenes" / place, tmp_path / "scenes")  # a word for images that the package makes
    assert [path.name for path in images.rglob("*")] == ["cat"]


@pytest.mark.parametrize("place", ["images/run", "images/run/out", "images/cat/out", "photos/cat/out", "links/run"])
def test_an_output_folder_that_links_make_a_class_is_refused(place: str, tmp_path: Path) -> None:
    for name in ("images/dog", "photos/cat", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for link, target in (("cat", "photos/cat"), ("run", "elsewhere"), ("up", "."), (".hidden", "photos")):
        (tmp_path / "images" / link).symlink_to(tmp_path / target)
    (tmp_path / "links").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match=r"is in the folder of images .* taken for a class"):
        check_target(tmp_path / place, tmp_path / "links")
    for free in ("out", "photos/out", "elsewhere-too"):
        check_target(tmp_path / free, tmp_path / "images", tmp_path / "missing")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output-dir", "{loop}/out"), "{loop} is a link to loop, which is not there"),
        (("--target-store", "{loop}/x"), "{loop} is a link to loop, which is not there"),
        (("--train-dir", "{loop}"), "{loop} is not a folder"),
        (("--validation-dir", "{loop}"), "{loop} is not a folder"),
    ],
)
def test_links_that_lead_to_themselves_are_named(
    flags: tuple[str, str], message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    usual = ["--model-name-or-path", "register-adapter://planted", "--train-dir", str(images), "--use-cpu"]
    with pytest.raises(SystemExit):
        train_main([*usual, "--output-dir", str(tmp_path / "out"), *(word.format(loop=loop) for word in flags)])
    assert message.format(loop=loop) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("out", "message"), [("{images}/run", "run is in the folder of images"), ("", "folder to write into is empty")]
)
def test_train_refuses_its_output_folder(
    out: str, message: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model-name-or-path", "register-adapter://planted", "--train-dir", str(images), "--use-cpu"]
    with pytest.raises(SystemExit):
        train_main([*flags, "--output-dir", out.format(images=images)])
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in images.iterdir()) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("audit.json", ("audit", "planted", "scenes", "--out")),
        ("index.html", ("audit", "planted", "scenes", "--out")),
        ("eval.json", ("eval", "knn", "planted", "scenes", "--out")),
        ("index.html", ("eval", "knn", "planted", "scenes", "--out")),
        ("probes.json", ("probe", "planted", "scenes", "--out")),
        ("adapter_model.safetensors", ("fit", "planted", "scenes", "--out")),
        ("skipped.txt", ("fit", "planted", "scenes", "--out")),
        ("README.md", ("fit", "planted", "scenes", "--out")),
        ("study.json", ("study", "planted", "scenes", "--out")),
        ("model.safetensors", ("export", "no/such-adapter", "--out")),
        ("model.onnx", ("export", "no/such-adapter", "--format", "onnx", "--out")),
        ("demo.json", ("demo", "--out")),
        ("results.json", ("train", "--model-name-or-path", "planted", "--train-dir", "images", "--output-dir")),
        ("README.md", ("train", "--model-name-or-path", "planted", "--train-dir", "images", "--output-dir")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_folder_in_the_place_of_a_file_is_refused_before_any_work(
    name: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "out" / name
    place.mkdir(parents=True)
    refuse_work(monkeypatch)
    said = f"error: {place} is a folder, where a file is to be written; move it away, or write elsewhere"
    if words[0] == "train":
        with pytest.raises(SystemExit):
            train_main([*words[1:], str(tmp_path / "out")])
        assert said in capsys.readouterr().err
    else:
        assert call(monkeypatch, *words, str(tmp_path / "out")) == said
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [name]
