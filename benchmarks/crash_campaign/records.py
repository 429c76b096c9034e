"""The records of a campaign: kills at random moments, runs with all their processes, and counts."""

from __future__ import annotations

import re
import signal
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.crash_campaign.history import History
from benchmarks.crash_campaign.processes import BrokenError, Invocation
from job.exits import Exit, JobError
from job.runs.checkpoints import list_checkpoints, restore
from job.runs.layout import CHECKPOINTS, CheckpointRef
from job.store import Store

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
EXPECTED_CODES = {
    ("kill", "group"): {KILLED},
    ("kill", "launcher"): {KILLED},
    ("kill", "rank"): {128 + signal.SIGKILL},
    # A signal that comes before Python has installed a handler ends the process as signals do.
    ("term", "group"): {Exit.STOPPED, TERMINATED},
    ("term", "launcher"): {Exit.STOPPED, TERMINATED},
    ("term", "rank"): {Exit.STOPPED, 128 + signal.SIGTERM},
}
"""The exit codes of the command after a signal to a target; it may also have finished just before."""
_SET_ASIDE = re.compile(rf"set aside checkpoint \S+/{CHECKPOINTS}/(\S+):")


@dataclass(frozen=True)
class Moment:
    """A kill at a random moment: after `fraction` of the expected time of a process, with its start-up."""

    fraction: float
    action: str
    target: str
    rank: int
    at_once: bool
    """Whether the command starts again at once, while processes of the killed one may still run."""

    @property
    def name(self) -> str:
        """Its name for people."""
        whom = f"rank {self.rank}" if self.target == "rank" else self.target
        return f"SIG{self.action.upper()} to {whom}{', again at once' if self.at_once else ''}"


@dataclass
class Run:
    """One run of a lane, from its first process to its last."""

    name: str
    store: Store
    invocations: list[Invocation] = field(default_factory=list)
    lingering: list[tuple[Invocation, Moment]] = field(default_factory=list)
    verified: set[CheckpointRef] = field(default_factory=set)
    rotten: set[CheckpointRef] = field(default_factory=set)
    zombies: set[int] = field(default_factory=set)
    """The fences of attempts that were stopped and replaced."""

    @property
    def history(self) -> History:
        """The work of all its attempts."""
        return History.of(event for invocation in self.invocations for event in invocation.events)

    @property
    def checkpoints(self) -> list[CheckpointRef]:
        """The committed checkpoints, oldest first."""
        try:
            return list_checkpoints(self.store)
        except JobError:
            # A bucket that is a folder does not exist before its first object.
            return []

    @property
    def set_aside(self) -> set[str]:
        """Folders of checkpoints that a process found damaged."""
        return {name for invocation in self.invocations for name in _SET_ASIDE.findall(invocation.output)}

    def misjudged(self) -> list[str]:
        """Returns the intact checkpoints that a process set aside, and the damaged ones that no process noticed."""
        damaged, aside = {str(ref) for ref in self.rotten}, self.set_aside
        intact = [f"checkpoint {name} was set aside without damage" for name in sorted(aside - damaged)]
        return intact + [f"checkpoint {name} was damaged, and no process noticed" for name in sorted(damaged - aside)]

    def audit(self) -> None:
        """Checks that every committed checkpoint is intact, with its snapshots.

        Raises:
            BrokenError: one is not, and the campaign did not damage it.
        """
        for ref in set(self.checkpoints) - self.verified - self.rotten:
            # A late commit of a zombie may name deleted objects. It has no effect, since its fence is lower.
            if ref.fence in self.zombies:
                continue
            try:
                for snapshot in restore(self.store, ref).manifest.snapshots:
                    snapshot.read(self.store)
                self.verified.add(ref)
            except JobError as error:
                raise BrokenError(f"checkpoint {ref.key} is committed, but {error}") from None

    def written_after_loss(self) -> list[str]:
        """Returns the attempts that wrote after another took the run; one write may have been in progress."""
        events = [event for invocation in self.invocations for event in invocation.events]
        taken, late = 0, Counter[int]()
        for event in sorted(events, key=lambda event: event["time"]):
            if event["event"] == "began":
                taken = max(taken, event["fence"])
            elif event["event"] in ("commit", "delete") and event["fence"] < taken:
                late[event["fence"]] += 1
        return [f"attempt {fence} wrote {n} times after another took the run" for fence, n in late.items() if n > 1]


@dataclass
class Tally:
    """The counts of a lane."""

    kills: Counter[str] = field(default_factory=Counter)
    rot: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    runs: int = 0
    lost_images: int = 0
    repeated_images: int = 0
    bad_checkpoints: int = 0
    planted_checkpoints: int = 0
    recovery_seconds: list[float] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    undisturbed_hash: str = ""
    failures: list[str] = field(default_factory=list)
