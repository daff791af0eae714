"""The part of the Hub's HTTP protocol that the real `huggingface_hub` client uses, on this machine.

Written from the client's own source: what it sends and what it expects. Faults can be put in its way.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
RULE = "*.safetensors filter=lfs\n"


@dataclass
class Repo:
    """`branches`: name to commit; `commits`: oid to {path: content}."""

    private: bool = False
    gated: bool = False  # to everyone
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    history: list = field(default_factory=list)  # (branch, oid, message, the paths that it changed)

    def commit(self, branch, files, message):
        parent = self.branches.get(branch)
        content = (self.commits[parent] if parent else {}) | files
        oid = hashlib.sha1(repr((parent, branch, sorted(files), len(self.history))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = content, oid
        self.history.append((branch, oid, message, sorted(files)))
        return oid

    def find(self, revision):
        revision = self.branches.get(revision, revision)
        return revision, self.commits.get(revision)


@dataclass
class Fault:
    """Answer `times` requests that fit with `status`; or, with `cut`, hang up after so many bytes."""

    method: str
    pattern: str
    status: int = 500
    times: int = 1
    cut: int | None = None


class HubServer:
    """`with HubServer() as hub`: at `hub.url`; "me" writes with WRITER and only reads with READER."""

    def __init__(self):
        self.repos, self.stored, self.faults, self.requests, self.received = {}, {}, [], [], 0

    def __enter__(self):
        class Bound(Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def create(self, name, kind="model", private=False):
        repo = self.repos[kind, name] = Repo(private)
        repo.commit("main", {".gitattributes": RULE.encode()}, "initial commit")
        return repo

    def files(self, name, kind="model", revision="main"):
        return self.repos[kind, name].find(revision)[1]


def is_lfs(path, size=0):
    return path.endswith((".safetensors", ".png")) or size > 10_000_000


def file_info(path, content):
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    info = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if is_lfs(path, len(content)):
        info["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return info


def folder_info(path):
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits 40 ms until the client has thanked for the headers

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if self.cut is None else body[: self.cut])
        self.close_connection |= self.cut is not None

    def refuse(self, status, text, code=None):
        headers = {"X_Error_Message": text} | ({"X_Error_Code": code} if code else {})
        self.reply(status, {"error": text}, **headers)

    def read_body(self, length):
        self.body = self.rfile.read(length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

    def answer(self):
        self.cut, length, address = None, int(self.headers.get("Content-Length") or 0), urlparse(self.path)
        self.query, path = parse_qs(address.query), unquote(address.path)
        self.hub.requests.append((self.command, path))
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                fault.times -= 1
                if fault.cut is not None and self.command in ("PUT", "POST"):
                    self.rfile.read(min(fault.cut, length))
                    self.close_connection = True
                    return self.connection.close()
                if fault.cut is None:
                    self.read_body(length)  # all of it: the client sends the next request on this connection
                    return self.refuse(fault.status, f"fault {fault.status}")
                self.cut = fault.cut
        self.read_body(length)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.role = {WRITER: "write", READER: "read"}.get(token)
        if token and not self.role:
            return self.refuse(401, "Invalid credentials in Authorization header")
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, path):
                return action(self, *found.groups())
        self.refuse(404, f"no such address: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def may(self, name):
        """Say whether `name` may be written; answer if not."""
        if self.role is None:
            self.refuse(401, "Invalid username or password.")
        elif self.role != "write" or name.split("/")[0] != "me":
            self.refuse(403, f"Forbidden: you don't have the rights to write to {name}")
        else:
            return True

    def repo(self, kind, name):
        """Return a repository; answer if there is none, or none that this token may see."""
        repo = self.hub.repos.get((kind, name))
        if repo and repo.gated:
            self.refuse(403 if self.role else 401, f"Access to dataset {name} is restricted.", "GatedRepo")
        elif repo and (self.role or not repo.private):
            return repo
        else:
            self.refuse(404 if self.role else 401, "Repository not found", "RepoNotFound")

    def whoami(self):
        if not self.role:
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.reply(
            200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}}
        )

    def create_repo(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        kind = asked.get("type") or "model"
        url = f"{self.hub.url}/{'spaces/' if kind == 'space' else ''}{name}"
        if (kind, name) in self.hub.repos and self.role:
            return self.reply(409, {"error": "You already created this repo", "url": url, "id": "1"})
        if self.may(name):
            self.hub.create(name, kind, asked.get("visibility") == "private" or bool(asked.get("private")))
            self.reply(200, {"url": url, "id": "1", "name": name})

    def create_branch(self, kind, name, branch):
        repo = self.may(name) and self.repo(kind, name)
        if repo and branch in repo.branches:
            self.refuse(409, "Reference already exists")
        elif repo:
            repo.branches[branch] = repo.branches["main"]
            self.reply(201, {})

    def info(self, kind, name, revision=None):
        if repo := self.repo(kind, name):
            oid, files = repo.find(revision or "main")
            if files is None:
                return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            siblings = [{"rfilename": path, "size": len(files[path])} for path in files]
            self.reply(
                200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
            )

    def auth_check(self, kind, name):
        if self.repo(kind, name):
            self.reply(200)

    def tree(self, kind, name, revision, folder=""):
        if repo := self.repo(kind, name):
            files = repo.find(revision)[1]
            if files is None:
                return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            prefix = f"{folder}/" if folder else ""
            inside = [path for path in files if path.startswith(prefix)]
            if folder and not inside:
                return self.refuse(404, f"{folder} does not exist", "EntryNotFound")
            depth = prefix.count("/") + 1
            folders = {
                "/".join(path.split("/")[:end])
                for path in inside
                for end in range(depth, path.count("/") + 1)
            }
            rows = [file_info(path, files[path]) for path in inside] + list(map(folder_info, sorted(folders)))
            deep = self.query.get("recursive", ["false"])[0].lower() == "true"
            self.reply(200, [row for row in rows if deep or "/" not in row["path"][len(prefix) :]])

    def paths_info(self, kind, name, revision):
        if repo := self.repo(kind, name):
            files = repo.find(revision)[1]
            if files is None:
                return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            asked = parse_qs(self.body.decode())["paths"]
            rows = [file_info(path, files[path]) for path in asked if path in files]
            folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
            self.reply(200, rows + list(map(folder_info, folders)))

    def preupload(self, kind, name, revision):
        if self.may(name) and (repo := self.repo(kind, name)):
            rows, files = [], repo.find(revision)[1]
            for file in json.loads(self.body)["files"]:
                row = {"path": file["path"], "shouldIgnore": False}
                row["uploadMode"] = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
                if file["path"] in files:
                    known = file_info(file["path"], files[file["path"]])
                    row["oid"] = known.get("lfs", known)["oid"]
                rows.append(row)
            self.reply(200, {"files": rows})

    def lfs_batch(self, kind, name):
        if not self.may(name):
            return
        objects = json.loads(self.body)["objects"]
        for row in objects:
            if row["oid"] not in self.hub.stored:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{row['oid']}"}}
                row["actions"]["verify"] = {"href": f"{self.hub.url}/verify/{name}"}
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        self.hub.received += len(self.body)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "the checksum does not fit")
        self.hub.stored[oid] = self.body
        self.reply(200)

    def lfs_verify(self, name):
        known = json.loads(self.body)["oid"] in self.hub.stored
        self.reply(200 if known else 404, {})

    def commit(self, kind, name, revision):
        if not (self.may(name) and (repo := self.repo(kind, name))):
            return
        files, message = {}, None
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                message = value["summary"]
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.stored:
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                return self.refuse(400, f"{value['path']} was never uploaded")
        oid = repo.commit(revision, files, message)
        self.reply(
            200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
        )

    def resolve(self, kind, name, revision, path):
        if not (repo := self.repo(kind, name)):
            return
        oid, files = repo.find(revision)
        if files is None or path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound" if files else "RevisionNotFound")
        content, info = files[path], file_info(path, files[path])
        headers = {
            "X_Repo_Commit": oid,
            "ETag": f'"{info.get("lfs", info)["oid"]}"',
            "Accept_Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        part = content[start : int(wanted[2]) + 1 if wanted and wanted[2] else None]
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self.reply(206 if wanted else 200, part, **headers)

    def accept(self):
        self.reply(200, {"errors": [], "warnings": []})


def of(action):
    """Read the kind of a repository from its address: "models" or "models/", "spaces" or "spaces/", ""."""
    return lambda self, kind, *rest: action(self, (kind or "models").strip("/")[:-1], *rest)


KINDS, NAME = "(models|spaces|datasets)", "([^/]+/[^/]+?)"
ROUTES = [
    ("/api/whoami-v2", Handler.whoami),
    ("/api/repos/create", Handler.create_repo),
    ("/api/validate-yaml", Handler.accept),
    (f"/api/{KINDS}/{NAME}/branch/(.+)", of(Handler.create_branch)),
    (f"/api/{KINDS}/{NAME}/preupload/([^/]+)", of(Handler.preupload)),
    (f"/api/{KINDS}/{NAME}/commit/([^/]+)", of(Handler.commit)),
    (f"/api/{KINDS}/{NAME}/auth-check", of(Handler.auth_check)),
    (f"/api/{KINDS}/{NAME}/tree/([^/]+)", of(Handler.tree)),
    (f"/api/{KINDS}/{NAME}/tree/([^/]+)/(.+)", of(Handler.tree)),
    (f"/api/{KINDS}/{NAME}/paths-info/([^/]+)", of(Handler.paths_info)),
    (f"/api/{KINDS}/{NAME}/revision/([^/]+)", of(Handler.info)),
    (f"/api/{KINDS}/{NAME}", of(Handler.info)),
    (f"/(spaces/)?{NAME}\\.git/info/lfs/objects/batch", of(Handler.lfs_batch)),
    ("/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("/verify/(.+)", Handler.lfs_verify),
    (f"/(spaces/|datasets/)?{NAME}/resolve/([^/]+)/(.+)", of(Handler.resolve)),
]
