"""A stand-in for W&B's server: takes what ``wandb sync`` sends and writes each request to a file, one JSON line each.

Usage: python wandb_stub.py LOG; prints its port. Artifacts are versions by collection and digest, as W&B keeps them.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOCK = threading.Lock()
VERSIONS: dict[tuple[str, str], str] = {}
COMMITTED: set[str] = set()


def answer(name: str, given: dict[str, Any], address: str) -> dict[str, Any]:
    """The data of one GraphQL operation."""
    given = given | (given.get("input") or {})
    if name == "Viewer":
        return {"viewer": {"id": "u", "entity": "team", "username": "someone", "flags": "{}", "teams": {"edges": []}}}
    if name == "ArtifactType":
        return {"project": None}
    if name == "UpsertBucket":
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "team"}}
        run = {"id": "r", "name": given["name"], "displayName": given.get("displayName"), "project": project}
        return {"upsertBucket": {"bucket": run, "inserted": True}}
    if name == "CreateArtifact":
        key = (given["artifactCollectionName"], given["digest"])
        version = VERSIONS.setdefault(key, base64.b64encode(f"Artifact:{len(VERSIONS)}".encode()).decode())
        state = "COMMITTED" if version in COMMITTED else "PENDING"
        return {"createArtifact": {"artifact": {"id": version, "state": state, "artifactSequence": {"id": "s"}}}}
    if name == "CreateArtifactManifest":
        file = {"id": "f", "name": given["name"], "uploadUrl": f"{address}/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
    if name == "CreateArtifactFiles":
        nodes = [
            {
                "id": "f",
                "name": item["name"],
                "uploadUrl": f"{address}/artifact/{item['artifactID']}/{item['name']}",
                "uploadHeaders": [],
                "artifact": {"id": item["artifactID"]},
            }
            for item in given["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
    if name in ("CommitArtifact", "UseArtifact"):
        COMMITTED.add(given["artifactID"])
        return {f"{name[0].lower()}{name[1:]}": {"artifact": {"id": given["artifactID"], "digest": ""}}}
    if name == "CreateRunFiles":
        files = [{"name": file, "uploadUrl": f"{address}/run/{given['run']}/{file}"} for file in given["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    return {}


class Handler(BaseHTTPRequestHandler):
    """Answers GraphQL; takes everything else as it comes."""

    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said: dict[str, Any] = {"method": self.command, "path": self.path, "size": len(body)}
        reply: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            said |= {"operation": found[1] if found else "", "variables": asked.get("variables") or {}}
            with LOCK:
                reply = {"data": answer(said["operation"], said["variables"], ADDRESS)}
        elif self.command == "POST":
            said["json"] = json.loads(body)
        with LOCK, Path(sys.argv[1]).open("a", encoding="utf-8") as log:
            log.write(json.dumps(said) + "\n")
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ADDRESS = f"http://127.0.0.1:{server.server_port}"
    print(server.server_port, flush=True)
    server.serve_forever()
