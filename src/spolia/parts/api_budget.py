"""What may be spent on an API and what has been: calls, items, money.

An item is one input sent. It counts before it leaves, so that no number of threads or processes can send one too many. Where a
request surely was not served (no connection, 429, 5xx) its items are given back; where that is not known (a time-out, a
connection cut short, an answer that cannot be read) they stay counted, for the other side may have counted them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spolia.errors import SpoliaError


@dataclass(frozen=True)
class Budget:
    """At most so much, over all runs with the same store. None: no bound."""

    items: int | None = None
    calls: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for name, bound in (("items", self.items), ("calls", self.calls), ("money", self.money)):
            if bound is not None and not 0 <= bound < math.inf:
                raise SpoliaError(f"{bound}", where=f"budget.{name}", mend="give a number from 0 on, or leave it out")


@dataclass(frozen=True)
class Price:
    """What one item and one call cost, in one currency."""

    item: float = 0.0
    call: float = 0.0
    currency: str = "USD"

    def of(self, calls: int, items: int) -> float:
        return calls * self.call + items * self.item


@dataclass(frozen=True)
class Spent:
    """So far. `answered`: items whose answers came; `failed`: calls in vain; `kept`: answers that were here already."""

    calls: int = 0
    items: int = 0
    answered: int = 0
    failed: int = 0
    kept: int = 0
    money: float = 0.0


class BudgetSpent(SpoliaError):
    """The next question would go beyond the budget. Nothing was sent; everything paid for is kept."""


def beyond(budget: Budget, price: Price, calls: int, items: int) -> str:
    """What a total of so many calls and items would exceed; empty where nothing."""
    if budget.items is not None and items > budget.items:
        return f"{budget.items:,} items"
    if budget.calls is not None and calls > budget.calls:
        return f"{budget.calls:,} calls"
    if budget.money is not None and price.of(calls, items) > budget.money * (1 + 1e-12):  # sums of prices round
        return f"{budget.money:g} {price.currency}"
    return ""


def room(budget: Budget, price: Price, calls: int, items: int, lot: int) -> int | None:
    """Items that still fit after so many calls and items, in requests of `lot`; None: no bound."""
    bounds = [] if budget.items is None else [budget.items - items]
    if budget.calls is not None:
        bounds.append((budget.calls - calls) * lot)
    if budget.money is not None and (price.item or price.call):
        rest = budget.money - price.of(calls, items)
        bounds.append(math.floor(rest / (price.item + price.call / lot) * (1 + 1e-12)))
    return max(0, min(bounds)) if bounds else None
