"""What users of the Hub do, each in a process of its own: ``python hub_client.py author|reader|stranger OUT``.

Everything runs with the libraries' logging at DEBUG and HF_DEBUG set; the tests search the output for tokens.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from register_adapter import HubAccessError, RegisterConfig, RegisterPeftModel, add_registers, compose, load_adapters

torch.set_num_threads(1)
OWN_TEXT = "# My registers\n\nTrained on a Sunday.  Two spaces, kept.\n"


def small_base() -> ViTForImageClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8, num_labels=3)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(pixel_values=pixels).logits
    return result.contiguous()


def write(out: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    save_file(tensors, out / "outputs.safetensors")
    (out / "facts.json").write_text(json.dumps(facts))


def author(out: Path) -> None:
    """Push a base model and adapters in many ways, and edit the README in between."""
    token = os.environ["AUTHOR_TOKEN"]
    api = HfApi(token=token)
    small_base().push_to_hub("author/base", token=token)
    base = ViTForImageClassification.from_pretrained("author/base").eval()
    outputs = {"base": logits(base)}
    model = add_registers(base, num_registers=4, init_std=1.0)
    first = model.push_to_hub(
        "author/regs",
        # A token read from a file ends with a line break.
        token=f"{token}\n",
        training_data="author/scenes",
        metrics={"accuracy": 0.75},
        license="apache-2.0",
        tags=["scenes"],
    )
    outputs["first"] = logits(model)
    api.create_tag("author/regs", tag="v1", revision=first.oid)
    facts = {"first": first.oid, "first_card": Path(hf_hub_download("author/regs", "README.md")).read_text()}

    edited = "---\nlicense: mit\ntags:\n- mine\n- scenes\nlanguage: en\n---\n" + OWN_TEXT
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="author/regs")
    with torch.no_grad():
        model.get_base_model().vit.registers.register_adapter_tokens["default"].weight.mul_(-1)
    facts["second"] = model.push_to_hub("author/regs", token=token, metrics={"accuracy": 0.5}).oid
    outputs["second"] = logits(model)
    facts["third"] = model.push_to_hub("author/regs", token=token).oid
    model.push_to_hub("author/regs", token=token, revision="dev", commit_message="On a branch")
    facts["pull_request"] = model.push_to_hub("author/regs", token=token, create_pr=True, tags=["pr"]).pr_url
    model.push_to_hub("author/secret", token=token, private=True)

    write_card = model._write_card

    def edit_meanwhile(folder: Path, **facts: Any) -> None:
        write_card(folder, **facts)
        if facts.get("adapter") == "author/race":  # the card that is uploaded, not the one of the save before
            api.upload_file(path_or_fileobj=b"Mine.", path_in_repo="README.md", repo_id="author/race")

    model._write_card = edit_meanwhile
    try:
        model.push_to_hub("author/race", token=token)
    except HubAccessError as error:
        facts["race"] = str(error)
    model._write_card = write_card

    model.add_adapter("extra", RegisterConfig(num_registers=2, init_std=1.0))
    model.push_to_hub("author/both", token=token)
    model.set_adapter("extra")
    outputs["extra"] = logits(model)
    model.save_pretrained(out / "adapter")

    lora = LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    pair = compose(small_base(), {"registers": RegisterConfig(num_registers=2, init_std=1.0), "lora": lora})
    pair.push_to_hub("author/pair", token=f"{token}\n", tags=["scenes"])
    longer = Path(hf_hub_download("author/pair", "README.md")).read_text() + OWN_TEXT
    api.upload_file(path_or_fileobj=longer.encode(), path_in_repo="README.md", repo_id="author/pair")
    with torch.no_grad():
        for value in pair.parameters():
            value.add_(value.requires_grad)
    pair.push_to_hub("author/pair", token=token)
    outputs["pair"] = logits(pair)
    write(out, outputs, facts)


def reader(out: Path) -> None:
    """Load what the author has pushed, in every way there is."""
    token = os.environ["AUTHOR_TOKEN"]

    def base() -> ViTForImageClassification:
        return ViTForImageClassification.from_pretrained("author/base").eval()

    first = json.loads((out.parent / "author" / "facts.json").read_text())["first"]
    several = PeftModel.from_pretrained(base(), "author/regs")
    outputs = {"second: PeftModel": logits(several)}
    several.load_adapter("author/both", adapter_name="extra", subfolder="extra")
    several.set_adapter("extra")
    outputs["extra: PeftModel.load_adapter"] = logits(several)
    outputs["base: unload"] = logits(several.unload())

    outputs["second: AutoPeftModel"] = logits(AutoPeftModel.from_pretrained("author/regs"))
    native = base()
    native.load_adapter("author/regs")
    outputs["second: load_adapter"] = logits(native)
    native = base()
    native.load_adapter("author/both", adapter_kwargs={"subfolder": "extra"})
    outputs["extra: load_adapter"] = logits(native)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "second: RegisterPeftModel": ("author/regs", {}),
        "first: commit": ("author/regs", {"revision": first}),
        "first: tag": ("author/regs", {"revision": "v1"}),
        "second: branch": ("author/regs", {"revision": "dev"}),
        "second: pull request": ("author/regs", {"revision": "refs/pr/1"}),
        "extra: subfolder": ("author/both", {"subfolder": "extra"}),
        "second: private": ("author/secret", {"token": token}),
    }
    for name, (repo, options) in ways.items():
        outputs[name] = logits(RegisterPeftModel.from_pretrained(base(), repo, **options))
    outputs["pair: load_adapters"] = logits(load_adapters(small_base(), "author/pair"))
    outputs["first: PeftModel, commit"] = logits(PeftModel.from_pretrained(base(), "author/regs", revision=first))
    outputs["second: PeftModel, private"] = logits(PeftModel.from_pretrained(base(), "author/secret", token=token))
    os.environ["HF_TOKEN"] = token
    outputs["second: HF_TOKEN"] = logits(AutoPeftModel.from_pretrained("author/secret"))
    write(out, outputs, {})


def stranger(out: Path) -> None:
    """Fail in every way there is; the test changes the server's behaviour where this waits for a line."""
    wrong, other = os.environ["WRONG_TOKEN"], os.environ["OTHER_TOKEN"]
    base = small_base()
    names, expected = [name for name, _ in base.named_modules()], logits(base)
    results: dict[str, dict[str, Any]] = {}

    def attempt(case: str, action: Callable[[], Any]) -> None:
        outcome = {"type": "nothing raised", "message": "", "own": False}
        try:
            action()
        except Exception as error:
            traceback.print_exc()
            own = type(error).__module__.startswith("register_adapter")
            outcome = {"type": type(error).__name__, "message": str(error), "own": own}
        same = [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), expected)
        results[case] = {**outcome, "unchanged": same}

    def load(case: str, repo: str, **options: Any) -> None:
        attempt(case, lambda: RegisterPeftModel.from_pretrained(base, repo, **options))

    load("wrong token", "author/secret", token=wrong)
    load("no token", "author/secret")
    load("other's token", "author/secret", token=other)
    load("gated, no token", "author/gated")
    load("gated, token", "author/gated", token=other)
    load("no repository", "author/nothing")
    load("no revision", "author/regs", revision="v9")
    load("no subfolder", "author/regs", subfolder="deep")
    load("no weights", "author/config-only")
    load("pickle", "author/pickle")
    load("pickle in a subfolder", "author/nested", subfolder="old")
    load("damaged", "author/damaged")
    load("other method", "author/lora")
    load("not a name", "a/b/c")
    (out / "empty").mkdir()
    load("empty folder", str(out / "empty"))
    load("token of two lines", "author/secret", token=f"{wrong}\n{wrong}")
    attempt("pickle: PeftModel", lambda: PeftModel.from_pretrained(base, "author/pickle"))
    attempt("no weights: PeftModel", lambda: PeftModel.from_pretrained(base, "author/config-only"))
    folder = Path(hf_hub_download("author/config-only", "adapter_config.json")).parent
    attempt("no weights: folder", lambda: PeftModel.from_pretrained(base, folder))
    attempt("wrong token: PeftModel", lambda: PeftModel.from_pretrained(base, "author/secret", token=wrong))
    attempt("wrong token: AutoPeftModel", lambda: AutoPeftModel.from_pretrained("author/secret", token=wrong))

    model = add_registers(small_base())
    attempt("push: wrong token", lambda: model.push_to_hub("author/regs", token=wrong))
    attempt("push: no token", lambda: model.push_to_hub("author/regs"))
    attempt("push: other's repository", lambda: model.push_to_hub("author/regs", token=other))
    attempt("push: other's name", lambda: model.push_to_hub("author/new", token=other))
    pair = compose(small_base(), {"registers": RegisterConfig()})
    attempt("push of several: wrong token", lambda: pair.push_to_hub("author/pair", token=wrong))
    attempt("push of several: other's name", lambda: pair.push_to_hub("author/new", token=other))
    attempt("push: token of two lines", lambda: model.push_to_hub("author/regs", token=f"{wrong}\n{wrong}"))

    logging.getLogger().setLevel(logging.WARNING)  # what a server says is the HTTP library's to log
    wait(out, "echo")
    load("echo: load", "author/secret", token=wrong)
    attempt("echo: push", lambda: model.push_to_hub("author/regs", token=wrong))
    attempt("echo: push of several", lambda: pair.push_to_hub("author/pair", token=wrong))
    wait(out, "down")
    load("down: load", "author/regs")
    attempt("down: push", lambda: model.push_to_hub("author/regs", token=other))
    (out / "facts.json").write_text(json.dumps(results))


def wait(out: Path, what: str) -> None:
    """Tell the test that the server may change now, and wait until it has."""
    (out / f"ready-{what}").touch()
    while not (out / f"done-{what}").exists():
        time.sleep(0.02)


def lora_folder(folder: Path) -> None:
    """An adapter of another method."""
    get_peft_model(small_base(), LoraConfig(target_modules=["q_proj", "query"])).save_pretrained(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    role, target = sys.argv[1], Path(sys.argv[2])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    {"author": author, "reader": reader, "stranger": stranger}[role](target)
