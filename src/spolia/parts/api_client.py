"""How an API is asked: what is kept is not asked for, the rest in lots, several at a time, again after what passes.

    ask(items) -> rows      every answer is kept as soon as its lot has come; an error or a kill loses none of them

| what happens | what is done |
|---|---|
| no connection, time-out, 429, 5xx | waited for, longer each time, as the other side says where it says; up to `patience` |
| cut short, garbage, NaN, wrong widths, an error under 200 | asked again, `attempts` times, then an error that shows it |
| many failures one after the other | the breaker: nobody asks for a while, then one does; the others wait for how that ends |
| too large (413) | lots of half the size from then on |
| refused (401, 404 …) | an error at once |
| other classes than at first, other answers | an error: what was learned from the first would no longer fit |
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from spolia.core.lazy import np
from spolia.errors import SpoliaError
from spolia.parts.api_answers import Contract, Misfit, rows_of
from spolia.parts.api_breaker import Breaker
from spolia.parts.api_budget import Budget, Price, Spent, beyond, room
from spolia.parts.api_store import Store, keys_of, spent_error

_DRIFT = 1e-3  # of an answer, besides its resolution: rounding elsewhere stays below, other weights do not


class Passing(Exception):
    """A failure that may pass. `wait`: seconds that the other side asks for; `served`: it may have counted the request."""

    def __init__(self, what: str, wait: float | None = None, *, served: bool = False):
        super().__init__(what)
        self.wait, self.served = wait, served


class TooLarge(Exception):
    """The other side takes smaller requests."""


@dataclass(frozen=True)
class Endpoint:
    """Where an API stands. `identity` names it in stores and holds no secret.

    `ask(batch [n, ...])` sends one request: arrays by name, or Passing, Misfit, TooLarge, SpoliaError. `look()` says what it
    promises now; it costs nothing.
    """

    identity: str
    ask: Callable[[np.ndarray], dict[str, np.ndarray]]
    look: Callable[[], Contract]
    close: Callable[[], None]


@dataclass(frozen=True)
class Policy:
    """Times in seconds. `canary`: calls between two looks whether a first question still has its first answer."""

    concurrency: int = 4
    attempts: int = 3
    timeout: float = 30.0
    patience: float = 300.0
    backoff: float = 0.25
    longest: float = 20.0
    failures: int = 5
    rest: float = 2.0
    canary: int | None = None
    body: int = 64_000_000  # bytes of an answer that are read
    jitter: Callable[[], float] = field(default=random.Random().random, repr=False)  # times need not be the same again


class Client:
    """One endpoint's questions. Safe for several threads."""

    def __init__(self, endpoint: Endpoint, name: str, store: Store, budget: Budget, price: Price, policy: Policy):
        self.endpoint, self.name, self.store = endpoint, name, store
        self.budget, self.price, self.policy = budget, price, policy
        self.breaker = Breaker(policy.failures, policy.rest)
        self._contract: Contract | None = None
        self._most: int | None = None  # inputs of a request, once 413 has taught it
        self._look = threading.Lock()
        self._calls = 0  # since the last canary

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def contract(self) -> Contract:
        with self._look:
            if self._contract is None:
                self._contract = self._patiently(self._looked, threading.Event())
            return self._contract

    @property
    def spent(self) -> Spent:
        return self.store.spent(self.name, self.price)

    @property
    def left(self) -> int | None:
        spent, lot = self.spent, 1 if self._contract is None else self._contract.most
        return room(self.budget, self.price, spent.calls, spent.items, lot)

    def close(self) -> None:
        self.endpoint.close()
        self.store.close()

    def _looked(self) -> Contract:
        """What the endpoint promises, as it did at first. SpoliaError where that has changed."""
        now = self.endpoint.look()
        kept = self.store.fact(self.name, "contract", json.dumps(now.to_dict()))
        then = Contract.of(json.loads(kept or "{}"))
        if then != now:
            names = [n for n in then.to_dict() if getattr(then, n) != getattr(now, n) and n != "most"]
            told = "; ".join(f"{n}: then {_short(getattr(then, n))}, now {_short(getattr(now, n))}" for n in names)
            if names:
                mend = "ask the endpoint of before, or begin anew with another store"
                raise SpoliaError(f"is not what it was: {told}", where=self.name, mend=mend)
        return now

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, items: np.ndarray) -> np.ndarray:
        """Rows [n, width] of items [n, ...]. BudgetSpent before anything is sent, where not all can be paid."""
        contract = self.contract
        keys = keys_of(self.endpoint.identity, items) if self.store.keeps else _places(len(items))
        found = self.store.find(list(dict.fromkeys(keys)))
        wanted: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in found:
                wanted.setdefault(key, place)
        if len(wanted) < len(items):
            self.store.reused(self.name, len(items) - len(wanted))
        for part, rows in self._sent(items, list(wanted.items()), contract):
            found.update((key, row.tobytes()) for key, row in zip(part, rows, strict=True))
        self._watch(items[:1], contract)
        joined = b"".join([found[key] for key in keys])
        return np.frombuffer(joined, np.float32).reshape(len(items), contract.width)

    def _sent(
        self, items: np.ndarray, wanted: list[tuple[bytes, int]], contract: Contract
    ) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Keys and rows of every lot, in the order of the lots."""
        most = min(contract.most, self._most or contract.most)
        lots = [wanted[start : start + most] for start in range(0, len(wanted), most)]
        if not lots:
            return
        spent = self.spent
        if bound := beyond(self.budget, self.price, spent.calls + len(lots), spent.items + len(wanted)):
            raise spent_error(self.name, bound, len(wanted))
        stop = threading.Event()

        def send(lot: list[tuple[bytes, int]]) -> tuple[list[bytes], np.ndarray]:
            keys, places = [key for key, _ in lot], [place for _, place in lot]
            return keys, self._lot(keys, items[places], contract, stop)

        if len(lots) == 1 or self.policy.concurrency == 1:
            yield from map(send, lots)
            return
        with ThreadPoolExecutor(min(self.policy.concurrency, len(lots))) as threads:
            try:
                yield from threads.map(send, lots)
            except BaseException:
                stop.set()  # those on their way finish and are kept; those that wait give up
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _lot(self, keys: list[bytes], batch: np.ndarray, contract: Contract, stop: threading.Event) -> np.ndarray:
        """One lot's rows, however often it takes."""
        try:
            return self._patiently(lambda: self._once(keys, batch, contract), stop)
        except TooLarge:
            half = len(batch) // 2
            if not half:
                raise SpoliaError("takes no request of one input: too large, it says", where=self.name) from None
            self._most = half
            parts = ((keys[:half], batch[:half]), (keys[half:], batch[half:]))
            return np.concatenate([self._lot(*part, contract, stop) for part in parts])

    def _once(self, keys: list[bytes], batch: np.ndarray, contract: Contract) -> np.ndarray:
        """One request: counted before it leaves, kept when its answer has come and been checked."""
        self.store.reserve(self.name, len(batch), self.budget, self.price)
        try:
            rows = rows_of(self.endpoint.ask(batch), contract, len(batch))
        except Passing as failure:
            self.store.settle(self.name, back=0 if failure.served else len(batch), failed=1)
            raise
        except (TooLarge, SpoliaError):
            self.store.settle(self.name, back=len(batch), failed=1)
            raise
        except BaseException:  # a misfit, or a function's own error: it was served
            self.store.settle(self.name, failed=1)
            raise
        self.store.settle(self.name, keys, rows)
        return rows

    def _patiently(self, action: Callable[[], Any], stop: threading.Event) -> Any:
        """`action`, again while it fails in passing."""
        start, tries, misfits = time.monotonic(), 0, 0
        while True:
            first = self.breaker.enter(stop)
            try:
                if first and self._contract is not None:
                    self._looked()  # after an absence: whether it is still the same
                made = action()
            except Passing as failure:
                tries += 1
                wait = self._wait(failure, tries)
                self.breaker.failed(failure.wait)
                if time.monotonic() - start + wait > self.policy.patience:
                    what = f"did not answer for {time.monotonic() - start:.0f} s: {failure}"
                    mend = "run the same command again when it does: what was answered is kept"
                    raise SpoliaError(what, where=self.name, mend=mend) from None
                if stop.wait(wait):
                    raise SpoliaError(f"stopped while it waited: {failure}", where=self.name) from None
            except Misfit as misfit:
                self.breaker.failed(None)
                misfits += 1
                if misfits >= self.policy.attempts:
                    self._changed()
                    mend = "compare what it promises with what it answers; `contract` says what is expected"
                    raise SpoliaError(f"answers what does not fit: {misfit}", where=self.name, mend=mend) from None
            except BaseException:
                self.breaker.succeeded()  # it is there, whatever it says
                raise
            else:
                self.breaker.succeeded()
                return made

    def _changed(self) -> None:
        """SpoliaError where its promise has changed: that says more than an answer that does not fit."""
        try:
            self._looked()
        except (Passing, Misfit):
            return

    def _wait(self, failure: Passing, tries: int) -> float:
        """Seconds before the next try: doubled each time, between half and the whole of it, or what is asked for."""
        own = min(self.policy.longest, self.policy.backoff * 2 ** min(tries - 1, 30))
        own *= 0.5 + 0.5 * self.policy.jitter()
        return max(own, failure.wait or 0.0)

    # --- drift -------------------------------------------------------------------------------------------------------

    def _watch(self, item: np.ndarray, contract: Contract) -> None:
        """Note the first question and its answer; every `canary` calls, ask it again."""
        if self.policy.canary is None:
            return
        self._calls += 1
        kept = self.store.fact(self.name, "canary")
        if kept is None:
            row = self._lot([], item, contract, threading.Event())
            self.store.fact(self.name, "canary", json.dumps({"item": item.tolist(), "row": row.tolist()}))
        elif self._calls >= self.policy.canary:
            self._calls, first = 0, json.loads(kept)
            again = self._lot([], np.asarray(first["item"], np.float32), contract, threading.Event())
            then = np.asarray(first["row"], np.float32)
            apart = float(np.abs(again - then).max())
            slack = _DRIFT * max(1.0, float(np.abs(then).max())) + 2 * contract.resolution
            if apart > slack:
                what = (
                    f"answers a first question otherwise than at first: by {apart:.3g}, where {slack:.3g} is rounding"
                )
                mend = "its model has changed: begin anew with another store"
                raise SpoliaError(what, where=self.name, mend=mend)


def _places(count: int) -> list[bytes]:
    """Keys that are all different, where nothing is kept."""
    return [place.to_bytes(8, "little") for place in range(count)]


def _short(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 100 else text[:100] + " …"
