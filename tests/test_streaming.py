"""``--streaming``: shards that are read as they come, the same by any number of processes and after a resumption."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from processes import run_two_processes
from safetensors.torch import load_file
from training_cases import relabel, results_of, start, stopped, write_case
from training_helpers import adapter_bytes, write_vit

from register_adapter.data import StreamedDataset, load_image_processor
from register_adapter.data.datasets import DataArguments, load_data
from register_adapter.data.stream_loading import load_stream
from register_adapter.data.streaming import StreamedBatches

CLASSES = ["a", "b"]
SHORT = ("--max-train-steps", "5", "--per-device-train-batch-size", "4", "--learning-rate", "0.02", "--quiet")


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (34, 36, 3), np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of parquet with 5 images each, and two of webdataset with 8."""
    folder = tmp_path_factory.mktemp("case")
    write_vit(folder / "vit", CLASSES, dropout=0.0)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES), "text": Value("string")})
    (folder / "parquet").mkdir()
    for shard in range(4):
        numbers = range(5 * shard, 5 * shard + 5)
        images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
        columns = {"image": images, "label": [n % 2 for n in numbers], "text": [str(n) for n in numbers]}
        Dataset.from_dict(columns, features).to_parquet(folder / "parquet" / f"train-{shard}-of-4.parquet")
    (folder / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "tars" / f"train-{shard}.tar", "w") as tar:
            for number in range(8 * shard, 8 * shard + 8):
                member = tarfile.TarInfo(f"{number:03d}.png")
                data = png(number)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def flags(case: Path, out: Path, *more: str, shards: str = "parquet") -> list[str]:
    words = ["--model-name-or-path", str(case / "vit"), "--dataset-name", str(case / shards), "--streaming"]
    return [*words, "--max-eval-samples", "4", "--output-dir", str(out), "--use-cpu", *more]


def streamed(case: Path, **options: object) -> StreamedDataset:
    rows = [{"image": {"bytes": png(number), "path": f"{number}.png"}, "text": str(number)} for number in range(20)]
    stream = Dataset.from_list(rows).cast_column("image", Image(decode=False)).to_iterable_dataset(num_shards=4)
    return StreamedDataset(stream, load_image_processor(str(case / "vit")), **options)  # type: ignore[arg-type]


def texts(batches: StreamedBatches) -> list[list[str]]:
    return [[item["text"] for item in batch] for batch in batches]


@pytest.mark.parametrize("buffer", [1, 7])
def test_processes_share_the_batches_of_one(buffer: int, case: Path) -> None:
    data = streamed(case, shuffle_buffer=buffer, seed=3)
    whole = texts(StreamedBatches(data, 4))
    assert sorted(int(text) for batch in whole for text in batch) == list(range(20))
    assert (whole[0] == ["0", "1", "2", "3"]) == (buffer == 1)
    shares = [texts(StreamedBatches(data, 2, rank, 2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    # Five images a process: the second pair of batches takes the last.
    assert [len(texts(StreamedBatches(data, 6, rank, 2))) for rank in (0, 1)] == [1, 1]


def test_it_goes_on_at_the_right_image_in_every_epoch(case: Path) -> None:
    batches = StreamedBatches(streamed(case, shuffle_buffer=7), 4, num_threads=3)
    first = texts(batches)
    batches.start = 3
    assert texts(batches) == first[3:]
    assert [[item["index"] for item in batch] for batch in batches] == [list(range(n, n + 4)) for n in (12, 16)]
    batches.set_epoch(1)
    batches.start = 0
    second = texts(batches)
    assert second != first
    assert {text for batch in second for text in batch} == {text for batch in first for text in batch}


def test_a_bad_image_is_left_out_or_refused(case: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"image": {"bytes": png(n) if n != 2 else b"no image", "path": f"{n}.png"}} for n in range(8)]
    stream = Dataset.from_list(rows).cast_column("image", Image(decode=False)).to_iterable_dataset()
    processor = load_image_processor(str(case / "vit"))
    batches = StreamedBatches(StreamedDataset(stream, processor, shuffle_buffer=1), 4)
    assert [len(batch) for batch in batches] == [3, 4]
    assert "2.png" in caplog.text
    assert batches.name_of(5) == "5.png"
    with pytest.raises(ValueError, match=r"2\.png"):
        list(StreamedBatches(StreamedDataset(stream, processor, shuffle_buffer=1, strict=True), 4))
    with pytest.raises(ValueError, match="fewer than 9 images"):
        list(StreamedBatches(StreamedDataset(stream, processor), 9))


@pytest.mark.parametrize("column", ["image", "picture"])
def test_images_of_a_stream_are_the_files_that_stand_in_it(column: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    Pillow.open(io.BytesIO(png(0))).save(file, "jpeg", quality=95)
    data = [file.getvalue(), file.getvalue()[:-99], png(1)]  # the second is cut
    features = Features({column: Image(), "label": ClassLabel(names=CLASSES)})
    images = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(data)]
    shard = tmp_path / "train-0-of-1.parquet"
    Dataset.from_dict({column: images, "label": [0, 1, 0]}, features).to_parquet(shard)
    arguments = DataArguments(dataset_name=str(tmp_path), image_column_name=column, max_eval_samples=1)
    loaded = load_stream(arguments, progress=False)
    assert [item["image"] for item in (*loaded.validation, *loaded.train)] == images


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-99]), "the data set {data} cannot be read"),
        (lambda file: relabel(file, 2, 9), "7.png of {data} has the label 9, and there are 2 classes"),
    ],
    ids=["a shard that is cut", "a label that is of no class"],
)
def test_what_is_wrong_in_a_shard_is_told_with_the_name_of_the_data_set(
    damage: Callable[[Path], object], message: str, case: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(case / "parquet", tmp_path / "data")
    damage(data / "train-1-of-4.parquet")
    loaded = load_stream(DataArguments(dataset_name=str(data), max_eval_samples=4), progress=False)
    processor = load_image_processor(str(case / "vit"))
    stream = StreamedDataset(loaded.train, processor, shuffle_buffer=1, name=loaded.name)
    with pytest.raises(ValueError, match=message.format(data=data)):
        list(StreamedBatches(stream, 2))


@pytest.mark.parametrize("load", [load_stream, load_data], ids=["streamed", "whole"])
@pytest.mark.parametrize("other", ["train-1-of-4.parquet", "validation-0-of-1.parquet"])
@pytest.mark.parametrize("names", [CLASSES[::-1], [*CLASSES, "more"]], ids=["another order", "more"])
def test_shards_that_number_their_classes_in_different_ways_are_refused(
    names: list[str], other: str, load: Callable[..., object], case: Path, tmp_path: Path
) -> None:
    """The classes of the first are taken for all, and so labels of the other were swapped."""
    data = shutil.copytree(case / "parquet", tmp_path / "data")
    features = Features({"image": Image(), "label": ClassLabel(names=names), "text": Value("string")})
    columns = {"image": [{"bytes": png(0), "path": "0.png"}], "label": [0], "text": ["x"]}
    Dataset.from_dict(columns, features).to_parquet(data / other)
    arguments = DataArguments(dataset_name=str(data), max_eval_samples=2)
    with pytest.raises(ValueError, match=f"train-0-of-4.parquet and .*{other} number the classes of 'label'"):
        load(arguments, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "more"),
    [
        ("parquet", ("--augmentation", "crop,flip", "--gradient-accumulation-steps", "2")),
        ("tars", ("--objective", "distillation", "--num-views", "2", "--image-column-name", "png")),
    ],
)
def test_a_run_over_several_epochs_goes_on_to_the_same_adapter(
    shards: str, more: tuple[str, ...], case: Path, tmp_path: Path
) -> None:
    given = (*SHORT, *more, "--checkpointing-steps", "1", "--eval-steps", "2")
    start(flags(case, tmp_path / "whole", *given, shards=shards))
    results = results_of(tmp_path / "whole")
    assert results["train_samples"] is None
    assert "| Training images | read as a stream, and not counted |" in (tmp_path / "whole" / "README.md").read_text()
    assert results["eval_samples"] == 4
    for step in (2, 3):  # before and behind the end of an epoch
        resume = ("--resume-from-checkpoint", str(tmp_path / "whole" / f"checkpoint-{step}"))
        start(flags(case, tmp_path / f"{step}", *given, *resume, shards=shards))
        assert adapter_bytes(tmp_path / f"{step}") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(("streaming", "end"), [(True, 3), (False, 4)])
def test_random_numbers_go_on_at_the_end_of_an_epoch(streaming: bool, end: int, case: Path, tmp_path: Path) -> None:
    """Of 16 images a stream trains on 12, in three batches, a data set on 14, in four; a new epoch draws nothing."""
    write_vit(tmp_path / "vit", CLASSES, dropout=0.3)
    given = ["--model-name-or-path", str(tmp_path / "vit"), *SHORT, "--image-column-name", "png", "--objective"]
    given += ["distillation", "--num-views", "1", "--checkpointing-steps", "1"]
    resume = ("--resume-from-checkpoint", str(tmp_path / "whole" / f"checkpoint-{end}"))
    for out, more in (("whole", ()), ("again", resume)):
        words = flags(case, tmp_path / out, *given, *more, shards="tars")
        start([word for word in words if streaming or word != "--streaming"])
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(case: Path, tmp_path: Path) -> None:
    given = (*SHORT, "--objective", "distillation", "--num-views", "1", "--image-column-name", "png")
    start(flags(case, tmp_path / "one", *given, shards="tars"))
    shared = flags(case, tmp_path / "two", *given, "--per-device-train-batch-size", "2", shards="tars")
    for process in run_two_processes("register_adapter.train", *shared):
        assert process.returncode == 0, process.stderr
    alone = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "two" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "status", "told"),
    [((), 0, "WARNING: skipped: 10.png:"), (("--strict",), 1, "ERROR: process 1 of 2: 10.png:")],
    ids=["skipped", "strict"],
)
def test_what_one_process_alone_reads_it_tells(
    more: tuple[str, ...], status: int, told: str, case: Path, tmp_path: Path
) -> None:
    images = [{"bytes": png(n) if n != 10 else b"no image", "path": f"{n}.png"} for n in range(16)]
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "train-0-of-1.parquet"
    Dataset.from_dict({"image": images, "label": [n % 2 for n in range(16)]}, features).to_parquet(shard)
    # Four are evaluated; of the others the first process has 4, 5, 8, 9…, the second 6, 7, 10, 11…
    given = ("--per-device-train-batch-size", "2", "--max-train-steps", "3", "--shuffle-buffer", "1")
    words = flags(case, tmp_path / "out", *given, "--dataset-name", str(tmp_path / "shards"), *more)
    main, other = run_two_processes("register_adapter.train", *words)
    assert told in other.stderr
    assert "10.png" not in main.stderr
    assert other.returncode == status


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "max_train_steps"),
        (("--max-train-steps", "2", "--target-store", "store"), "target_store"),
        (("--max-train-steps", "2", "--load-best-model-at-end"), "eval_steps must be a number of steps"),
        (("--max-train-steps", "2", "--checkpointing-steps", "epoch"), "checkpointing_steps must be a number of steps"),
        (("--max-train-steps", "2", "--shuffle-buffer", "0"), "--shuffle-buffer must be at least 1"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_first(
    more: tuple[str, ...], message: str, case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(flags(case, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_is_no_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_case(tmp_path)
    words = ["--model-name-or-path", str(folder / "vit"), "--train-dir", str(folder / "train"), "--streaming"]
    assert stopped([*words, "--max-train-steps", "1", "--output-dir", str(tmp_path / "out")]) == 2
    assert "--streaming reads shards" in capsys.readouterr().err


def damage_tar(file: Path, how: str) -> str | None:
    """Damage a shard at the header of its fourth image, where its reader stops without an error; what is to be said."""
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        header = tar.getmembers()[3].offset
    damaged = {
        "a header": whole[:header] + b"x" * 512 + whole[header + 512 :],
        "zeros": whole[:header] + bytes(512) + whole[header + 512 :],
        "cut in a header": whole[: header + 99],
        "two in one": whole + whole,
        "no end mark": whole[:header],
        "whole": whole,
    }[how]
    file.write_bytes(damaged)
    where = r"[\d,]+" if how == "two in one" else f"{header:,}"
    known = {"no end mark": "has no end mark: it may have been cut behind its last image", "whole": None}
    return known.get(how, f"is damaged, or several in one: nothing behind byte {where} of the tar file is read")


@pytest.mark.parametrize("compress", [None, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("how", ["a header", "zeros", "cut in a header", "two in one", "no end mark", "whole"])
def test_images_of_a_damaged_tar_are_not_dropped_in_silence(
    how: str,
    streaming: bool,
    compress: Callable[[bytes], bytes] | None,
    case: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = shutil.copytree(case / "tars", tmp_path / "data")
    shard = data / "train-1.tar"
    message = damage_tar(shard, how)
    if compress is not None:
        for path in data.glob("*.tar"):
            path.with_suffix(".tar.gz").write_bytes(compress(path.read_bytes()))
            path.unlink()
        shard = data / "train-1.tar.gz"
    arguments = DataArguments(dataset_name=str(data), image_column_name="png", max_eval_samples=4)

    def read() -> int:
        if not streaming:
            loaded = load_data(arguments, progress=False, labelled=False)
            return len(loaded.train) + len(loaded.validation)
        loaded = load_stream(arguments, progress=False, labelled=False)
        stream = StreamedDataset(loaded.train, load_image_processor(str(case / "vit")), shuffle_buffer=1)
        return len(loaded.validation) + sum(len(list(stream.order(epoch))) for epoch in (0, 1)) // 2

    if message is None or how == "no end mark":
        assert read() == (16 if message is None else 11)
        said = [] if message is None else [f"the shard {shard} {message}"]
        assert [record.message for record in caplog.records] == said
        return
    with pytest.raises(ValueError, match=rf"the shard {shard} {message}"):
        read()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("shards", "name", "damage", "message"),
    [
        ("parquet", "train-2-of-4.parquet", lambda file: file.write_bytes(file.read_bytes()[:700]), "is damaged"),
        ("tars", "train-1.tar", lambda file: file.write_bytes(file.read_bytes()[:9999]), "is damaged"),
        ("tars", "train-1.tar", lambda file: file.write_bytes(b""), "is damaged"),
        ("tars", "train-1.tar", lambda file: file.write_bytes(bytes(512) + file.read_bytes()[512:]), "is damaged: it"),
        ("tars", "train-1.tar", lambda file: file.write_bytes(bytes(10**6)), "is damaged: it begins with zeros"),
        ("parquet", "train-2-of-4.parquet", lambda file: file.rename(file.parent / "away"), "is a link to a file"),
        ("tars", "train-1.tar", lambda file: file.rename(file.parent / "away"), "is a link to a file"),
    ],
    ids=["cut parquet", "cut tar", "empty tar", "zeros first", "zeros only", "parquet gone", "tar gone"],
)
def test_a_shard_that_is_not_read_is_named(
    streaming: bool,
    shards: str,
    name: str,
    damage: Callable[[Path], object],
    message: str,
    case: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = shutil.copytree(case / shards, tmp_path / "data")
    damage(data / name)
    if not (data / name).exists():
        (data / "away").unlink()
        (data / name).symlink_to("away")
    column = "png" if shards == "tars" else "image"
    arguments = DataArguments(dataset_name=str(data), image_column_name=column, max_eval_samples=4)

    def read() -> None:
        loaded = (load_stream if streaming else load_data)(arguments, progress=False, labelled=False)
        processor = load_image_processor(str(case / "vit"))
        if streaming:
            list(StreamedDataset(loaded.train, processor, shuffle_buffer=1, name=loaded.name).order(0))

    with pytest.raises(ValueError, match=f"the shard {data / name} {message}"):
        read()
