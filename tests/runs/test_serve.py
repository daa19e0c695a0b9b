"""Experts served by uvicorn and asked over loopback: the same answers, limits, tokens, errors that say what is wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from spolia.errors import SpoliaError  # noqa: E402
from spolia.parts.api import Api, Contract  # noqa: E402
from spolia.parts.api_v2 import LENGTH, packed, unpacked  # noqa: E402
from spolia.runs.serve import _listening, application, served  # noqa: E402
from spolia.runs.serve_experts import open_expert  # noqa: E402
from spolia.runs.serve_requests import Served, answering  # noqa: E402

THREE = ("a", "b", "c")
WEIGHT = torch.tensor([[1.0, -2, 0], [0, 1, 3], [2, 2, -1], [0.5, 0, 0]])


def logits(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1) @ WEIGHT


def contract(**more) -> Contract:
    return Contract(THREE, (2, 2), **({"answers": "logits", "most": 8} | more))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("secret of the house")

    kinds = {"probabilities": {}, "logits": {}, "label": {}, "top": {"top": 2}}
    experts = [Served(kind, logits, contract(answers=kind, **more)) for kind, more in kinds.items()]
    experts += [
        Served("rounded", logits, contract(answers="probabilities", resolution=0.01)),
        Served("fails", fails, contract()),
    ]
    with served(application(experts)) as address:
        yield address


@pytest.mark.parametrize("kind", ["probabilities", "logits", "label", "top", "rounded"])
def test_an_answer_over_http_is_the_experts_own(url: str, kind: str) -> None:
    x = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0))
    far = Api.at(url, kind)
    near = Api.calling(lambda b: answering(logits(b), far.contract), far.contract, name=kind)
    found, wanted = far(x), near(x)
    assert torch.equal(found.labels, wanted.labels) and torch.equal(found.log_p, wanted.log_p)  # the same bits
    assert torch.equal(found.labels, logits(x).argmax(1))
    assert far.spent.calls == 3 and far.spent.items == 20
    far.close()


def test_rounded_answers_are_rounded(url: str) -> None:
    api = Api.at(url, "rounded")
    assert api.contract.resolution == 0.01
    rows = api._client.ask(np.random.default_rng(0).random((9, 2, 2), dtype=np.float32))
    np.testing.assert_allclose(rows * 100, (rows * 100).round(), atol=1e-4)  # fp32
    api.close()


def test_the_servers_own_count_is_that_of_the_meter(url: str) -> None:
    def count() -> dict:
        return httpx.get(f"{url}/v2/models/logits/stats").json()["model_stats"][0]

    before, api = count(), Api.at(url, "logits")
    api(torch.rand(11, 2, 2))
    after = count()
    assert after["inference_count"] - before["inference_count"] == api.spent.items == 11
    assert after["execution_count"] - before["execution_count"] == api.spent.calls == 2
    api.close()


def infer(url: str, name: str = "logits", **tensors) -> httpx.Response:
    body, _ = packed({}, "inputs", tensors, binary=False)
    return httpx.post(f"{url}/v2/models/{name}/infer", content=body)


def test_paths_and_metadata_are_the_protocols(url: str) -> None:
    assert httpx.get(f"{url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{url}/v2/health/ready").json() == {"ready": True}
    assert "binary_tensor_data" in httpx.get(f"{url}/v2").json()["extensions"]
    assert httpx.get(f"{url}/v2/models/top/ready").json()["ready"]
    told = httpx.get(f"{url}/v2/models/top/versions/1").json()
    assert told["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 2, 2]}]
    assert [o["name"] for o in told["outputs"]] == ["values", "classes"]
    answer = infer(url, input=np.ones((1, 2, 2), np.float32)).json()
    assert answer["model_name"] == "logits"
    assert answer["outputs"][0]["data"] == logits(torch.ones(1, 2, 2))[0].tolist()


@pytest.mark.parametrize(
    ("tensors", "status", "word"),
    [
        ({}, 400, "one is taken"),
        ({"other": np.ones((1, 2, 2))}, 400, "one is taken"),
        ({"input": np.ones((1, 3))}, 400, "taken are numbers"),
        ({"input": np.ones((0, 2, 2))}, 400, "from 1 to 8"),
        ({"input": np.ones((9, 2, 2))}, 413, "from 1 to 8"),
        ({"input": np.full((1, 2, 2), np.nan)}, 400, "NaN"),
    ],
)
def test_what_does_not_fit_the_contract_is_told(url: str, tensors: dict, status: int, word: str) -> None:
    answer = infer(url, **tensors)
    assert answer.status_code == status
    assert word in answer.json()["error"] and answer.json()["code"]


@pytest.mark.parametrize(
    "body", [b"", b"\x80\x04\x95pickled", b"{}", b'{"inputs": 3}', b"[" * 100_000, b'{"inputs": [{}]}']
)
def test_what_is_no_message_is_told(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v2/models/logits/infer", content=body)
    assert answer.status_code == 400 and answer.json()["code"] == "message"


def test_errors_have_one_form(url: str) -> None:
    for method, path, status, code in [
        ("GET", "/v2/models/none", 404, "unknown_model"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v2/models/logits/infer", 405, "method"),
        ("DELETE", "/v2/models/logits", 405, "method"),
    ]:
        answer = httpx.request(method, url + path)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    broken = infer(url, "fails", input=np.ones((1, 2, 2)))
    assert broken.status_code == 500 and "secret" not in broken.text and "ZeroDivisionError" in broken.json()["error"]


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(url: str) -> None:
    answer = httpx.post(f"{url}/v2/models/logits/infer", content=b" " * 2_000_000)
    assert answer.status_code == 413 and answer.json()["code"] == "body"
    chunked = httpx.post(
        f"{url}/v2/models/logits/infer", content=(b" " * 100_000 for _ in range(20))
    )  # of no told length
    assert chunked.status_code == 413


def test_a_token_is_asked_for() -> None:
    app = application([Served("m", logits, contract())], token="s3cret")
    with served(app) as address:
        assert httpx.get(f"{address}/v2/health/live").status_code == 200
        for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"}):
            for path in ("/v2", "/v2/models/m", "/v2/models/none"):
                assert httpx.get(address + path, headers=headers).status_code == 401
        good = {"authorization": "Bearer s3cret"}
        assert httpx.get(f"{address}/v2/models/m", headers=good).status_code == 200


def test_binary_answers_come_only_where_they_are_wanted(url: str) -> None:
    x = np.ones((2, 2, 2), np.float32)
    wanted = {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    body, length = packed(wanted, "inputs", {"input": x}, binary=True)
    answer = httpx.post(f"{url}/v2/models/logits/infer", content=body, headers={LENGTH: str(length)})
    assert unpacked(answer.content, answer.headers[LENGTH], "outputs")[1]["logits"].shape == (2, 3)
    body, length = packed({}, "inputs", {"input": x}, binary=True)
    plain = httpx.post(f"{url}/v2/models/logits/infer", content=body, headers={LENGTH: str(length)})
    assert LENGTH not in plain.headers and json.loads(plain.content)["outputs"][0]["shape"] == [2, 3]


def test_names_that_no_path_can_name_are_refused() -> None:
    for names in (["a", "a"], ["a/b"], [" "]):
        with pytest.raises(SpoliaError, match="give NAME=PATH"):
            application([Served(name, logits, contract()) for name in names])


# --- what is served --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_expert_of_digits_is_trained_on_the_spot() -> None:
    pytest.importorskip("sklearn")
    expert = open_expert("pair=digits:01/conv", answers="label", most=7)
    assert expert.name == "pair" and expert.contract == Contract(("0", "1"), (1, 8, 8), "label", most=7)
    assert expert.logits(torch.rand(3, 1, 8, 8)).shape == (3, 2)
    again = open_expert("digits:01/conv")
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(again.logits(x), expert.logits(x))


@pytest.mark.parametrize("given", ["digits:0", "digits:00", "digits:ab", "digits:01/vit", "nowhere", "m=nowhere"])
def test_what_is_no_expert_is_told(given: str) -> None:
    with pytest.raises(SpoliaError):
        open_expert(given)


@pytest.mark.slow
def test_a_folder_of_transformers_is_served_as_it_answers(tmp_path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.ViTConfig(**sizes, intermediate_size=16, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    model = hf.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    expert = open_expert(f"pets={tmp_path}")
    assert expert.contract.classes == ("cat", "dog") and expert.contract.shape == (3, 8, 8)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(expert.logits(x), model((x - 0.5) / 0.25).logits)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SpoliaError, match=r"config\.json"):
        open_expert(str(tmp_path))


def test_an_answer_does_not_wait_for_its_headers_to_be_acknowledged() -> None:
    with _listening("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        taken, _ = listening.accept()
        with taken:
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
