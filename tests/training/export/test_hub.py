"""Publishing, against a server on this machine that speaks the few addresses of the hub which the library asks."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data.files import write_json
from training.export.hub import PushError, check_push, check_repo_id, push_files
from training.loop.checkpoint import CheckpointRecord
from training.model.reference import ADAPTER_FILE, ModelRef

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Keeps what it was asked; `role` is what the token may do, `files` what has been committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.role, self.asked, self.files = "write", [], {}  # type: ignore[var-annotated]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self) -> None:
        body, path = self._body(), self.path.split("?")[0]
        self.server.asked.append((self.command, path, body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "me", "auth": {"accessToken": {"role": self.server.role}}})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._send(200, {"url": f"{self.server.url}/me/tuned", "name": "me/tuned", "id": "me/tuned"})
        if path == "/api/models/me/tuned/preupload/main":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._send(200, {"files": files})
        if path == "/api/models/me/tuned/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            commit = {"commitUrl": f"{self.server.url}/me/tuned/commit/{'a' * 40}", "commitOid": "a" * 40}
            return self._send(200, {**commit, "success": True})
        return self._send(404, {"error": f"not here: {self.command} {path}"})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A finished training's folder with all that trainings leave in it."""
    folder = tmp_path / "training"
    for name in ("adapter/" + ADAPTER_FILE, "kohya/lora.safetensors", "checkpoint-000002/weights.safetensors",
                 "checkpoint-000002/optimizer.pt", "metrics.jsonl", "adapter/.hidden.tmp"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    model = ModelRef("/home/me/base", adapter=str(folder / "adapter"))
    CheckpointRecord(
        model=model, method="lora", steps=6, pairs=12, beta=2000.0, kappa=1000.0, sha256="ab", metrics={"loss": 0.6}
    ).write(folder)
    sealed = {"dataset_id": "d", "config_hash": "c", "created_at": "now", "rows": 12, "shards": 1}
    write_json(folder / "card.json", {"plan": {"seed": 0}, "data": {"sealed": sealed}, "evaluation": None})
    return folder


def command(hub: Hub, training: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m training.hub` in a process of its own, with the network of this machine alone."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(training.parent / "home"), **environment}
    line = [sys.executable, "-m", "training.hub", str(training), "--repo", "me/tuned", *options]
    return subprocess.run(line, cwd=ROOT, env=known, capture_output=True, text=True, timeout=120)


def test_weights_and_card_arrive_in_one_commit(hub: Hub, training: Path) -> None:
    done = command(hub, training)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/tuned/commit/{'a' * 40}"
    assert set(hub.files) == {ADAPTER_FILE, "kohya/lora.safetensors", "README.md"}
    assert hub.files[ADAPTER_FILE] == ("adapter/" + ADAPTER_FILE).encode()
    card = hub.files["README.md"].decode()
    assert 'load_lora_weights("me/tuned"' in card and "/home/me" not in card
    created = [json.loads(body) for _, path, body in hub.asked if path == "/api/repos/create"]
    assert [(c["name"], c["organization"], c["visibility"]) for c in created] == [("tuned", "me", "private")]
    assert sum(path.endswith("/commit/main") for _, path, _ in hub.asked) == 1
    order = [path for _, path, _ in hub.asked]
    assert order.index("/api/whoami-v2") < order.index("/api/repos/create")


@pytest.mark.slow
def test_public_is_asked_for(hub: Hub, training: Path) -> None:
    assert command(hub, training, "--public").returncode == 0
    created = [json.loads(body) for _, path, body in hub.asked if path == "/api/repos/create"]
    assert created[0].get("visibility") in ("public", None) and created[0].get("private") in (False, None)


def test_a_refused_or_reading_token_stops_before_anything_is_made(hub: Hub, training: Path) -> None:
    refused = command(hub, training, HF_TOKEN="hf_wrong")
    assert refused.returncode == 2 and "refuses the token" in refused.stderr and "hf_wrong" not in refused.stderr
    hub.role = "read"
    reading = command(hub, training)
    assert reading.returncode == 2 and "may only read" in reading.stderr
    assert {path for _, path, _ in hub.asked} == {"/api/whoami-v2"} and not hub.files


def test_a_hub_that_does_not_answer_is_told(hub: Hub, training: Path) -> None:
    silent = command(hub, training, HF_ENDPOINT="http://127.0.0.1:9")
    assert silent.returncode == 2 and "does not answer" in silent.stderr and "publish later" in silent.stderr
    assert "Traceback" not in silent.stderr


def test_no_token_and_no_weights_are_told_without_the_network(hub: Hub, training: Path) -> None:
    without = command(hub, training, HF_TOKEN="")
    assert without.returncode == 2 and "no token; run `hf auth login`" in without.stderr
    (training / "adapter" / ADAPTER_FILE).unlink()
    without = command(hub, training)
    assert without.returncode == 2 and "holds no trained weights" in without.stderr
    assert not hub.asked


@pytest.mark.parametrize(
    "repo_id, message",
    [
        ("tuned", "owner/name"), ("me/my/tuned", "namespace/repo_name"), ("me/tu ned", "alphanumeric"),
        ("me/tu--ned", "--"), ("", "alphanumeric"), ("me/-tuned", "alphanumeric"),
    ],
)  # fmt: skip
def test_a_malformed_repository_is_refused(repo_id: str, message: str) -> None:
    with pytest.raises(PushError, match=f"push to {repo_id!r}.*{message}"):
        check_push(repo_id)


def test_offline_is_refused_and_a_good_name_is_not() -> None:
    check_repo_id("me/tuned-v1.0_x")
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):  # as in all tests
        check_push("me/tuned")


def test_only_weights_and_their_config_go_out(training: Path) -> None:
    assert set(push_files(training)) == {ADAPTER_FILE, "kohya/lora.safetensors"}
    for name in ("config.json", "diffusion_pytorch_model-00001-of-00002.safetensors",
                 "diffusion_pytorch_model.safetensors.index.json", "notes.txt"):  # fmt: skip
        (training / "unet").mkdir(exist_ok=True)
        (training / "unet" / name).write_text("")
    (training / "adapter" / ADAPTER_FILE).unlink()
    record = json.loads((training / "checkpoint.json").read_text())
    model = {"base": "/home/me/base", "network": "/moved/since/unet"}
    write_json(training / "checkpoint.json", record | {"method": "full", "model": model})
    names = {"config.json", "diffusion_pytorch_model-00001-of-00002.safetensors",
             "diffusion_pytorch_model.safetensors.index.json"}  # fmt: skip
    assert set(push_files(training)) - {"kohya/lora.safetensors"} == {f"unet/{name}" for name in names}
    (training / "unet").rename(training / "elsewhere")
    with pytest.raises(PushError, match="holds no trained weights"):
        push_files(training)
