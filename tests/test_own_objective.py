"""An objective in a file of the user's own, which trains, is killed and resumed like the package's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_module
from training_cases import flags, results_of, stopped, write_case
from training_helpers import ROOT, adapter_bytes, load_example

from register_adapter.features.store import StoreSpec
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit
from register_adapter.training import OBJECTIVES, Term, WeightedTerms, wrap
from register_adapter.training.objectives.flags import added_terms

SCRIPT = ROOT / "examples" / "my_objective.py"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.mark.slow
def test_a_script_of_the_users_trains_and_goes_on(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--objective", "even_norms", "--power", "1", "--preserve", "0.5", "--max-train-steps", "4"]
    options += ["--checkpointing-steps", "2", "--target-store", str(tmp_path / "targets")]
    done = run_module(SCRIPT, *flags(case, out, *options))
    assert done.returncode == 0, done.stderr
    results = results_of(out)
    terms = results["objective"]["terms"]
    assert [term["name"] for term in terms] == ["even_norms", "preserve"]
    assert terms[0]["power"] == 1.0
    assert {"eval_even_norms", "eval_registers_off_even_norms"} <= set(results["metrics"])
    trained = adapter_bytes(out)
    more = ["--resume-from-checkpoint", str(out / "checkpoint-2")]
    done = run_module(SCRIPT, *flags(case, tmp_path / "again", *options, *more))
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(tmp_path / "again") == trained


def test_without_the_script_there_is_no_such_objective(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(flags(case, tmp_path, "--objective", "even_norms")) == 2
    assert "argument --objective: invalid choice: 'even_norms' (choose from" in capsys.readouterr().err


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setattr("register_adapter.training.OBJECTIVES", OBJECTIVES)
    monkeypatch.delitem(OBJECTIVES, "even_norms", raising=False)
    kind: type = load_example("my_objective").EvenNorms
    monkeypatch.setitem(OBJECTIVES, "even_norms", kind)
    return kind


@pytest.mark.parametrize("word", ["--even-norms=0.1", "--even_norms"])
def test_it_is_added_to_others_by_its_name(word: str, own: type) -> None:
    assert added_terms(["--objective", "distillation", word, "0.1"], "distillation") == ["even_norms"]
    assert added_terms(["--objective", "distillation"], "distillation") == []


def test_it_measures_what_it_says(own: type) -> None:
    class Tokens:
        before_norm = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [4.0, 0.0]]])

    class Teacher:
        tokens = Tokens

    term = own(power=1.0)  # type: ignore[call-arg]
    (value,) = term.measure(None, Tokens, term.targets(Teacher), {})
    assert value.item() == pytest.approx(2 * torch.tensor(2.0).log().item() / 3)


@pytest.mark.parametrize(
    "name", [name for name, kind in OBJECTIVES.items() if issubclass(kind, Term) and not kind.needs]
)
@pytest.mark.slow
def test_every_target_that_can_be_stored_has_a_shape_that_a_store_takes(name: str) -> None:
    model = load_planted_vit().model
    term = OBJECTIVES[name]()
    pixels = load_image_processor()([scene["image"] for scene in SceneDataset(16)], return_tensors="pt")["pixel_values"]
    items = [{"pixel_values": value, "index": index} for index, value in enumerate(pixels)]
    wrapped = wrap(model, term, num_registers=2)
    term.prepare(wrapped, items)
    targets = WeightedTerms([(term, 1.0)]).targets(wrapped, term.collate(items[:2]))
    assert targets
    StoreSpec(2, {key: tuple(value.shape[1:]) for key, value in targets.items()}, {})
