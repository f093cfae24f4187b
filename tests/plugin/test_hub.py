"""The hub path, against a server on loopback that speaks the part of the hub's API that a plug-in needs."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.plugin import (
    FILES,
    WEIGHTS,
    BackboneId,
    PluginConfig,
    load_plugin,
    push_to_hub,
    resolved_revision,
    save_plugin,
)
from lit_reduce.reducer import create
from lit_reduce.tokens import VisualTokens

TOKEN = "hf_local"
BACKBONE = BackboneId("pocket", "ab" * 32, "llava", 8, 16, 24)


class Repository:
    """Commits are dictionaries of files; a branch is the name of one."""

    def __init__(self):
        self.commits = {"0" * 40: {".gitattributes": b""}}
        self.branches = {"main": "0" * 40}

    def commit(self, branch, files):
        content = {**self.commits[self.branches[branch]], **files}
        digest = hashlib.sha1(repr((self.branches[branch], sorted(content.items()))).encode()).hexdigest()
        self.commits[digest] = content
        self.branches[branch] = digest
        return digest

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what):
        self.reply(
            404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound", X_Error_Message=f"{what} is not"
        )

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.log.append((self.command, "/".join(path)))
        api = path[:2] == ["api", "models"]
        owner, name, *rest = path[2:] if api else path
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.missing("Repo")
        action, revision, *inside = rest or ["revision", "main"]
        commit = repository.resolve(revision)
        if commit is None:
            return self.missing("Revision")
        files = repository.commits[commit]
        if api and action == "revision":
            return self.reply(200, {"id": f"{owner}/{name}", "sha": commit, "siblings": []})
        if api and action == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return self.reply(200, entries)
        if not api and action == "resolve":
            file = "/".join(inside)
            if file not in files:
                return self.missing("Entry")
            etag = hashlib.sha1(files[file]).hexdigest()
            return self.reply(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=commit)
        return self.missing("Entry")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.log.append((self.command, "/".join(path)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        if path == ["api", "validate-yaml"]:
            return self.reply(200, {"errors": [], "warnings": []})
        if path == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            known = repo in self.server.repositories
            self.server.repositories.setdefault(repo, Repository()).private = wanted.get("visibility") == "private"
            return self.reply(409 if known else 200, {"url": f"{self.server.address}/{repo}", "name": repo, "id": "1"})
        _, _, owner, name, action, revision = path
        repository = self.server.repositories[f"{owner}/{name}"]
        if action == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, repository.branches["main"])
            return self.reply(409 if known else 200, {})
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        commit = repository.commit(revision, files)
        url = f"{self.server.address}/{owner}/{name}/commit/{commit}"
        return self.reply(200, {"commitUrl": url, "commitOid": commit, "success": True})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repositories, server.log = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def plug(folder, seed):
    return save_plugin(folder, create("random", seed=seed), PluginConfig("", {}, BACKBONE, [64]))


def test_push_then_load_gives_the_same_reducer(hub, tmp_path):
    folder = plug(tmp_path / "plug", 5)
    (folder / "secrets.txt").write_text("not for the world")
    url = push_to_hub(folder, "me/plug")
    repository = hub.repositories["me/plug"]
    assert url == f"{hub.address}/me/plug/commit/{repository.branches['main']}"
    assert len(repository.commits) == 2, "all files in one commit"
    pushed = repository.commits[repository.branches["main"]]
    assert set(pushed) == {".gitattributes", *FILES}
    assert all(pushed[name] == (folder / name).read_bytes() for name in FILES)
    assert not repository.private

    loaded, config = load_plugin("me/plug", backbone=BACKBONE)
    tokens = VisualTokens(torch.randn(1, 24, 8), (1, 4, 6))
    assert torch.equal(loaded(tokens, 5).kept_indices, create("random", seed=5)(tokens, 5).kept_indices)
    assert config.backbone == BACKBONE


def test_push_again_updates_and_a_private_repository_is_private(hub, tmp_path):
    push_to_hub(plug(tmp_path / "plug", 1), "me/plug", private=True)
    assert hub.repositories["me/plug"].private
    push_to_hub(plug(tmp_path / "plug", 2), "me/plug", private=True)
    assert load_plugin("me/plug")[0].config.seed == 2


def test_branch_and_commit_are_revisions(hub, tmp_path):
    push_to_hub(plug(tmp_path / "plug", 1), "me/plug")
    first = hub.repositories["me/plug"].branches["main"]
    push_to_hub(plug(tmp_path / "plug", 2), "me/plug", revision="next")
    push_to_hub(plug(tmp_path / "plug", 3), "me/plug")
    seeds = [load_plugin("me/plug", revision=revision)[0].config.seed for revision in (None, "next", first, "main")]
    assert seeds == [3, 2, 1, 3]


def test_only_the_three_files_are_fetched(hub, tmp_path):
    push_to_hub(plug(tmp_path / "plug", 1), "me/plug")
    hub.repositories["me/plug"].commit("main", {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"\x80"})
    hub.log.clear()
    load_plugin("me/plug")
    fetched = {path.rsplit("/", 1)[-1] for command, path in hub.log if "/resolve/" in path}
    assert fetched == set(FILES)


def test_what_was_fetched_once_loads_without_a_server(hub, tmp_path):
    push_to_hub(plug(tmp_path / "plug", 4), "me/plug")
    load_plugin("me/plug")
    hub.log.clear()
    assert load_plugin("me/plug", local_files_only=True)[0].config.seed == 4
    assert hub.log == []
    with pytest.raises(UserError, match="cannot fetch the plug-in me/other"):
        load_plugin("me/other", local_files_only=True)


def test_a_missing_repository_revision_and_file_are_one_line_each(hub, tmp_path):
    push_to_hub(plug(tmp_path / "plug", 1), "me/plug")
    hub.repositories["me/empty"] = Repository()
    for place, revision, message in [
        ("me/none", None, "cannot fetch the plug-in me/none: .*404"),
        ("me/plug", "v9", "cannot fetch the plug-in me/plug at revision v9: .*404"),
        ("me/empty", None, "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_plugin(place, revision=revision)
        assert "\n" not in str(caught.value)


def test_damage_on_the_way_is_refused(hub, tmp_path):
    push_to_hub(plug(tmp_path / "plug", 1), "me/plug")
    hub.repositories["me/plug"].commit("main", {WEIGHTS: b"\x00" * 64})
    with pytest.raises(UserError, match="is damaged"):
        load_plugin("me/plug")


def test_nobody_answers(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot fetch the plug-in me/plug"):
        load_plugin("me/plug")


def test_pushing_needs_a_login_and_a_sound_plugin(hub, tmp_path, monkeypatch):
    folder = plug(tmp_path / "plug", 1)
    with pytest.raises(UserError, match="is not a folder"):
        push_to_hub(tmp_path / "none", "me/plug")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"cannot push to me/plug: .*401") as caught:
        push_to_hub(folder, "me/plug")
    assert "\n" not in str(caught.value)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        push_to_hub(folder, "me/plug")
    assert hub.repositories == {}


def test_a_branch_resolves_to_the_commit_that_was_loaded(hub, tmp_path):
    for seed in (1, 2):
        push_to_hub(plug(tmp_path / "plug", seed), "me/plug")
        commit = hub.repositories["me/plug"].branches["main"]
        assert load_plugin("me/plug")[0].config.seed == seed
        assert resolved_revision("me/plug", None) == resolved_revision("me/plug", commit) == commit
    assert resolved_revision(str(tmp_path / "plug"), None) is None
    assert resolved_revision("fastervlm", None) is None
    assert resolved_revision("pocket/covipal", None) is None, "shipped with a package"
