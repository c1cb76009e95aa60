"""A small server with the API of the Hugging Face Hub, for the library's own client."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

from huggingface_hub import constants

TOKEN = "hf_test"


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories in memory: the files of each commit, and the branches.

    Attributes:
        commits: The files of a commit by path, by repository and name of the commit.
        branches: The newest commit, by repository and branch.
        private: Repositories that need the token.
        spoiled: Paths of files that arrive with one other byte.
        requests: (method, path) of each request.
    """

    def __init__(self):
        self.commits, self.branches, self.lfs = {}, {}, {}
        self.private, self.gated, self.spoiled, self.requests = set(), set(), set(), []
        self.refuse = None  # a part of paths that are answered with an error

    def add(self, repo, files, branch="main"):
        """Adds files in a new commit, and returns its name."""
        head = self.branches.setdefault(repo, {}).get(branch)
        whole = {**self.commits.get((repo, head), {".gitattributes": b""}), **files}
        name = hashlib.sha1(repr(sorted(whole.items())).encode()).hexdigest()
        self.commits[repo, name] = whole
        self.branches[repo][branch] = name
        return name

    def entry(self, path, content):
        listed = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if is_large(path):
            listed["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 130,
            }
        return listed


def is_large(path):
    return path.endswith((".safetensors", ".bin", ".ckpt"))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code, status=404):
        self.answer(b"", status, X_Error_Code=code)

    @property
    def known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_request(self):
        url = urllib.parse.urlsplit(self.path)
        parts = urllib.parse.unquote(url.path).strip("/").split("/")
        self.hub.requests.append((self.command, url.path))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.hub.refuse and self.hub.refuse in self.path:
            return self.answer(b"", 400)
        match parts:
            case ["api", "whoami-v2"]:
                return self.answer({"name": "me"}) if self.known else self.answer(b"", 401)
            case ["api", "repos", "create"]:
                wanted = json.loads(self.body)
                repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                new = repo not in self.hub.branches
                if new:
                    self.hub.add(repo, {})
                url = f"{constants.ENDPOINT}/{repo}"
                return self.answer({"url": url, "name": repo}, 200 if new else 409)
            case ["api", "validate-yaml"]:
                self.hub.card = json.loads(self.body)["content"]
                return self.answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, *rest]:
                return self.of_repo(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *path]:
                return self.of_repo(f"{owner}/{name}", ["resolve", revision, *path])
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self.batch()
            case ["lfs", oid] if self.command == "PUT":
                self.hub.lfs[oid] = self.body
                return self.answer()
            case ["lfs", "verify"]:
                return self.answer()
        return self.missing("")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def batch(self):
        link = {"href": f"{constants.ENDPOINT}/lfs/"}
        objects = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": link["href"] + wanted["oid"], "header": {}},
                    "verify": {"href": link["href"] + "verify", "header": {}},
                },
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def of_repo(self, repo, rest):
        hub = self.hub
        if repo not in hub.branches or (repo in hub.private and not self.known):
            return self.missing("RepoNotFound")
        if repo in hub.gated and not self.known:
            return self.missing("GatedRepo", 403)
        what, revision, *path = [*rest, "", ""][: max(len(rest), 2)]
        commit = hub.branches[repo].get(revision or "main", revision)
        files = hub.commits.get((repo, commit))
        if files is None:
            return self.missing("RevisionNotFound")
        match what:
            case "" | "revision":
                return self.answer({"id": repo, "sha": commit, "siblings": []})
            case "tree":
                return self.answer([hub.entry(*item) for item in files.items()])
            case "paths-info":
                asked = urllib.parse.parse_qs(self.body.decode())["paths"]
                return self.answer(
                    [hub.entry(path, files[path]) for path in asked if path in files]
                )
            case "preupload":
                wanted = json.loads(self.body)["files"]
                modes = {True: "lfs", False: "regular"}
                return self.answer({"files": [
                    {"path": f["path"], "uploadMode": modes[is_large(f["path"])],
                     "shouldIgnore": False} for f in wanted
                ]})  # fmt: skip
            case "commit":
                return self.commit(repo, revision)
            case "resolve":
                return self.send_file("/".join(path), files, commit)
        return self.missing("")

    def commit(self, repo, branch):
        files = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        spoiled = {path: b"?" + files[path][1:] for path in self.hub.spoiled & files.keys()}
        name = self.hub.add(repo, files | spoiled, branch)
        url = f"{constants.ENDPOINT}/{repo}/commit/{name}"
        self.answer({"commitUrl": url, "commitOid": name})

    def send_file(self, path, files, commit):
        if path not in files:
            return self.missing("EntryNotFound")
        content = files[path]
        listed = self.hub.entry(path, content)
        etag = listed["lfs"]["oid"] if "lfs" in listed else listed["oid"]
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if path in self.hub.spoiled:
            content = b"?" + content[1:]
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        partial = "Range" in self.headers
        return self.answer(content[int(begin) :], 206 if partial else 200, **headers)


@contextlib.contextmanager
def serving(monkeypatch, cache):
    """A hub that the client of this process talks to, with an empty cache."""
    hub = Hub()
    handler = type("OfHub", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + template)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", {"127.0.0.1"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
