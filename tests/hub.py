"""A hub on loopback, real HTTP: what `huggingface_hub` asks of one to push a model repo and to load it again."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_test"
RELATIONS = {"finetune", "adapter", "quantized", "merge"}  # that the Hub knows between a model and its base
NAME = r"[\w.-]+/[\w.-]+"


@dataclass
class Repo:
    """Every commit keeps all of its files; branches point at commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = sorted((path, _digest(data)) for path, data in files.items())
        sha = hashlib.sha1(repr([len(self.commits), content]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Hub(ThreadingHTTPServer):
    """Repos by name. Who writes, or reads a private one, needs `TOKEN`; all requests are kept.

    `sent` counts the bytes of every file that were sent; `ranged` is whether parts of files are.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.ranged = True
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> dict[str, dict[str, bytes]]:
        """``files[repo][path]`` of every main branch."""
        return {name: repo.files for name, repo in self.repos.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, body=b"", status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def readable(self, name: str, revision: str = "main") -> tuple[Repo, str] | None:
        """The repo and its commit; answers as the Hub does if there is none, or none for whoever asks."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.trusted):
            self.reply({"error": "Repository not found"}, 404 if self.trusted else 401, X_Error_Code="RepoNotFound")
        elif (sha := repo.resolve(revision)) is None:
            self.reply({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
        else:
            return repo, sha
        return None

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.server.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            errors = _card_errors(json.loads(body)["content"])
            told = [{"message": error} for error in errors]
            self.reply({"errors": told, "warnings": []}, 400 if errors else 200)
        elif not self.trusted:
            self.reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]
            self.reply({"transfer": "basic", "objects": upload})
        elif match := re.fullmatch(rf"/api/models/({NAME})/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [{**f, "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            self.reply({"files": modes})
        elif match := re.fullmatch(rf"/api/models/({NAME})/branch/(.+)", path):
            repo, known = self.server.repos[match[1]], match[2] in self.server.repos[match[1]].branches
            repo.branches.setdefault(match[2], repo.branches["main"])
            self.reply({}, 409 if known else 200)
        elif match := re.fullmatch(rf"/api/models/({NAME})/commit/(.+)", path):
            self.commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply({"error": f"POST {path}"}, 404)

    def create(self, named: dict):
        name = "/".join(part for part in (named.get("organization") or "tester", named["name"]))
        known = name in self.server.repos
        if not known:
            self.server.repos[name] = Repo(named.get("visibility") == "private" or bool(named.get("private")))
        self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    def commit(self, name: str, branch: str, lines: list[dict]):
        repo = self.server.repos[name]
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def do_PUT(self):
        data = self.body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.reply(ETag='"part"')

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            self.reply({"name": "tester", "type": "user", "orgs": []})
        elif match := re.fullmatch(rf"/({NAME})/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(rf"/api/models/({NAME})/tree/([^/]+)(/.*)?", path):
            self.tree(match[1], match[2], (match[3] or "").strip("/"))
        elif match := re.fullmatch(rf"/api/models/({NAME})(?:/revision/(.+))?", path):
            if found := self.readable(match[1], match[2] or "main"):
                siblings = [{"rfilename": name} for name in found[0].commits[found[1]]]
                self.reply({"id": match[1], "sha": found[1], "siblings": siblings, "private": found[0].private})
        else:
            self.reply({"error": f"GET {path}"}, 404)

    do_HEAD = do_GET

    def tree(self, name: str, revision: str, folder: str):
        if found := self.readable(name, revision):
            files = found[0].commits[found[1]]
            inside = {p: d for p, d in files.items() if not folder or p.startswith(f"{folder}/")}
            if folder and not inside:
                self.reply({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.reply([{"type": "file", "path": p, "size": len(d), "oid": _digest(d)} for p, d in inside.items()])

    def resolve(self, name: str, revision: str, file: str):
        if found := self.readable(name, revision):
            data = found[0].commits[found[1]].get(file)
            if data is None:
                self.reply({"error": "not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[1])
                return
            told = {"ETag": f'"{_digest(data)}"', "X_Repo_Commit": found[1]}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranged else None
            size, status = len(data), 200
            if asked:
                start, end = int(asked[1]), min(int(asked[2]) + 1, size)
                data, status, told["Content_Range"] = data[start:end], 206, f"bytes {start}-{end - 1}/{size}"
            if self.command == "GET":
                self.server.sent[file] += len(data)
            self.reply(data, status, **told)


def _card_errors(content: str) -> list[str]:
    """What the Hub would find wrong with a card's metadata: a part of its rules, by its documentation."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["no metadata"]
    errors = []
    strings = {name: data[name] for name in ("tags", "datasets") if name in data}
    errors += [f"{n} must be strings" for n, v in strings.items() if not all(isinstance(one, str) for one in v)]
    if not re.fullmatch(NAME, data.get("base_model", "a/b")):
        errors.append("base_model must be the id of a model")
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f"base_model_relation must be one of {RELATIONS}")
    if not re.fullmatch(r"[a-z0-9.-]+", data.get("license", "mit")):
        errors.append("license must be an id")
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str) or not entry.get("results"):
            errors.append("model-index needs a name and results")
        for result in entry.get("results", []):
            told = [result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")]
            told += [metric.get(key) for metric in result["metrics"] for key in ("type", "value")]
            if any(one is None for one in told):
                errors.append("a result needs a task's type, a data set's type and name, a metric's type and value")
    return errors


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def serving():
    """A hub that runs meanwhile."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
