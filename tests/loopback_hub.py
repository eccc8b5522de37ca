"""A Hub for tests: enough of the protocol for huggingface_hub's own client to push and load models, on this machine.

Binary files travel by git LFS, as they do on the real Hub for clients without xet. Everything is kept in memory.

    with LoopbackHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.files("user/model")["README.md"]
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
BINARY = (".safetensors", ".bin", ".png")
API = r"/api/models/(?P<repo>[^/]+/[^/]+)"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # id, title, files

    def commit(self, title: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append((name, title, files))
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        name, _, files = self.commits[-1] if revision == "main" else next(c for c in self.commits if c[0] == revision)
        return name, files


class LoopbackHub:
    """The server, started on entry and stopped on exit."""

    def __init__(self, user: str = "user") -> None:
        self.user = user
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[str, int]] = []  # each makes one request that matches the pattern fail so
        self.lock = threading.RLock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        port = self.server.server_address[1]
        # The client follows redirects within one host by itself and then misses headers: large files have another name.
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """Variables for a client in another process with a home of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repositories[repo].commits[-1][2]

    def titles(self, repo: str) -> list[str]:
        return [title for _, title, _ in self.repositories[repo].commits]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer=b"", status=200, **headers):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if data is answer else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str, message: str):
        self._send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _handle(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        hub = self.hub
        with hub.lock:
            hub.requests.append((self.command, path))
            for pattern, status in hub.failures:
                if re.search(pattern, f"{self.command} {path}"):
                    hub.failures.remove((pattern, status))
                    return self._fail(status, "InternalError", "the power went out")
            if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                return self._fail(401, "InvalidToken", "Invalid user token.")
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    groups = match.groupdict()
                    if "repo" in groups:
                        repository = hub.repositories.get(groups["repo"])
                        anonymous = "Authorization" not in self.headers
                        if repository is None or (repository.private and anonymous):
                            return self._fail(404, "RepoNotFound", "Repository not found")
                        groups["repo"] = repository
                    return function(self, body, **groups)
        self._send({"error": f"no such route: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    # ------------------------------------------------------------------ the account, repositories

    def whoami(self, body):
        self._send({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        if "Authorization" not in self.headers:
            return self._fail(401, "InvalidToken", "Invalid username or password.")
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self._send(answer, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[name] = Repository(private)
        repository.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send(answer)

    def info(self, body, repo, revision="main"):
        name, files = repo.at(revision)
        full = next(key for key, value in self.hub.repositories.items() if value is repo)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send({"_id": "0", "id": full, "sha": name, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, body, repo, revision):
        _, files = repo.at(revision)
        folders = {path.rpartition("/")[0] for path in files} - {""}
        self._send(
            [{"type": "directory", "oid": git_oid(folder.encode()), "size": 0, "path": folder} for folder in folders]
            + [_entry(path, data) for path, data in sorted(files.items())]
        )

    def paths_info(self, body, repo, revision):
        _, files = repo.at(revision)
        self._send([_entry(path, files[path]) for path in json.loads(body)["paths"] if path in files])

    # ------------------------------------------------------------------ pushing

    def validate(self, body):
        """What the Hub checks of a card's metadata."""
        errors = []
        try:
            metadata = yaml.safe_load(re.match(r"\s*---\n(.*?)\n---", json.loads(body)["content"], re.S)[1]) or {}
        except Exception as error:
            return self._send({"errors": [{"message": f"no YAML: {error}"}], "warnings": []}, 400)
        for key, kind in {"tags": list, "datasets": list, "license": str, "library_name": str}.items():
            if not isinstance(metadata.get(key, kind()), kind):
                errors.append({"message": f'"{key}" must be a {kind.__name__}'})
        for model in metadata.get("model-index", []):
            for result in model["results"]:
                for part, keys in {"task": ["type"], "dataset": ["type", "name"]}.items():
                    errors += [{"message": f"model-index: {part}.{k}"} for k in keys if not result[part].get(k)]
                errors += [{"message": "metrics"} for m in result["metrics"] if not (m.get("type") and "value" in m)]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, repo, revision):
        _, files = repo.at(revision)
        answer = []
        for wanted in json.loads(body)["files"]:
            path, large = wanted["path"], wanted["path"].endswith(BINARY)
            known = files.get(path)
            oid = None if known is None else hashlib.sha256(known).hexdigest() if large else git_oid(known)
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": answer})

    def lfs_batch(self, body, repo):
        answer = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/_verify", "header": {}}
                wanted = {**wanted, "actions": {"upload": upload, "verify": verify}}
            answer.append(wanted)
        self._send({"transfer": "basic", "objects": answer})

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send({"error": "checksum"}, 400)
        self.hub.objects[oid] = body
        self._send(b"")

    def lfs_verify(self, body):
        self._send({}, 200 if json.loads(body)["oid"] in self.hub.objects else 404)

    def commit(self, body, repo, revision):
        if "Authorization" not in self.headers:
            return self._fail(401, "InvalidToken", "Invalid username or password.")
        files, title = dict(repo.at("main")[1]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        name = repo.commit(title, files)
        self._send({"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/x/y/commit/{name}"})

    # ------------------------------------------------------------------ loading

    def resolve(self, body, repo, revision, path):
        name, files = repo.at(revision)
        if path not in files:
            return self._send(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=name)
        data = files[path]
        if not path.endswith(BINARY):
            return self._send(data, X_Repo_Commit=name, ETag=f'"{git_oid(data)}"')
        oid = hashlib.sha256(data).hexdigest()
        location = f"{self.hub.storage}/_storage/{oid}"
        self.hub.objects[oid] = data
        self._send(b"", 302, X_Repo_Commit=name, X_Linked_Etag=f'"{oid}"', X_Linked_Size=len(data), Location=location)

    def download(self, body, oid):
        self._send(self.hub.objects[oid], ETag=f'"{oid}"')


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "oid": git_oid(data), "size": len(data), "path": path}
    if path.endswith(BINARY):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), f"{API}/preupload/{REVISION}", _Handler.preupload),
    (("POST",), f"{API}/commit/{REVISION}", _Handler.commit),
    (("POST",), f"{API}/paths-info/{REVISION}", _Handler.paths_info),
    (("GET",), f"{API}/tree/{REVISION}", _Handler.tree),
    (("GET",), f"{API}/revision/{REVISION}", _Handler.info),
    (("GET",), API, _Handler.info),
    (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/_lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    (("POST",), "/_verify", _Handler.lfs_verify),
    (("GET", "HEAD"), "/_storage/(?P<oid>[0-9a-f]+)", _Handler.download),
    (("GET", "HEAD"), f"/(?P<repo>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]
