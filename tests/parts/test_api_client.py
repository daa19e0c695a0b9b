"""How an API is asked: retries, the breaker, budgets under threads and processes, kept answers, drift. No network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia.errors import SpoliaError
from spolia.parts.api_answers import Contract, Misfit
from spolia.parts.api_breaker import Breaker
from spolia.parts.api_budget import Budget, BudgetSpent, Price
from spolia.parts.api_client import Client, Endpoint, Passing, Policy, TooLarge
from spolia.parts.api_store import Store

CONTRACT = Contract(("a", "b"), (2,), "logits", most=4)
QUICK = Policy(backoff=0.001, longest=0.002, rest=0.01, patience=5.0)


class Fake:
    """An endpoint that keeps count and fails as it is told: `troubles` are raised one after the other."""

    def __init__(self, *troubles: Exception | None, contract: Contract = CONTRACT):
        self.troubles, self.contract = list(troubles), contract
        self.calls, self.items, self.asked = 0, 0, list[bytes]()
        self.lock = threading.Lock()

    def ask(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        with self.lock:
            self.calls += 1
            trouble = self.troubles.pop(0) if self.troubles else None
        if trouble is not None:
            raise trouble
        with self.lock:
            self.items += len(batch)
            self.asked += [row.tobytes() for row in batch]
        return {"logits": batch * 2}

    def look(self) -> Contract:
        return self.contract


def client(fake: Fake, path: Path | None = None, policy: Policy = QUICK, **budget) -> Client:
    endpoint = Endpoint("fake", fake.ask, fake.look, lambda: None)
    return Client(endpoint, "fake", Store(path), Budget(**budget), Price(item=0.5, call=1.0), policy)


def items(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 2), dtype=np.float32)


# --- what passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [Passing("gone"), Passing("slow", served=True), Misfit("NaN")])
def test_what_passes_is_asked_again_and_nothing_is_lost(trouble: Exception) -> None:
    fake = Fake(trouble, None, trouble)
    asking = client(fake)
    x = items(12)
    np.testing.assert_array_equal(asking.ask(x), x * 2)
    assert asking.spent.failed == 2 and asking.spent.answered == 12
    lost = 0 if isinstance(trouble, Passing) and not trouble.served else 8  # two lots of 4 may have been counted there
    assert asking.spent.items == 12 + lost


def test_what_does_not_fit_three_times_is_an_error_that_shows_it() -> None:
    fake = Fake(*[Misfit("[0.3, NaN]")] * 3)
    with pytest.raises(SpoliaError, match=r"does not fit: \[0.3, NaN\]"):
        client(fake).ask(items(2))
    assert fake.calls == 3


def test_patience_ends() -> None:
    fake = Fake(*[Passing("no connection")] * 1000)
    start = time.monotonic()
    with pytest.raises(SpoliaError, match="did not answer"):
        client(fake, policy=Policy(backoff=0.001, longest=0.002, rest=0.01, patience=0.1)).ask(items(2))
    assert time.monotonic() - start < 5  # far from its default of minutes
    assert 3 < fake.calls < 1000


def test_it_waits_as_long_as_it_is_told() -> None:
    fake, start = Fake(Passing("429", wait=0.3)), time.monotonic()
    client(fake).ask(items(2))
    assert time.monotonic() - start >= 0.3


def test_waits_grow_and_are_spread() -> None:
    shares = iter([0.0, 1.0, 0.5, 0.0])
    asking = client(Fake(), policy=Policy(backoff=1.0, longest=5.0, jitter=lambda: next(shares)))
    assert [asking._wait(Passing("x"), tries) for tries in (1, 2, 3, 9)] == [0.5, 2.0, 3.0, 2.5]


def test_an_error_of_the_expert_itself_is_raised_once() -> None:
    fake = Fake(ZeroDivisionError("its own"))
    with pytest.raises(ZeroDivisionError):
        client(fake).ask(items(2))
    assert fake.calls == 1


def test_too_large_lots_are_halved_and_stay_small() -> None:
    fake = Fake()
    sizes = []

    def ask(batch: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise TooLarge
        return fake.ask(batch)

    asking = Client(
        Endpoint("fake", ask, fake.look, lambda: None),
        "fake",
        Store(),
        Budget(items=12),
        Price(),
        Policy(concurrency=1),
    )
    x = items(6)
    np.testing.assert_array_equal(asking.ask(x), x * 2)
    assert sizes == [4, 2, 2, 2]
    np.testing.assert_array_equal(asking.ask(x), x * 2)
    assert sizes[4:] == [2, 2, 2]
    assert asking.spent.items == 12  # what was too large was not served


# --- the breaker -----------------------------------------------------------------------------------------------------


def test_after_many_failures_one_asks_and_the_others_wait() -> None:
    breaker, stop = Breaker(3, 0.05), threading.Event()
    for _ in range(3):
        assert not breaker.enter(stop)
        breaker.failed(None)
    assert breaker.open
    start = time.monotonic()
    firsts: list[bool] = []
    threads = [threading.Thread(target=lambda: firsts.append(breaker.enter(stop))) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert firsts == [True] and time.monotonic() - start >= 0.05
    breaker.succeeded()
    for thread in threads:
        thread.join(5)
    assert sorted(firsts) == [False, False, False, True]
    assert not breaker.open


def test_who_waits_at_the_breaker_can_be_stopped() -> None:
    breaker, stop = Breaker(1, 60.0), threading.Event()
    breaker.failed(None)
    stop.set()
    with pytest.raises(SpoliaError, match="stopped"):
        breaker.enter(stop)


def test_after_an_absence_it_is_looked_at_again() -> None:
    fake = Fake()
    asking = client(fake)
    asking.ask(items(2))
    fake.troubles = [Passing("gone")] * 6
    fake.contract = Contract(("a", "c"), (2,), "logits", most=4)  # it came back as something else
    with pytest.raises(SpoliaError, match=r"classes: then .*'a', 'b'.* now .*'a', 'c'"):
        asking.ask(items(2, 1))


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    bound=st.integers(0, 40),
    wants=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    troubles=st.lists(st.sampled_from([None, "gone", "slow", "odd"]), max_size=8),
    threads=st.integers(1, 4),
)
def test_no_budget_is_exceeded_by_a_single_item(bound: int, wants: list[int], troubles: list, threads: int) -> None:
    """Many threads, lots that fail in every way: what reaches the other side is never more than was counted, nor that more
    than the budget."""
    made = {"gone": Passing("gone"), "slow": Passing("slow", served=True), "odd": Misfit("odd"), None: None}
    fake, received = Fake(*[made[t] for t in troubles]), []

    def ask(batch: np.ndarray) -> dict[str, np.ndarray]:
        received.append(len(batch))
        return fake.ask(batch)

    policy = Policy(concurrency=threads, backoff=1e-4, longest=1e-4, rest=1e-3, failures=50, patience=2.0)
    asking = Client(
        Endpoint("fake", ask, fake.look, lambda: None), "fake", Store(), Budget(items=bound), Price(), policy
    )

    def want(place: int, count: int) -> None:
        try:
            asking.ask(items(count, place))
        except SpoliaError:
            return

    workers = [threading.Thread(target=want, args=pair) for pair in enumerate(wants)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert fake.items <= asking.spent.items <= bound
    assert asking.spent.answered == fake.items
    assert asking.spent.calls == len(received)


def test_two_stores_on_one_file_share_the_budget(tmp_path: Path) -> None:
    fakes = [Fake(), Fake()]
    both = [client(fake, tmp_path / "a.sqlite", items=10) for fake in fakes]
    failed = []

    def want(which: int) -> None:
        for step in range(8):
            try:
                both[which].ask(items(1, 100 * which + step))
            except BudgetSpent:
                failed.append(which)

    workers = [threading.Thread(target=want, args=(which,)) for which in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert fakes[0].items + fakes[1].items == both[0].spent.items == 10
    assert len(failed) == 6


def test_a_question_that_cannot_be_paid_whole_is_not_begun() -> None:
    fake = Fake()
    with pytest.raises(BudgetSpent, match="9 items"):
        client(fake, items=9).ask(items(10))
    assert fake.calls == 0


def test_a_retry_is_paid_too() -> None:
    fake = Fake(Passing("slow", served=True))
    with pytest.raises(BudgetSpent):
        client(fake, items=5).ask(items(3))
    assert fake.calls == 1 and fake.items == 0


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_lots_that_came_before_an_error_are_kept(tmp_path: Path) -> None:
    fake = Fake(None, None, *[Misfit("odd")] * 3)
    policy = Policy(concurrency=1, backoff=0.001)
    with pytest.raises(SpoliaError):
        client(fake, tmp_path / "a.sqlite", policy).ask(items(12))
    fake.troubles.clear()
    again = client(fake, tmp_path / "a.sqlite", policy)
    np.testing.assert_array_equal(again.ask(items(12)), items(12) * 2)
    assert len(fake.asked) == len(set(fake.asked)) == 12  # nothing twice


def test_an_interrupt_loses_no_answer(tmp_path: Path) -> None:
    fake = Fake(None, KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        client(fake, tmp_path / "a.sqlite", Policy(concurrency=1)).ask(items(8))
    again = client(fake, tmp_path / "a.sqlite")
    again.ask(items(8))
    assert len(fake.asked) == len(set(fake.asked)) == 8


def test_from_one_store_come_equal_bits(tmp_path: Path) -> None:
    """The endpoint says something else each time; who asks the store hears the first answer."""
    draws = np.random.default_rng(0)
    noisy = Endpoint("noisy", lambda b: {"logits": draws.random((len(b), 2))}, lambda: CONTRACT, lambda: None)
    rows = [
        Client(noisy, "noisy", Store(tmp_path / "a.sqlite"), Budget(), Price(), QUICK).ask(items(9)) for _ in range(2)
    ]
    np.testing.assert_array_equal(rows[0], rows[1])


# --- change ----------------------------------------------------------------------------------------------------------


def test_other_classes_than_at_first_are_an_error(tmp_path: Path) -> None:
    client(Fake(), tmp_path / "a.sqlite").ask(items(2))
    other = Fake(contract=Contract(("b", "a"), (2,), "logits", most=4))
    with pytest.raises(SpoliaError, match="is not what it was: classes"):
        client(other, tmp_path / "a.sqlite").ask(items(2))
    assert other.calls == 0


def test_a_larger_limit_is_no_change(tmp_path: Path) -> None:
    client(Fake(), tmp_path / "a.sqlite").ask(items(2))
    client(Fake(contract=Contract(("a", "b"), (2,), "logits", most=9)), tmp_path / "a.sqlite").ask(items(9))


@pytest.mark.parametrize(("moved", "told"), [(0.0, False), (1e-5, False), (0.5, True)])
def test_drift_is_noticed_and_rounding_is_not(moved: float, told: bool) -> None:
    fake, shift = Fake(), [0.0]
    plain = fake.ask
    fake.ask = lambda batch: {"logits": plain(batch)["logits"] + np.float32(shift[0])}  # type: ignore[method-assign]
    asking = client(fake, policy=Policy(canary=2, concurrency=1))
    asking.ask(items(2))
    shift[0] = moved
    steps: list[Callable[[], object]] = [lambda s=step: asking.ask(items(2, s)) for step in (1, 2, 3)]
    if told:
        with pytest.raises(SpoliaError, match="answers a first question otherwise"):
            [step() for step in steps]
    else:
        [step() for step in steps]
        assert asking.spent.items == 8 + 1 + 2  # the canary is paid: once to note it, then every second time
