"""Blocks of keys and values that go from rank to rank: how far, from whom to whom, and their messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.parallel.exchange import Form, Group
from seqzoo.parallel.layout import Layout, Range, common, merged


@dataclass(frozen=True)
class Ring:
    """How far the blocks of keys and values of every team go round: from each team to the next.

    Attributes:
        teams: Which tokens they have, and which of them this rank is in.
        width: Ranks of a team. Each exchanges with those that have its place in theirs.
        place: This rank's.
        parts: Of every block the tokens that others see.
        hops: Of every block how many teams it comes to.
    """

    teams: Layout
    width: int
    place: int
    parts: tuple[tuple[Range, ...], ...]
    hops: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, width: int, causal: bool, window: int | None) -> Ring:
        """The ring of the teams of ``width`` ranks."""
        teams = layout.teams(width)
        size = teams.size
        seen = [teams.seen(one, causal, window) for one in range(size)]
        parts, hops = [], []
        for owner, block in enumerate(teams.fragments):
            reached = [common(block, seen[(owner + hop) % size]) for hop in range(1, size)]
            parts.append(merged(sum(reached, ())))
            hops.append(max((hop for hop, part in enumerate(reached, 1) if part), default=0))
        return cls(teams, width, layout.rank % width, tuple(parts), tuple(hops))

    @property
    def last(self) -> int:
        """Hops of the block that goes farthest."""
        return max(self.hops)

    def owner(self, hop: int, team: int = 0) -> int | None:
        """Whose block has come to this rank's team, or one so many behind it, after so many hops; None for no one's."""
        owner = (self.teams.rank + team - hop) % self.teams.size
        return owner if hop <= self.hops[owner] else None

    def rank(self, team: int) -> int:
        """The rank with this one's place in a team."""
        return team % self.teams.size * self.width + self.place


class Transfer:
    """Messages from and to single ranks, under way from the start on; all ranks start theirs in the same order."""

    def __init__(
        self,
        group: Group,
        mixer: str,
        what: str,
        sent: Sequence[tuple[Tensor, int]],
        wanted: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self.group, self.words, self.sent = group, (mixer, f"pass {what} on"), sent
        self.received = [torch.empty(size, dtype=torch.uint8, device=device) for size, _ in wanted]
        incoming = [(x, source) for x, (_, source) in zip(self.received, wanted, strict=True)]
        operations = [
            dist.P2POp(deed, x, group=group.handle, group_peer=peer)
            for deed, pairs in ((dist.isend, sent), (dist.irecv, incoming))
            for x, peer in pairs
        ]
        with group.guard(*self.words):
            self.requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """What has come."""
        with self.group.guard(*self.words):
            for request in self.requests:
                request.wait()
        return self.received


def block_forms(k: Tensor, v: Tensor, tokens: int, wide: bool = False) -> list[Form]:
    """The forms of keys and values of so many tokens, or of their gradients."""
    return [((x.shape[0], tokens, *x.shape[2:]), accumulator(x.dtype) if wide else x.dtype) for x in (k, v)]
