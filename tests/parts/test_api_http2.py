"""HTTP/2: an API whose server offers it over TLS is asked over it, many requests on one connection."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spolia.parts import api_http
from spolia.parts.api import Api, Contract, Policy
from spolia.parts.api_v2 import LENGTH, packed, unpacked

pytest.importorskip("httpx")
pytest.importorskip("h2")
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

CONTRACT = Contract(("a", "b"), (3,), "logits", most=8)


class Server:
    """A model `m` over TLS that speaks HTTP/2 alone: logits are twice the first two inputs."""

    def __init__(self, folder: Path):
        files = [str(folder / name) for name in ("key.pem", "certificate.pem")]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here"]
        more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files[0], "-out", files[1]]
        subprocess.run([*command, *more], check=True, capture_output=True)
        self.certificate, self.asked, self.connections = files[1], list[str](), 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(files[1], files[0])
        self.context.set_alpn_protocols(["h2"])
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                plain, _ = self.listening.accept()
            except OSError:
                return  # closed: the test is over
            self.connections += 1
            threading.Thread(target=self.speak, args=(plain,), daemon=True).start()

    def speak(self, plain: socket.socket) -> None:
        with self.context.wrap_socket(plain, server_side=True) as stream:
            spoken, bodies, heads = H2Connection(H2Configuration(client_side=False)), {}, {}
            spoken.initiate_connection()
            stream.sendall(spoken.data_to_send())
            while data := stream.recv(65536):
                for event in spoken.receive_data(data):
                    if isinstance(event, RequestReceived):
                        heads[event.stream_id] = {k.decode(): v.decode() for k, v in event.headers}
                        bodies[event.stream_id] = b""
                    elif isinstance(event, DataReceived):
                        bodies[event.stream_id] += event.data
                        spoken.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, StreamEnded):
                        status, headers, body = self.answer(heads[event.stream_id], bodies[event.stream_id])
                        spoken.send_headers(event.stream_id, [(":status", status), *headers])
                        spoken.send_data(event.stream_id, body, end_stream=True)
                stream.sendall(spoken.data_to_send())

    def answer(self, head: dict[str, str], body: bytes) -> tuple[str, list[tuple[str, str]], bytes]:
        self.asked.append(head[":path"])
        if head[":path"] == "/v2":
            return "200", [], json.dumps({"name": "h", "extensions": ["binary_tensor_data"]}).encode()
        if head[":path"] == "/v2/models/m":
            return "200", [], json.dumps({"name": "m", "parameters": {"contract": CONTRACT.to_dict()}}).encode()
        _, tensors = unpacked(body, head[LENGTH.lower()], "inputs")
        made, length = packed({"model_name": "m"}, "outputs", {"logits": 2 * tensors["input"][:, :2]}, binary=True)
        return "200", [(LENGTH.lower(), str(length))], made


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    made = Server(tmp_path)
    monkeypatch.setattr(api_http, "_HERE", ())  # trust the environment's certificate, as of any other host
    monkeypatch.setenv("SSL_CERT_FILE", made.certificate)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.listening.close()


def test_http2_is_spoken_where_it_is_offered(server: Server) -> None:
    api = Api.at(server.url, "m", policy=Policy(patience=5.0, concurrency=4))
    x = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    expected = (2 * x[:, :2]).double().log_softmax(1)
    torch.testing.assert_close(api(x).log_p, expected, rtol=1e-6, atol=1e-6)  # sent as fp32
    assert api.spent.items == 60 and api.spent.calls == server.asked.count("/v2/models/m/infer") == 8
    assert server.connections == 1  # four at a time, over one
    api.close()
