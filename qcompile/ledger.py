"""What every pass did, what it left alone and why, and how that was proved."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Preserves = Literal["function", "approximation", "analysis"]
LOWERING = "lower"  # the step of a backend


@dataclasses.dataclass(frozen=True)
class Skip:
    """A place that a pass left alone. ``node`` is a name of the user's model."""

    site: str
    reason: str
    node: str = ""


@dataclasses.dataclass(frozen=True)
class Proof:
    """The measured difference between the model before and after a pass.

    ``relative`` is max|after - before| / max|before| over unmasked positions, the worst output;
    ``sqnr_db`` is 10 log10(sum before^2 / sum (after - before)^2).
    """

    samples: int
    max_abs: float
    relative: float
    sqnr_db: float
    tolerance: float | None = None

    @property
    def holds(self) -> bool:
        return self.tolerance is None or self.relative <= self.tolerance


@dataclasses.dataclass
class Entry:
    """One pass in the ledger."""

    name: str
    spec: str
    preserves: Preserves
    rewrites: int = 0
    sites: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skips: list[Skip] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    proof: Proof | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Ledger:
    """The ordered record of a compilation; one entry a pass."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def open(self, name: str, spec: str, preserves: Preserves) -> Entry:
        self.entries.append(Entry(name=name, spec=spec, preserves=preserves))
        return self.entries[-1]

    @property
    def current(self) -> Entry:
        if not self.entries:
            self.open("(none)", "(none)", "analysis")
        return self.entries[-1]

    def record(self, site: str, **facts: Any) -> None:
        """Note what the running pass did at ``site``."""
        self.current.sites.append({"site": site, **facts})

    def skip(self, site: str, reason: str, node: str = "") -> None:
        """Note that the running pass left ``site`` alone, and why."""
        self.current.skips.append(Skip(site, reason, node))

    def note(self, text: str) -> None:
        self.current.notes.append(text)

    def as_list(self) -> list[dict[str, Any]]:
        return [entry.as_dict() for entry in self.entries]
