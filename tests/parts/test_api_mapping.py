"""JSON of other APIs: templates, paths, scores by name, and what leads nowhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spolia.errors import SpoliaError
from spolia.parts.api_answers import Contract, Misfit, rows_of
from spolia.parts.api_http import Reply
from spolia.parts.api_mapping import JsonEndpoint, Mapping, found

pytest.importorskip("httpx")
TWO = Contract(("cat", "dog"), (2,), most=8)
X = np.array([[0.0, 1.0], [0.5, 0.25]], np.float32)


class Told:
    """A session that answers what it is told and keeps what it was asked."""

    url = "http://example.org"

    def __init__(self, answer: object):
        self.answer, self.asked = answer, []

    def post(self, path: str, body: bytes, headers: object) -> Reply:
        self.asked.append(json.loads(body))
        return Reply({}, json.dumps(self.answer).encode())

    def close(self) -> None: ...


def asked(answer: object, mapping: Mapping, contract: Contract = TWO, x: np.ndarray = X) -> tuple[np.ndarray, list]:
    session = Told(answer)
    endpoint = JsonEndpoint(session, "classify", mapping, contract)  # type: ignore[arg-type]
    return rows_of(endpoint.ask(x), endpoint.look(), len(x)), session.asked


def test_rows_of_scores_below_a_path() -> None:
    mapping = Mapping({"instances": "$inputs", "k": 2}, {"probabilities": "predictions.*.scores"})
    answer = {"predictions": [{"scores": [0.25, 0.75]}, {"scores": [1, 0]}]}
    rows, sent = asked(answer, mapping)
    assert rows.tolist() == [[0.25, 0.75], [1, 0]]
    assert sent == [{"instances": X.tolist(), "k": 2}]


def test_scores_by_name_come_in_the_order_of_the_classes() -> None:
    by_name = [{"dog": 0.9, "cat": 0.1}, {"cat": 1.0}]
    np.testing.assert_allclose(
        asked(by_name, Mapping("$inputs", {"probabilities": ""}))[0], [[0.1, 0.9], [1, 0]], rtol=1e-6
    )
    pairs = [[{"label": "dog", "score": 0.9}, {"label": "cat", "score": 0.1}], [{"label": "cat", "score": 1}]]
    mapping = Mapping({"inputs": "$inputs"}, {"probabilities": ""}, pair=("label", "score"))
    np.testing.assert_allclose(asked(pairs, mapping)[0], [[0.1, 0.9], [1, 0]], rtol=1e-6)


def test_one_input_a_request() -> None:
    mapping = Mapping({"image": "$input"}, {"probabilities": "result.0.p"})
    session = Told({"result": [{"p": [0.5, 0.5]}]})
    endpoint = JsonEndpoint(session, "", mapping, TWO)  # type: ignore[arg-type]
    assert endpoint.look().most == 1
    assert rows_of(endpoint.ask(X[:1]), endpoint.look(), 1).tolist() == [[0.5, 0.5]]
    assert session.asked == [{"image": [0.0, 1.0]}]


def test_labels_by_name_or_number() -> None:
    label = Contract(("cat", "dog"), (2,), "label")
    assert asked(["dog", "cat"], Mapping("$inputs", {"label": ""}), label)[0].tolist() == [[1], [0]]
    assert asked({"y": [1, 0]}, Mapping("$inputs", {"label": "y"}), label)[0].tolist() == [[1], [0]]


def test_top_answers_have_two_paths() -> None:
    top = Contract(("cat", "dog", "cow"), (2,), "top", top=2)
    mapping = Mapping("$inputs", {"values": "*.scores", "classes": "*.names"})
    answer = [{"scores": [0.7, 0.2], "names": ["cow", "cat"]}, {"scores": [0.9, 0.1], "names": ["dog", "cow"]}]
    np.testing.assert_allclose(asked(answer, mapping, top)[0], [[0.7, 0.2, 2, 0], [0.9, 0.1, 1, 2]], rtol=1e-6)


def test_images_may_be_sent_flat() -> None:
    contract = Contract(("cat", "dog"), (1, 1, 2))
    mapping = Mapping({"x": "$inputs"}, {"probabilities": "p"}, flat=True)
    _, sent = asked({"p": [[0, 1], [1, 0]]}, mapping, contract, X.reshape(2, 1, 1, 2))
    assert sent == [{"x": X.tolist()}]


@pytest.mark.parametrize(
    "answer",
    [
        {"predictions": []},
        {"predictions": [[0.5, 0.5]]},
        {"predictions": "none"},
        {"result": []},
        {"predictions": [[0.5], [0.5, 0.5]]},
        {"predictions": [{"cow": 1}, {"cat": 1}]},
        {"predictions": [None, None]},
        {"error": "model is loading"},
        [],
        7,
    ],
)
def test_what_does_not_fit_is_a_misfit(answer: object) -> None:
    with pytest.raises(Misfit):
        asked(answer, Mapping("$inputs", {"probabilities": "predictions"}))


def test_paths_go_down_by_names_numbers_and_lists() -> None:
    value = {"a": [{"b": [1, 2]}, {"b": [3, 4]}]}
    assert found(value, "a.*.b.-1") == [2, 4]
    assert found(value, "a.1.b") == [3, 4]
    assert found(value, "") is value
    for path in ("c", "a.2", "a.b", "*"):
        with pytest.raises(Misfit, match="`"):
            found(value, path)


@pytest.mark.parametrize(
    "mapping",
    [
        Mapping({"x": 1}, {"probabilities": ""}),
        Mapping({"x": "$input", "y": "$inputs"}, {"probabilities": ""}),
        Mapping("$inputs", {"label": ""}),
    ],
)
def test_a_mapping_that_cannot_work_is_told_before_it_is_used(mapping: Mapping) -> None:
    with pytest.raises(SpoliaError, match="mapping"):
        JsonEndpoint(Told([]), "", mapping, TWO)  # type: ignore[arg-type]
