"""Api: the right to query an expert, and nothing else. Its weights, gradients and architecture cannot be had from here.

    api = Api.calling(function, Contract(("cat", "dog"), shape=(3, 32, 32)), name="pets")
    api = Api.at("http://127.0.0.1:8080", "pets", budget=Budget(items=100_000), store="answers.sqlite")
    answers = api(images)                      # Answers: labels [n], log_p [n, classes]
    api.spent                                  # Spent(calls, items, …): also of earlier runs with the same store

Where it stands and how it is spoken to is an Endpoint's affair: a Python function (here), the Open Inference Protocol
(api_v2.py) or some other JSON over HTTP (api_mapping.py). What every question goes through is api_client.py: answers kept in a
store are not asked for again, the rest goes out in lots, within the budget, again after what passes, and is checked.

Python hides nothing from who looks into closures. What is kept here is the honest reader from a right he was not given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError
from spolia.parts.api_answers import Answers, Contract, answers_of
from spolia.parts.api_budget import Budget, BudgetSpent, Price, Spent
from spolia.parts.api_client import Client, Endpoint, Policy
from spolia.parts.api_store import Store

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answers", "Api", "Budget", "BudgetSpent", "Contract", "Endpoint", "Policy", "Price", "Spent"]


class Api:
    """A query-only expert. Inputs are tensors in the range `span`, whatever the endpoint's own range is."""

    __slots__ = ("_client", "name", "span")

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        budget: Budget | None = None,
        price: Price | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        policy: Policy | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ):
        if not span[0] < span[1]:
            raise SpoliaError(f"a range from {span[0]} to {span[1]}", where=f"{name}: span", mend="give (low, high)")
        held = store if isinstance(store, Store) else Store(store)
        self.name, self.span = name, span
        self._client = Client(endpoint, name, held, budget or Budget(), price or Price(), policy or Policy())

    @classmethod
    def calling(
        cls,
        function: Callable[[Tensor], Any],
        contract: Contract,
        *,
        name: str,
        identity: str = "",
        budget: Budget | None = None,
        price: Price | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> Api:
        """An API that is a function of a batch [n, ...] in this process: logits, probabilities or labels, as the contract says.

        `identity` is what its answers are kept under in a store: give what changes when the function does.
        """
        policy = Policy(concurrency=1, attempts=1)
        endpoint = _function(function, contract, identity or name)
        return cls(endpoint, name=name, budget=budget, price=price, store=store, policy=policy, span=span)

    @classmethod
    def at(
        cls,
        url: str,
        model: str,
        *,
        name: str = "",
        contract: Contract | None = None,
        token: str | None = None,
        budget: Budget | None = None,
        price: Price | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        policy: Policy | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> Api:
        """The model `model` of a server that speaks the Open Inference Protocol at `url`.

        `contract`: where the server does not tell its classes. `token`: the environment variable that holds the bearer token.
        """
        from spolia.parts.api_http import Auth, Session
        from spolia.parts.api_v2 import V2Endpoint

        policy = policy or Policy()
        session = Session(url, auth=None if token is None else Auth(token), timeout=policy.timeout, most=policy.body)
        endpoint = V2Endpoint(session, model, contract)
        given: dict[str, Any] = {"budget": budget, "price": price, "store": store, "policy": policy, "span": span}
        return cls(endpoint, name=name or model, **given)

    # --- asking ------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Answers:
        """What the expert says of x [n, ...]: detached, on x's device. BudgetSpent where that cannot be paid any more."""
        contract = self.contract
        if x.dim() < 1 or x[:1].numel() != contract.size * len(x[:1]):
            what = f"inputs {list(x.shape[1:])}; it takes {list(contract.shape)}"
            raise SpoliaError(what, where=self.name, mend="give inputs [n, …] of as many numbers each")
        items = np.ascontiguousarray(self._ranged(x.detach().cpu(), contract).numpy().reshape(len(x), *contract.shape))
        found = answers_of(self._client.ask(items), contract)
        return Answers(found.labels.to(x.device), found.log_p.to(x.device), found.hard)

    def _ranged(self, x: Tensor, contract: Contract) -> Tensor:
        """Inputs as fp32 in the endpoint's range. SpoliaError where one is no number."""
        (low, high), own = self.span, x.float()
        if not bool(torch.isfinite(own.sum())) and not bool(torch.isfinite(own).all()):  # the sum costs less
            raise SpoliaError("inputs that are not finite", where=self.name, mend="look at what makes them")
        if (low, high) != (contract.low, contract.high):
            shares = (x.double() - low) / (high - low)
            own = (contract.low + shares * (contract.high - contract.low)).float()
        own = own.clamp(contract.low, contract.high)
        return own.round() if contract.whole else own

    @property
    def contract(self) -> Contract:
        """What it is given and what it answers. An endpoint that tells it itself is asked once; that costs nothing."""
        return self._client.contract

    @property
    def classes(self) -> tuple[str, ...]:
        return self.contract.classes

    @property
    def spent(self) -> Spent:
        """Calls, items and money so far, earlier runs with the same store included."""
        return self._client.spent

    @property
    def left(self) -> int | None:
        """Items that may still be asked for; None where there is no bound."""
        return self._client.left

    def close(self) -> None:
        """Lets go of connections and of the store."""
        self._client.close()

    def __repr__(self) -> str:
        return f"Api({self.name!r})"

    def __reduce__(self) -> Any:
        raise SpoliaError(
            "an Api cannot be copied or pickled", where=self.name, mend="make another one where it is used"
        )


def _function(function: Callable[[Tensor], Any], contract: Contract, identity: str) -> Endpoint:
    """An endpoint that holds `function` out of sight."""

    def ask(batch: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            answer = function(torch.from_numpy(batch.copy()))
        parts = answer if isinstance(answer, dict) else {contract.answers: answer}
        return {name: torch.as_tensor(part).detach().cpu().numpy() for name, part in parts.items()}

    return Endpoint(f"function {identity}", ask, lambda: replace(contract), lambda: None)
