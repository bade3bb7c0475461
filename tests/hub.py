"""A hub on loopback, real HTTP: what `huggingface_hub` asks of one to push a model repo and to load it again."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Holds the files of every pushed repo: ``files[repo][path]`` are bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


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

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.body()
        if path == "/api/repos/create":
            named = json.loads(body)
            repo = "/".join(part for part in (named.get("organization"), named["name"]) if part)
            self.server.files.setdefault(repo, {})
            self.reply({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]
            self.reply({"transfer": "basic", "objects": upload})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = json.loads(body)["files"]
            modes = [{**f, "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            self.reply({"files": modes})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply({"error": f"POST {path}"}, 404)

    def commit(self, repo: str, lines: list[dict]):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repo][value["path"]] = self.server.blobs[value["oid"]]
        self.reply({"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self):
        data = self.body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.reply(ETag='"part"')

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self.reply({"name": "tester", "type": "user", "orgs": []})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.resolve(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            files = self.server.files.get(match[1])
            if files is None or match[2]:
                self.reply({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.reply([{"type": "file", "path": p, "size": len(d), "oid": _digest(d)} for p, d in files.items()])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files.get(match[1], {})]
            self.reply({"id": match[1], "sha": COMMIT, "siblings": siblings, "private": False})
        else:
            self.reply({"error": f"GET {path}"}, 404)

    do_HEAD = do_GET

    def resolve(self, repo: str, name: str):
        data = self.server.files.get(repo, {}).get(name)
        if data is None:
            self.reply({"error": "not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.reply(data, ETag=f'"{_digest(data)}"', X_Repo_Commit=COMMIT)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
