"""The Hugging Face hub's HTTP interface on this machine, as far as its client needs it to share a model.

The client reads its settings when it is imported: run it in a process with the environment `Hub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


LICENSES = """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda
cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0
cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0
gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++
osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib""".split()
PIPELINE_TAGS = """depth-estimation feature-extraction fill-mask image-classification image-feature-extraction
image-segmentation image-text-to-image image-text-to-text image-to-3d image-to-image image-to-text
image-to-video object-detection other text-classification text-generation text-to-3d text-to-audio
text-to-image text-to-speech text-to-video unconditional-image-generation""".split()
REPO, REVISION = "(?P<repo>[^/]+/[^/]+?)", "(?P<revision>[^/]+)"
ROUTES = {"whoami": "GET /api/whoami-v2",
          "create": "POST /api/repos/create",
          "validate": "POST /api/validate-yaml",
          "preupload": f"POST /api/models/{REPO}/preupload/{REVISION}",
          "batch": rf"POST /{REPO}\.git/info/lfs/objects/batch",
          "put": "PUT /lfs/(?P<oid>[0-9a-f]{64})",
          "verify": "POST /lfs/verify",
          "commit": f"POST /api/models/{REPO}/commit/{REVISION}",
          "info": f"GET /api/models/{REPO}(/revision/{REVISION})?",
          "tree": f"GET /api/models/{REPO}/tree/{REVISION}(/(?P<path>.+))?",
          "resolve": f"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)"}


def is_lfs(path, size):
    return size > 10_000_000 or size > 0 and path.endswith((".safetensors", ".bin", ".png"))


def oid_of(path, content):
    """The SHA-256 of a file kept as an LFS object, git's hash of another."""
    if is_lfs(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_card(card):
    """The errors and the warnings of a model card."""
    block = re.match(r"\s*^---\s*?\n(.*?)^---\s*?$", card, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        return [f"bad metadata: {error}"], []
    if not isinstance(data, dict):
        return ["empty or missing yaml metadata in repo card"], []
    license, base, tags = data.get("license"), data.get("base_model", []), data.get("tags", [])
    bases = base if isinstance(base, list) else [base]
    rules = {f'"license" must be one of [{", ".join(LICENSES)}]': license in LICENSES,
             f'"pipeline_tag" must be one of [{", ".join(PIPELINE_TAGS)}]':
             data.get("pipeline_tag", "other") in PIPELINE_TAGS,
             f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.':
             all(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(one)) for one in bases),
             '"tags" must be an array of strings':
             isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)}
    named = license != "other" or data.get("license_name")
    return [rule for rule, kept in rules.items() if not kept], [] if named else ['"license_name" is missing']


class Refused(Exception):
    """An answer that is an error; the client tells some of them by their `code`."""

    def __init__(self, status, message, code="", **more):
        self.answer = status, {"error": message, **more}, {"X-Error-Message": message, "X-Error-Code": code}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def reply(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer, headers = self.server.hub.answer(self.command, self.path, self.headers, body)
        if status is None:
            self.close_connection = True
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = reply

    def log_message(self, *_):
        pass


class Hub:
    """`with Hub() as hub:` serves at `hub.url` until the block ends.

    Once `fail_after` LFS objects were put in all, every request is answered with the status `fail_with`, or
    its connection is closed if that is None. After 408, 429, 500, 502, 503, 504 and a lost connection the
    client repeats most requests for 23 seconds; other errors it raises at once.
    """

    def __init__(self, token="hf_right", user="somebody"):
        self.token, self.user, self.fail_after, self.fail_with = token, user, None, 507
        self.revisions, self.objects, self.lock = {}, {}, threading.Lock()
        self.commits, self.requests, self.uploads = [], [], []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.url = self, f"http://127.0.0.1:{self.server.server_port}"
        self.server.handle_error = lambda *_: None  # a client that went away is no news
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def files(self):
        return {repo: revisions[self.head(repo)] for repo, revisions in self.revisions.items()}

    def head(self, repo):
        return list(self.revisions[repo])[-1]

    def environment(self, home):
        """The environment of a process whose client knows this hub only and keeps its files in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def answer(self, method, target, headers, body):
        """A request's status, content (bytes, or what JSON takes) and headers."""
        path = urlsplit(target).path
        with self.lock:
            self.requests.append((method, path))
            try:
                answer = self.route(method, path, headers.get("Authorization"), body)
                return answer if isinstance(answer, tuple) else (200, answer, {})
            except Refused as refused:
                return refused.answer
            except Exception as error:
                return 400, {"error": f"{method} {target}: {error!r}"}, {}

    def route(self, method, path, authorization, body):
        if self.fail_after is not None and len(self.uploads) >= self.fail_after:
            raise Refused(self.fail_with, "Internal Error")
        if authorization not in (None, f"Bearer {self.token}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        found = ((name, re.fullmatch(route, f"{method} {path}")) for name, route in ROUTES.items())
        name, match = next((pair for pair in found if pair[1]), (None, None))
        if not authorization and (name == "whoami" or method == "POST" and name != "validate"):
            raise Refused(401, "Invalid username or password.")
        given = {key: unquote(value) for key, value in match.groupdict().items() if value} if match else {}
        if not match or "repo" in given and given["repo"] not in self.revisions:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if "repo" in given:
            revision, head = given.pop("revision", "main"), self.head(given["repo"])
            given["sha"] = head if revision == "main" else revision
            if given["sha"] not in self.revisions[given["repo"]]:
                raise Refused(404, "Invalid rev id", "RevisionNotFound")
        sent = [body] if method == "PUT" else [json.loads(line) for line in body.splitlines()]
        return getattr(self, name)(*sent, **given)

    def whoami(self):
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, asked):
        owner = asked.get("organization") or self.user
        repo = f"{owner}/{asked['name']}"
        if owner != self.user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        if repo in self.revisions:
            raise Refused(409, "You already created this model repo", url=f"{self.url}/{repo}")
        self.revisions[repo] = {hashlib.sha1(repo.encode()).hexdigest(): {}}
        return {"url": f"{self.url}/{repo}", "name": repo}

    def validate(self, asked):
        errors, warnings = ([{"message": rule} for rule in found] for found in check_card(asked["content"]))
        return 400 if errors else 200, {"errors": errors, "warnings": warnings}, {}

    def preupload(self, asked, repo, sha):
        held = self.revisions[repo][sha]
        return {"files": [{"path": path, "uploadMode": "lfs" if is_lfs(path, size) else "regular",
                           "shouldIgnore": False, "oid": oid_of(path, held[path]) if path in held else None}
                          for path, size in ((file["path"], file["size"]) for file in asked["files"])]}

    def batch(self, asked, **_):
        objects = [{"oid": one["oid"], "size": one["size"]} for one in asked["objects"]]
        for one in objects:
            if one["oid"] not in self.objects:
                one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"},
                                  "verify": {"href": f"{self.url}/lfs/verify"}}
        return {"transfer": "basic", "objects": objects}

    def put(self, content, oid):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The content is not what its name says")
        self.objects[oid] = content
        self.uploads.append(oid)
        return b""

    def verify(self, asked):
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "Object not found")
        return {}

    def commit(self, header, *lines, repo, sha):
        new = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) if line["key"] == "file"
               else self.objects[line["value"]["oid"]] for line in lines}
        files = self.revisions[repo][sha] | new
        sha = hashlib.sha1(f"{sha} {header} {lines}".encode()).hexdigest()
        self.revisions[repo][sha] = files
        self.commits.append((repo, header["value"]["summary"], sorted(new)))
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}

    def info(self, repo, sha):
        return {"id": repo, "author": self.user, "sha": sha, "private": False,
                "siblings": [{"rfilename": path} for path in sorted(self.revisions[repo][sha])]}

    def tree(self, repo, sha, path=""):
        """All files of the repository or under a folder of it."""
        held = {name: content for name, content in self.revisions[repo][sha].items() if name.startswith(path)}
        if not held and path:
            raise Refused(404, "Entry not found", "EntryNotFound")
        entries = []
        for path, content in sorted(held.items()):
            size, oid = len(content), oid_of(path, content)
            lfs = {"oid": oid, "size": size, "pointerSize": 134} if is_lfs(path, size) else None
            entries.append({"type": "file", "path": path, "size": size, "oid": oid, "lfs": lfs})
        return entries

    def resolve(self, repo, sha, path):
        content = self.revisions[repo][sha].get(path)
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        etag = f'"{oid_of(path, content)}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": len(content)} if is_lfs(path, len(content)) else {}
        return 200, content, {"ETag": etag, "X-Repo-Commit": sha, **linked}
