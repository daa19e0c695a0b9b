"""A convolutional code and its most likely codeword, batched (Viterbi 1967).

The encoder holds the last `memory` bits; every bit in sends one bit for each generator, the parity of the window of
memory + 1 bits under it. Generators are octal as in the tables, their highest bit being the newest. A message ends with
`memory` zeros, so that all paths meet again: k bits become (k + memory) n.

    maximise  sum_i (1 - 2 c_i) L_i / 2     over codewords c,   L = ln p(y | 0) / p(y | 1)

which is maximum likelihood, bits erased (L = 0) included.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.modulation import to_bits
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Convolutional:
    """Feed-forward code of rate 1 / len(generators). The default has 64 states and free distance 10."""

    generators: tuple[int, ...] = (0o133, 0o171)

    def __post_init__(self) -> None:
        if len(self.generators) < 2 or min(self.generators) < 1 or self.memory < 1:
            given = ", ".join(f"{g:o}" for g in self.generators)
            raise SpoliaError(
                f"generators {given or 'missing'}", where="generators", mend="two or more, as 0o133, 0o171"
            )

    @property
    def memory(self) -> int:
        return max(g.bit_length() for g in self.generators) - 1 if self.generators else 0

    def length(self, count: int) -> int:
        """Bits on the air for `count` bits."""
        return (count + self.memory) * len(self.generators)

    def encode(self, bits: Tensor) -> Tensor:
        """[..., k] to [..., (k + memory) n], uint8; the n bits of a step stand together."""
        memory = self.memory
        wide = torch.nn.functional.pad(bits, (memory, memory))
        windows = wide.unfold(-1, memory + 1, 1).long()  # [..., k + memory, memory + 1], newest last
        taps = to_bits(torch.tensor(self.generators, device=bits.device), memory + 1).flip(-1).long()
        return (windows.unsqueeze(-2) * taps).sum(-1).remainder(2).to(torch.uint8).flatten(-2)

    def decode(self, llrs: Tensor) -> Tensor:
        """L [..., (k + memory) n] to the most likely bits [..., k], uint8. Equal paths: that of the lower state."""
        n, memory = len(self.generators), self.memory
        steps = llrs.shape[-1] // n
        if llrs.shape[-1] % n or steps < memory:
            what = f"{llrs.shape[-1]} values, which are no codeword of {n} bits a step and {memory} steps of tail"
            raise SpoliaError(what, where="decode", mend=f"give (k + {memory}) {n} of them")
        sent, states = self._sent.to(llrs.device), 1 << memory
        signs = (1 - 2 * sent.to(llrs.dtype)).flatten(0, 1)  # [2 states, n]
        gains = llrs.reshape(-1, steps, n) @ signs.t() / 2  # [batch, steps, states * newest bit]
        # state s = (newest … oldest); into s come the windows of newest bit s >> (memory - 1) and of both oldest bits
        into = torch.arange(states, device=llrs.device)
        newest = into >> (memory - 1)
        before = torch.stack([(into << 1) & (states - 1), ((into << 1) & (states - 1)) | 1], dim=1)  # [states, 2]
        edges = before * 2 + newest[:, None]
        best = torch.full((len(gains), states), -torch.inf, dtype=llrs.dtype, device=llrs.device)
        best[:, 0] = 0.0
        chosen = torch.empty(steps, len(gains), states, dtype=torch.uint8, device=llrs.device)
        for t in range(steps):
            paths = best[:, before] + gains[:, t][:, edges]  # [batch, states, 2]
            later = paths[..., 1] > paths[..., 0]
            best = torch.where(later, paths[..., 1], paths[..., 0])
            chosen[t] = later
        state = torch.zeros(len(gains), 1, dtype=torch.long, device=llrs.device)
        bits = torch.empty(len(gains), steps, dtype=torch.uint8, device=llrs.device)
        for t in range(steps - 1, -1, -1):
            bits[:, t] = (state >> (memory - 1)).squeeze(1)
            state = ((state << 1) & (states - 1)) | chosen[t].gather(1, state)
        return bits[:, : steps - memory].reshape(*llrs.shape[:-1], steps - memory)

    @cached_property
    def free_distance(self) -> int:
        """The fewest ones of a path that leaves state 0 and comes back, by Dijkstra's search over states."""
        weight, memory = self._sent.sum(-1).tolist(), self.memory
        start = 1 << (memory - 1)
        heap, done = [(weight[0][1], start)], set()
        while heap:
            cost, state = heapq.heappop(heap)
            if state == 0:
                return cost
            if state not in done:
                done.add(state)
                for bit in (0, 1):
                    heapq.heappush(heap, (cost + weight[state][bit], (state >> 1) | (bit << (memory - 1))))
        raise AssertionError("no way back to state 0")

    @cached_property
    def _sent(self) -> Tensor:
        """Bits sent from every state by each newest bit [states, 2, n], uint8."""
        memory = self.memory
        states = torch.arange(1 << memory)
        windows = torch.stack([states, states | 1 << memory], dim=1)  # newest bit on top
        taps = to_bits(torch.tensor(self.generators), memory + 1)
        return (to_bits(windows, memory + 1).unsqueeze(-2) * taps).sum(-1).remainder(2).to(torch.uint8)
