"""An API over HTTP that does everything wrong: each is handled as documented, nothing is lost, nothing is paid twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from spolia.errors import SpoliaError
from spolia.parts.api import Api, Budget, Contract, Policy
from spolia.parts.api_http import Auth, Session, _seconds
from spolia.parts.api_v2 import LENGTH, packed, unpacked

pytest.importorskip("httpx")
CONTRACT = Contract(("a", "b"), (3,), "logits", most=8)
QUICK = Policy(timeout=0.5, backoff=0.01, longest=0.05, rest=0.05, patience=20.0, concurrency=2)


class Hostile:
    """A server of one model, `m`: logits are twice the first two inputs. `script` says what it does with the next questions."""

    def __init__(self, port: int = 0):
        self.script: list[str] = []
        self.contract, self.token, self.extensions = CONTRACT, "", ["binary_tensor_data"]
        self.served: Counter[bytes] = Counter()  # items answered in full, by their bytes
        self.kinds: Counter[str] = Counter()
        self.gate = threading.Event()  # what `hold` waits for
        self.held = threading.Event()  # told when it waits
        self.lock, self.down = threading.Lock(), False
        self.handler = type("Handler", (_Handler,), {"host": self})
        self.open(port)

    def open(self, port: int) -> None:
        self.down = False
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self.handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def unplug(self) -> None:
        self.down = True  # for connections that stand
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def close(self) -> None:
        self.gate.set()
        self.unplug()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host: Hostile

    def do_GET(self) -> None:
        if self.host.down:
            self.close_connection = True
        elif self.path == "/v2":
            self.reply(200, json.dumps({"name": "hostile", "extensions": self.host.extensions}).encode())
        elif self.path == "/v2/models/m":
            self.reply(
                200, json.dumps({"name": "m", "parameters": {"contract": self.host.contract.to_dict()}}).encode()
            )
        else:
            self.reply(404, b'{"error": "no such model"}')

    def do_POST(self) -> None:
        host = self.host
        body = self.rfile.read(int(self.headers["content-length"]))
        if host.down:
            self.close_connection = True
            return
        if host.token and self.headers.get("authorization") != f"Bearer {host.token}":
            self.reply(401, b'{"error": "who are you"}')
            return
        with host.lock:
            act = host.script.pop(0) if host.script else "ok"
            host.kinds[act] += 1
        _, tensors = unpacked(body, self.headers.get(LENGTH), "inputs")
        x = tensors["input"].reshape(-1, 3)
        if act == "hold":
            host.held.set()
            host.gate.wait(30)
            self.close_connection = True
            return
        if act in ("429", "500", "503", "404", "418", "302"):
            headers = (
                {"retry-after": "0.1"} if act == "429" else {"location": "http://elsewhere/"} if act == "302" else {}
            )
            self.reply(int(act), b'{"error": "not now"}', headers)
            return
        if act == "hang":
            time.sleep(1.0)
            self.close_connection = True
            return
        if act == "drop":
            self.close_connection = True
            return
        logits = x[:, :2] * 2
        logits = {"nan": logits * np.nan, "wide": x * 2, "short": logits[:-1]}.get(act, logits)
        answer, length = packed({"model_name": "m"}, "outputs", {"logits": logits}, binary=LENGTH in self.headers)
        answer = {"garbage": b"<html>502</html>", "empty": b"", "error": b'{"error": "out of memory"}'}.get(act, answer)
        headers = {LENGTH: str(length)} if LENGTH in self.headers and act not in ("garbage", "empty", "error") else {}
        if act == "lies":
            headers = {LENGTH: "7"}
        if act == "ok":
            with host.lock:
                host.served.update(row.tobytes() for row in x)
        self.reply(200, answer, headers, act)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, act: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body) + (500 if act == "cut" else 0)))
        self.end_headers()
        if act == "trickle":
            for place in range(len(body)):
                self.wfile.write(body[place : place + 1])
                self.wfile.flush()
                time.sleep(0.02)
            return
        self.wfile.write(body)
        if act == "cut":
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    yield server
    server.close()


def ask(server: Hostile, count: int = 20, **more) -> tuple[Api, torch.Tensor]:
    """Twenty questions in three lots, and whether their answers are right."""
    api = Api.at(server.url, "m", **({"policy": QUICK} | more))
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(count))
    torch.testing.assert_close(
        api(x).log_p, (2 * x[:, :2]).double().log_softmax(1), rtol=1e-6, atol=1e-6
    )  # sent as fp32
    return api, x


PASSING = [
    "429",
    "500",
    "503",
    "hang",
    "drop",
    "cut",
    "garbage",
    "empty",
    "error",
    "nan",
    "wide",
    "short",
    "lies",
    "trickle",
]


@pytest.mark.parametrize("act", PASSING)
@pytest.mark.sampled(3)
def test_what_goes_wrong_is_asked_again(hostile: Hostile, act: str) -> None:
    hostile.script = ["ok", act]
    api, _ = ask(hostile)
    assert hostile.kinds[act] == 1
    assert sum(hostile.served.values()) == 20 and max(hostile.served.values()) == 1
    assert api.spent.answered == 20 and api.spent.failed == 1
    free = act in ("429", "500", "503")  # surely not served: given back
    assert api.spent.items == (20 if free else 28 if api.spent.items == 28 else 24)


def test_all_of_it_at_once_loses_nothing(hostile: Hostile) -> None:
    hostile.script = ["429", "drop", "ok", "nan", "503", "cut", "garbage", "ok", "error", "500"]
    api, _ = ask(hostile, 40, policy=replace(QUICK, attempts=8, timeout=20.0))  # nothing here is waited for
    assert sum(hostile.served.values()) == 40 and max(hostile.served.values()) == 1
    assert api.spent.failed == 8


@pytest.mark.parametrize(
    ("act", "word"),
    [
        ("nan", "NaN"),
        ("wide", r"\[8, 3\] where \[8, 2\]"),
        ("error", "out of memory"),
        ("garbage", "502"),
        ("lies", "protocol"),
    ],
)
def test_what_stays_wrong_is_shown(hostile: Hostile, act: str, word: str) -> None:
    hostile.script = [act] * 9
    with pytest.raises(SpoliaError, match=word):
        ask(hostile)


@pytest.mark.parametrize(("act", "word"), [("404", "status 404"), ("418", "not now"), ("302", "moved")])
def test_a_refusal_is_an_error_at_once(hostile: Hostile, act: str, word: str) -> None:
    hostile.script = [act] * 9
    with pytest.raises(SpoliaError, match=word):
        ask(hostile, 4)
    assert hostile.kinds[act] == 1


def test_a_missing_model_and_a_missing_server_are_told(hostile: Hostile) -> None:
    with pytest.raises(SpoliaError, match="no such model"):
        Api.at(hostile.url, "other", policy=QUICK).classes  # noqa: B018
    quick = Policy(timeout=0.2, backoff=0.01, longest=0.02, rest=0.02, patience=0.2)
    with pytest.raises(SpoliaError, match="no connection"):
        Api.at("http://127.0.0.1:9", "m", policy=quick).classes  # noqa: B018 - nobody listens at discard


def test_classes_that_change_in_the_middle_are_noticed(hostile: Hostile) -> None:
    api, _ = ask(hostile)
    hostile.contract = Contract(("a", "b", "c"), (3,), "logits", most=8)
    hostile.script = ["wide"] * 9
    with pytest.raises(SpoliaError, match="is not what it was: classes"):
        api(torch.rand(3, 3, generator=torch.Generator().manual_seed(0)))


def test_json_is_spoken_where_binary_is_not(hostile: Hostile) -> None:
    hostile.extensions = []
    ask(hostile)
    assert hostile.kinds["ok"] == 3


def test_an_absent_server_delays_and_breaks_nothing(hostile: Hostile) -> None:
    api, _ = ask(hostile)
    port = hostile.port
    hostile.unplug()
    back = threading.Timer(1.0, lambda: hostile.open(port))
    back.start()
    start = time.monotonic()
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(api(x).labels, x[:, :2].argmax(1))
    assert time.monotonic() - start > 0.8
    back.join()
    assert max(hostile.served.values()) == 1
    assert 40 <= api.spent.items <= 40 + 2 * 8  # what two open connections had under way may have been counted there


@pytest.mark.slow
def test_unplugged_for_twenty_seconds(hostile: Hostile) -> None:
    ask(hostile)
    port = hostile.port
    hostile.unplug()
    back = threading.Timer(20.0, lambda: hostile.open(port))
    back.start()
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(5))
    patient = Policy(timeout=2.0)
    again = Api.at(hostile.url, "m", contract=CONTRACT, policy=patient)
    assert torch.equal(again(x).labels, x[:, :2].argmax(1))
    back.join()
    assert max(hostile.served.values()) == 1


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_the_token_goes_out_and_is_written_nowhere(hostile: Hostile, tmp_path: Path, monkeypatch) -> None:
    hostile.token = "xyzzy-17"
    monkeypatch.setenv("PETS_TOKEN", hostile.token)
    api, _ = ask(hostile, token="PETS_TOKEN", store=tmp_path / "a.sqlite")
    api.close()
    assert not [file for file in tmp_path.iterdir() if hostile.token.encode() in file.read_bytes()]
    assert hostile.token not in repr(api) + repr(api._client.endpoint) + repr(Auth("PETS_TOKEN"))
    hostile.script = ["418"]
    with pytest.raises(SpoliaError) as refused:
        ask(hostile, token="PETS_TOKEN")
    assert hostile.token not in str(refused.value)


def test_a_wrong_or_missing_token_is_told_by_its_variable(hostile: Hostile, monkeypatch) -> None:
    hostile.token = "right"
    monkeypatch.setenv("PETS_TOKEN", "wrong")
    with pytest.raises(SpoliaError, match="look at PETS_TOKEN"):
        ask(hostile, token="PETS_TOKEN")
    with pytest.raises(SpoliaError, match="name the environment variable"):
        ask(hostile)
    monkeypatch.delenv("PETS_TOKEN")
    with pytest.raises(SpoliaError, match="PETS_TOKEN: is not set"):
        ask(hostile, token="PETS_TOKEN")
    monkeypatch.setenv("PETS_TOKEN", "two\nlines")
    with pytest.raises(SpoliaError, match="no header can carry"):
        ask(hostile, token="PETS_TOKEN")


@pytest.mark.parametrize(
    "url", ["ftp://x", "localhost:80", "http://me:secret@host", "http://host?key=secret", "http://"]
)
def test_an_address_that_will_not_do_is_told_without_its_secret(url: str) -> None:
    with pytest.raises(SpoliaError) as told:
        Session(url)
    assert "secret" not in str(told.value)


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert _seconds("1.5") == 1.5
    assert 50 < _seconds(soon) <= 60
    assert (_seconds("-3"), _seconds("1e9"), _seconds("soon"), _seconds("nan"), _seconds("")) == (
        0,
        3600,
        None,
        None,
        None,
    )


# --- killed ----------------------------------------------------------------------------------------------------------

ASKING = """
import sys, torch
from spolia.parts.api import Api, Policy
api = Api.at(sys.argv[1], "m", store=sys.argv[2], policy=Policy(concurrency=1, timeout=30))
draws = torch.Generator().manual_seed(0)
found = []
for step in range(12):
    found.append(api(torch.rand(8, 3, generator=draws)).log_p)
print(torch.stack(found).sum().item(), api.spent.items)
"""


@pytest.mark.slow
def test_killed_and_run_again_it_pays_nothing_twice(hostile: Hostile, tmp_path: Path) -> None:
    """Killed while the server holds a question that it has not answered: the server's own count of all questions says so."""
    script = tmp_path / "ask.py"
    script.write_text(textwrap.dedent(ASKING))
    command = [sys.executable, str(script), hostile.url, str(tmp_path / "a.sqlite")]
    hostile.script = ["ok"] * 5 + ["hold"]
    child = subprocess.Popen(command)
    assert hostile.held.wait(60)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    hostile.gate.set()
    assert sum(hostile.served.values()) == 40
    first = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert sum(hostile.served.values()) == 96 and max(hostile.served.values()) == 1
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert sum(hostile.served.values()) == 96
    assert first == second  # from one store, the same bits
    assert int(first.split()[1]) == 96 + 8  # the question under way may have been counted by the other side


def test_budgets_hold_over_http_too(hostile: Hostile) -> None:
    hostile.script = ["nan", "ok", "cut"]
    api = Api.at(hostile.url, "m", policy=QUICK, budget=Budget(items=30))
    asked: list[Callable[[], object]] = [
        lambda s=s: api(torch.rand(9, 3, generator=torch.Generator().manual_seed(s))) for s in range(6)
    ]
    for one in asked:
        try:
            one()
        except SpoliaError:
            continue
    assert sum(hostile.served.values()) <= api.spent.items <= 30
