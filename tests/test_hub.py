"""Push and pull with the real huggingface_hub client against a small Hub on loopback, each user in a fresh process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import OWN_TEXT, lora_folder
from hub_server import HubServer
from processes import run_module
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

AUTHOR, OTHER, WRONG = "hf_AuthorsTokenQwErTy", "hf_OthersTokenAsDfGh", "hf_WrongTokenZxCvBn"
TOKENS = (AUTHOR, OTHER, WRONG)
CLIENT = Path(__file__).with_name("hub_client.py")
LOADED_AS = {
    "base: unload",
    "extra: PeftModel.load_adapter",
    "extra: load_adapter",
    "extra: subfolder",
    "pair: load_adapters",
    "first: PeftModel, commit",
    "first: commit",
    "first: tag",
    "second: AutoPeftModel",
    "second: HF_TOKEN",
    "second: PeftModel",
    "second: PeftModel, private",
    "second: RegisterPeftModel",
    "second: branch",
    "second: load_adapter",
    "second: private",
    "second: pull request",
}


def settings(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """What a client's process sees of the Hub: this server, a cache of its own, no login, every log."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_DEBUG": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "AUTHOR_TOKEN": AUTHOR,
        "OTHER_TOKEN": OTHER,
        "WRONG_TOKEN": WRONG,
        **more,
    }


def said(script: Path, *arguments: object, **options: Any) -> str:
    """Everything that a process has written."""
    done = run_module(script, *arguments, **options)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    return text


@dataclass
class Session:
    """What an author has pushed and a reader has loaded."""

    server: HubServer
    folder: Path
    facts: dict[str, Any]
    output: str

    def readme(self, revision: str = "main", repo: str = "author/regs") -> str:
        commit = self.server.repos[repo].at(revision)
        assert commit is not None
        return commit.files["README.md"].data.decode()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("hub")
    with HubServer({AUTHOR: "author", OTHER: "other"}) as server:
        output = ""
        for role in ("author", "reader"):
            output += said(CLIENT, role, folder / role, hub=settings(server.endpoint, folder / f"home-{role}"))
        facts = json.loads((folder / "author" / "facts.json").read_text())
        yield Session(server, folder, facts, output)


def pushed(session: Session) -> dict[str, torch.Tensor]:
    return load_file(session.folder / "author" / "outputs.safetensors")


def test_what_is_loaded_is_what_was_pushed_bit_for_bit(session: Session) -> None:
    expected, loaded = pushed(session), load_file(session.folder / "reader" / "outputs.safetensors")
    different = [name for name in loaded if not torch.equal(loaded[name], expected[name.split(":")[0]])]
    assert not different
    assert set(loaded) == LOADED_AS


def test_the_versions_differ_from_one_another(session: Session) -> None:
    outputs = list(pushed(session).values())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_a_push_is_one_commit_with_the_weights_in_lfs(session: Session) -> None:
    repo = session.server.repos["author/regs"]
    first, second = repo.at(session.facts["first"]), repo.at(session.facts["second"])
    assert first is not None
    assert second is not None
    assert set(first.files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert [name for name, blob in first.files.items() if blob.lfs] == ["adapter_model.safetensors"]
    assert len(first.files["adapter_model.safetensors"].data) < 1500
    assert first.files["adapter_model.safetensors"] != second.files["adapter_model.safetensors"]
    # The author's edit is the one commit between the two.
    assert [commit.oid for commit in repo.commits].index(second.oid) == 3


def test_a_push_of_several_brings_the_card_in_the_repository_up_to_date(session: Session) -> None:
    commits = session.server.repos["author/pair"].commits
    edited, last = (session.readme(commit.oid, "author/pair") for commit in commits[-2:])
    assert 'load_adapters(base, "author/pair")' in edited
    assert "\n- scenes\n" in edited
    assert last != edited
    assert last.endswith(OWN_TEXT)
    assert 'load_adapters(base, "author/pair")' in last


def test_the_same_adapter_again_is_no_new_commit(session: Session) -> None:
    assert session.facts["third"] == session.facts["second"]


def test_an_edit_during_a_push_is_not_overwritten(session: Session) -> None:
    assert "'author/race': A commit has happened since" in session.facts["race"]
    head = session.server.repos["author/race"].at("main")
    assert head is not None
    assert head.files["README.md"].data == b"Mine."


def test_a_private_repository_is_private(session: Session) -> None:
    assert session.server.repos["author/secret"].private
    assert not session.server.repos["author/regs"].private


def test_a_pull_request_leaves_main_alone(session: Session) -> None:
    assert session.facts["pull_request"].endswith("/author/regs/discussions/1")
    assert session.server.repos["author/regs"].branches["main"] == session.facts["second"]
    assert "\n- pr\n" in session.readme("refs/pr/1")
    assert "\n- pr\n" not in session.readme()


def test_text_and_metadata_of_the_readme_in_the_repository_are_kept(session: Session) -> None:
    readme = session.readme()
    metadata, text = readme.removeprefix("---\n").split("\n---\n", 1)
    assert text.startswith(OWN_TEXT)
    assert "license: mit" in metadata
    assert "language: en" in metadata
    assert "\n- mine\n" in metadata
    assert "\nbase_model: author/base\n" in f"{metadata}\n"
    assert "\nbase_model_relation: adapter\n" in f"{metadata}\n"
    assert 'PeftModel.from_pretrained(base, "author/regs")' in text
    assert text.count("<!-- register-adapter: begin") == text.count("<!-- register-adapter: end -->") == 1


def test_results_of_other_weights_leave_the_card(session: Session) -> None:
    assert "| accuracy | 0.75 |" in session.readme(session.facts["first"])
    assert "| accuracy | 0.75 |" not in session.readme()
    assert "| accuracy | 0.5 |" in session.readme()


def test_the_snippet_of_a_pushed_card_runs_offline_from_the_cache(session: Session, tmp_path: Path) -> None:
    snippet = re.search(r"```python\n(.*?)```", session.readme(), re.DOTALL)
    assert snippet is not None
    script = tmp_path / "snippet.py"
    check = "\nprint(type(base).__name__, sum(p.numel() for n, p in model.named_parameters() if 'register' in n))\n"
    script.write_text(snippet[1] + check)
    hub = settings("http://127.0.0.1:1", session.folder / "home-reader", HF_HUB_OFFLINE="1", HF_DEBUG="0")
    assert "ViTForImageClassification 128\n" in said(script, cwd=tmp_path, hub=hub)


def test_no_token_leaves_the_authorization_header(session: Session) -> None:
    assert AUTHOR not in session.output
    assert "Send: curl" in session.output, "HF_DEBUG was not on"
    blobs = [b for repo in session.server.repos.values() for c in repo.commits for b in c.files.values()]
    assert not [blob for blob in blobs if AUTHOR.encode() in blob.data]
    for request in session.server.requests:
        assert AUTHOR.encode() not in request.body
        assert AUTHOR not in request.url
        if request.url.startswith("/objects/"):
            assert request.authorization is None, "the storage host was sent a token"
    assert any(request.authorization == f"Bearer {AUTHOR}" for request in session.server.requests)
    files = [path for path in session.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if AUTHOR.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def failures(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a stranger gets to see, by case, and everything that was written meanwhile."""
    folder = tmp_path_factory.mktemp("stranger")
    adapter = {path.name: path.read_bytes() for path in (session.folder / "author" / "adapter").glob("adapter_*")}
    config, weights = adapter["adapter_config.json"], adapter["adapter_model.safetensors"]
    lora_folder(folder / "lora")
    pickled = {"adapter_config.json": config, "adapter_model.bin": b"\x80\x04N."}
    server = HubServer({AUTHOR: "author", OTHER: "other"})
    server.seed("author/regs", adapter)
    server.seed("author/secret", adapter, private=True)
    server.seed("author/gated", adapter, gated=True)
    server.seed("author/config-only", {"adapter_config.json": config})
    server.seed("author/pickle", pickled)
    server.seed("author/nested", {f"old/{name}": data for name, data in pickled.items()})
    server.seed("author/damaged", {"adapter_config.json": config, "adapter_model.safetensors": weights[:-7]})
    server.seed("author/lora", {p.name: p.read_bytes() for p in (folder / "lora").glob("adapter_*")})
    out = folder / "out"
    with server, ThreadPoolExecutor(1) as pool:
        client = pool.submit(said, CLIENT, "stranger", out, hub=settings(server.endpoint, folder / "home"))
        for what in ("echo", "down"):
            while not (out / f"ready-{what}").exists():
                assert not client.done(), client.result()
                time.sleep(0.02)
            if what == "echo":
                server.echo_token = True
            else:
                server.stop()
            (out / f"done-{what}").touch()
        output = client.result()
    assert not [r for r in server.requests if r.method == "GET" and r.url.endswith("adapter_model.bin")]
    return json.loads((out / "facts.json").read_text()), output


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("wrong token", "HubAccessError", ["'author/secret'", "refused the token", "hf auth login"]),
        ("no token", "HubAccessError", ["'author/secret'", "without a token", "if it is private"]),
        ("other's token", "HubAccessError", ["'author/secret'", "with the token in use", "if it is private"]),
        ("gated, no token", "HubAccessError", ["'author/gated' is gated", "ask for access"]),
        ("gated, token", "HubAccessError", ["'author/gated' is gated", "ask for access"]),
        ("no repository", "HubAccessError", ["no folder 'author/nothing'", "shows no repository", "Check the name"]),
        ("no revision", "HubAccessError", ["'author/regs'", "'v9'"]),
        ("no subfolder", "AdapterFileError", ["'author/regs'", "'deep'", "no adapter_config.json"]),
        ("no weights", "AdapterFileError", ["'author/config-only'", "no weights", "adapter_model.safetensors"]),
        ("pickle", "AdapterFileError", ["'author/pickle'", "pickled", "never loaded"]),
        ("pickle in a subfolder", "AdapterFileError", ["'author/nested'", "'old'", "pickled"]),
        ("damaged", "AdapterFileError", ["not a whole safetensors file", "Nothing was loaded"]),
        ("other method", "AdapterFileError", ["'author/lora'", "LORA", "not registers"]),
        ("not a name", "HubAccessError", ["'a/b/c'", "neither a folder", "'user/repo'"]),
        ("empty folder", "AdapterFileError", ["empty", "no adapter_config.json"]),
        ("token of two lines", "ValueError", ["the token", "copy it again"]),
        ("pickle: PeftModel", "AdapterFileError", ["'author/pickle'", "pickled"]),
        ("no weights: PeftModel", "AdapterFileError", ["'author/config-only'", "no weights"]),
        ("no weights: folder", "AdapterFileError", ["no weights", "adapter_model.safetensors"]),
        ("push: wrong token", "HubAccessError", ["'author/regs'", "refused the token"]),
        ("push: no token", "HubAccessError", ["'author/regs'", "token"]),
        ("push: other's repository", "HubAccessError", ["'author/regs'", "403"]),
        ("push: other's name", "HubAccessError", ["'author/new'", "403"]),
        ("push of several: wrong token", "HubAccessError", ["'author/pair'", "refused the token"]),
        ("push of several: other's name", "HubAccessError", ["'author/new'", "403"]),
        ("push: token of two lines", "ValueError", ["the token", "copy it again"]),
        ("echo: load", "HubAccessError", ["'author/secret'", "token"]),
        ("echo: push", "HubAccessError", ["'author/regs'", "token"]),
        ("echo: push of several", "HubAccessError", ["'author/pair'", "token"]),
        ("down: load", "HubAccessError", ["'author/regs'", "cannot be reached", "http://127.0.0.1", "connection"]),
        ("down: push", "HubAccessError", ["'author/regs'", "cannot be reached", "http://127.0.0.1", "connection"]),
    ],
)
def test_a_failure_is_named_and_changes_nothing(
    failures: tuple[dict[str, Any], str], case: str, kind: str, words: list[str]
) -> None:
    failure = failures[0][case]
    assert failure["type"] == kind, failure
    assert not [word for word in words if word not in failure["message"]], failure["message"]
    assert failure["unchanged"]


def test_no_token_in_an_error_or_a_log(failures: tuple[dict[str, Any], str]) -> None:
    results, output = failures
    assert "Traceback" in output
    assert results["wrong token: PeftModel"]["type"] == "ValueError"
    for token in TOKENS:
        assert token not in output
        assert token not in json.dumps(results)
