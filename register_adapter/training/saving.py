"""What is left of a run: adapter, card, image processor and ``results.json``, in a folder and on the Hub."""

from __future__ import annotations

import inspect
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from torch import nn

from ..tuner.card import update_model_card
from ..tuner.card_text import base_name
from ..tuner.composed import ComposedPeftModel
from ..utils.files import strict_json
from ..utils.hub import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, HubAccessError, checked_token, hub_errors, upload
from ..utils.readme import copy_readme
from ..utils.staging import check_target, check_writable, real_path, staged, write_text
from . import checkpoints
from .arguments import TrainArguments

__all__ = [
    "ADAPTER_FILES",
    "RESULTS_NAME",
    "RUN_CONFIG",
    "check_output_dir",
    "check_push",
    "describe_run",
    "how_to_upload",
    "open_outputs",
    "push_run",
    "save_adapter",
    "save_trained",
    "write_card",
]

RESULTS_NAME, RUN_CONFIG = "results.json", "run.yaml"
#: Files of a finished run.
_RESULTS = (WEIGHTS_NAME, CONFIG_NAME, RESULTS_NAME)
#: What saving an adapter writes.
ADAPTER_FILES = (WEIGHTS_NAME, CONFIG_NAME, "README.md")
_WRITTEN = (*ADAPTER_FILES, MANIFEST_NAME, RESULTS_NAME, RUN_CONFIG, "preprocessor_config.json")


def _check_finite(tensors: dict[str, Any]) -> None:
    """Refuse what was trained if it is not finite.

    Raises:
        FloatingPointError: It is not.
    """
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise FloatingPointError(f"not finite after training, nothing is saved: {broken[:5]}; lower the learning rate")


def save_adapter(model: PeftModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write a model's adapter, or its adapters of several methods, with a card, all or nothing.

    Args:
        model: The model.
        folder: Where to; a card that is there keeps what somebody wrote.
        facts: What the card says of how it came about, as for :func:`register_adapter.tuner.card.update_model_card`.

    Raises:
        OSError: It cannot be written; what was there before is untouched.
    """
    with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME)) as scratch:
        copy_readme(folder, scratch)
        model.save_pretrained(str(scratch))
        write_card(model, scratch, {"adapter": folder.absolute().name, **facts})


def save_trained(
    accelerator: Accelerator,
    model: nn.Module,
    trainable: Mapping[str, torch.Tensor],
    args: TrainArguments,
    results: dict[str, Any],
    image_processor: Any,
    card: dict[str, Any],
) -> None:
    """Write adapter, card, image processor and results, all or nothing, if that is wanted; every process calls it.

    Raises:
        FloatingPointError: What was trained is not finite.
        OSError: They cannot be written; adapter and card alone are, if they can be.
    """
    weights = checkpoints.adapter_weights(accelerator, model)
    trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trained.eval()
    _check_finite(weights or {name: parameter for name, parameter in trained.named_parameters() if name in trainable})
    if not (accelerator.is_main_process and args.output_dir):
        return
    folder = Path(args.output_dir)

    def write_adapter(scratch: Path) -> None:
        copy_readme(folder, scratch)
        trained.save_pretrained(str(scratch), state_dict=weights)
        write_card(trained, scratch, {**card, "adapter": folder.absolute().name})

    try:
        with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME)) as scratch:
            write_adapter(scratch)
            if _can_be_saved(image_processor):
                image_processor.save_pretrained(scratch)
            (scratch / RESULTS_NAME).write_text(strict_json(results, indent=2) + "\n", "utf-8")
    except OSError as error:  # a full disk may hold what was trained, which has a few kB
        try:
            with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME)) as scratch:
                write_adapter(scratch)
            for name in (RESULTS_NAME, "preprocessor_config.json"):  # an earlier run's, whose adapter was written over
                (folder / name).unlink(missing_ok=True)
        except OSError:
            raise error from None
        raise OSError(f"{error}. What was trained is saved in {folder}, without {RESULTS_NAME}") from error


def _can_be_saved(image_processor: Any) -> bool:
    """Whether it is one of transformers; a function, such as a torchvision transform, has no file to be written to."""
    return hasattr(image_processor, "save_pretrained")


def write_card(model: PeftModel, folder: Path, facts: dict[str, Any]) -> None:
    """Bring the README of an adapter's folder up to date; see :func:`save_adapter` for the arguments."""
    facts = {"adapter": folder.absolute().name, **facts}
    if isinstance(model, ComposedPeftModel):
        model.create_or_update_model_card(str(folder), **facts)
        return
    name = str(model.active_adapter)
    base_class, subfolder = type(model.get_base_model()), None if name == "default" else name
    update_model_card(folder / "README.md", model.peft_config[name], base_class, **facts, subfolder=subfolder)


def describe_run(
    results: dict[str, Any], args: TrainArguments, training_data: str | None, evaluation_data: str | None = None
) -> dict[str, Any]:
    """What the card says of the run: the data, its size, and the metrics that were measured on the evaluation set.

    A checkpoint's results have no metrics and no best step yet.
    """
    metrics = {key: value for key, value in results.get("metrics", {}).items() if key.startswith("eval_")}
    images = results["train_samples"]
    run = {
        "Training images": "read as a stream, and not counted" if images is None else images,
        "Evaluation images": results["eval_samples"],
    }
    best = results.get("best") if args.load_best_model_at_end else None
    parts = ", ".join(f"{part} {count:,}" for part, count in results["trained"].items())
    run["Trained parameters"] = parts
    run |= {"Trained further from": base_name(results["adapter"])} if results.get("adapter") else {}
    run |= {"Saved step": f"{best['step']}, the best by {best['metric']}"} if best else {}
    return {
        "training_data": training_data,
        "evaluation_data": evaluation_data if metrics else None,
        "metrics": metrics or None,
        "run": run | {"Steps": results["global_step"], "Seed": args.seed, "Objective": results["objective"]["name"]},
    }


def open_outputs(
    accelerator: Accelerator, args: TrainArguments, resumed: bool, run_config: str | None, token: str | None
) -> None:
    """The output folder, cleared of an earlier run if that is wanted, with the run's settings; and the trackers.

    Before anything is removed, the repository is made that the run is to be pushed to, if it is not there.

    Raises:
        HubAccessError: It cannot be reached, or not be written to.
        OSError: Nothing can be written into the folder.
    """
    if accelerator.is_main_process and args.output_dir:
        check_writable(args.output_dir)
        if args.push_to_hub:
            _open_repository(args, token)
        if args.overwrite_output_dir and not resumed:
            checkpoints.remove_all(args.output_dir)
        if run_config is not None:
            write_text(Path(args.output_dir, RUN_CONFIG), run_config)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        flat = {key: value for key, value in asdict(args).items() if isinstance(value, bool | int | float | str)}
        accelerator.init_trackers("register_adapter", flat)


def check_push(args: TrainArguments, token: str | None = None) -> None:
    """Refuse a run whose result could not be uploaded, as far as that is known without asking the Hub.

    Raises:
        HubAccessError: The name of the repository is none, offline mode is set, or there is no token.
        ValueError: The token has characters that cannot be sent.
    """
    if not args.push_to_hub:
        return
    name, advice = str(args.hub_model_id), "Or leave out --push-to-hub. Nothing was trained"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubAccessError(f"hub_model_id {name!r} is no name of a repository ({error}); give user/name") from error
    if constants.HF_HUB_OFFLINE:
        raise HubAccessError(f"{name!r} cannot be pushed to: HF_HUB_OFFLINE is set. Unset it. {advice}")
    if checked_token(token or get_token()) is None:
        raise HubAccessError(
            f"{name!r} cannot be pushed to without a token: log in with `hf auth login`, or set HF_TOKEN. {advice}"
        )


def _open_repository(args: TrainArguments, token: str | None) -> None:
    name = str(args.hub_model_id)
    api = HfApi(token=checked_token(token))
    with hub_errors(name, token=token):
        repo = api.create_repo(name, private=args.hub_private, exist_ok=True).repo_id
        if "write" in inspect.signature(api.auth_check).parameters:  # one that is there may be somebody else's
            try:
                api.auth_check(repo, write=True)
            except HfHubHTTPError as error:
                if error.response.status_code in (401, 403):
                    raise


def push_run(
    model: PeftModel, args: TrainArguments, image_processor: Any, card: dict[str, Any], token: str | None
) -> str:
    """Upload adapter, card and image processor; the address of the repository.

    Raises:
        HubAccessError: The Hub refused it or cannot be reached; what was trained is saved, and the message says so.
    """
    name = str(args.hub_model_id)
    try:
        if isinstance(model, ComposedPeftModel):
            return _push_folder(model, args, card, token)
        commit = model.push_to_hub(name, private=args.hub_private, token=token, **card)
        if _can_be_saved(image_processor):
            with hub_errors(name, token=token):
                image_processor.push_to_hub(name, token=token)
    except HubAccessError as error:
        raise HubAccessError(f"{str(error).rstrip('.')}; {how_to_upload(args)}") from error
    return str(commit.repo_url)


def how_to_upload(args: TrainArguments) -> str:
    """For the end of a message about an upload that did not come about."""
    upload = ["hf", "upload", str(args.hub_model_id), str(args.output_dir), ".", "--exclude", "checkpoint-*"]
    command = shlex.join([*upload, "--exclude", RUN_CONFIG])
    return f"the adapter is trained and saved in {args.output_dir}; it is uploaded by: {command}"


def _push_folder(model: ComposedPeftModel, args: TrainArguments, card: dict[str, Any], token: str | None) -> str:
    """Upload what is saved of adapters of several methods, in one commit, with the README of the repository kept."""
    folder = Path(str(args.output_dir))
    wanted = [folder / name for name in (MANIFEST_NAME, WEIGHTS_NAME, RESULTS_NAME)]
    wanted += folder.glob("*processor_config.json")
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made, "adapters")  # the output folder has checkpoints too, and a README of its own
        scratch.mkdir()
        for file in filter(Path.is_file, wanted):
            shutil.copyfile(file, scratch / file.name)
        for adapter in model.peft_config:
            shutil.copytree(folder / adapter, scratch / adapter)
        commit = upload(
            scratch,
            str(args.hub_model_id),
            lambda name: model.create_or_update_model_card(str(scratch), adapter=name, **card),
            commit_message=None,
            commit_description=None,
            private=args.hub_private,
            token=checked_token(token),
            revision=None,
            create_pr=False,
        )
    return str(commit.repo_url)


def check_output_dir(args: TrainArguments) -> None:
    """Refuse a folder whose earlier run would be lost, or could not be told from this one.

    Raises:
        OSError: Nothing can be written there, or a folder is in the place of a file that the run is to write.
        ValueError: ``output_dir`` is a file, or holds an adapter, results or checkpoints of an earlier run, or another
            program's checkpoints, and the run neither resumes from there nor overwrites.
    """
    if args.output_dir is None:
        return
    folder = Path(args.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir {folder} is a file; name a folder")
    check_target(folder, files=_WRITTEN)
    whole = checkpoints.find_all(folder)
    left = [path.name for path in whole] or [name for name in _RESULTS if (folder / name).exists()]
    if args.overwrite_output_dir or _resumes_in(folder, whole, args.resume_from_checkpoint):
        return
    if not left and (foreign := checkpoints.find_foreign(folder)):
        raise ValueError(
            f"{folder} holds {', '.join(path.name for path in foreign)}, which another program wrote and a checkpoint "
            "of this run would replace. Choose another --output-dir, or move it away"
        )
    if not left:
        return
    kind = "checkpoints" if whole else "the result"
    advice = "Go on with --resume-from-checkpoint latest, choose" if whole else "Choose"
    raise ValueError(
        f"{folder} holds {kind} of an earlier run ({', '.join(left)}). {advice} another --output-dir, or write over it "
        "with --overwrite-output-dir"
    )


def _resumes_in(folder: Path, whole: list[Path], name: str | None) -> bool:
    """Whether a run goes on from one of the checkpoints in its own folder."""
    if name is None or name == "latest":
        return name is not None and bool(whole)
    return real_path(name) in map(real_path, whole)
