"""Which checkpoint an attempt goes on from: the newest that is whole, loudly if that is not the newest there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest

from job.exits import BadDataError
from job.runs.checkpoints import (
    READERS,
    CheckpointRef,
    Manifest,
    MetricSegment,
    Restored,
    list_checkpoints,
    load_manifest,
    lost_manifest,
    opened,
    read_segment,
)
from job.runs.records import check_written_here
from job.store import ObjectMissingError, Store


@contextmanager
def newest_good(
    run: Store, groups: tuple[str, ...], warn: Callable[[str], None], aside: set[CheckpointRef] | None = None
) -> Iterator[Restored | None]:
    """The newest checkpoint that verifies, or none if there are none; damaged ones are named through `warn`.

    Those go into `aside` as well.

    If its latest metrics are damaged, the one before is used, from which they are learnt again. Where that would cost
    more than the rows are worth, the checkpoint is used without them: its manifest then does not name them any more.

    Raises:
        BadDataError: there are checkpoints, but none of them verifies.
    """
    problems: list[str] = []

    def set_aside(ref: CheckpointRef, problem: str) -> None:
        problems.append(problem)
        if aside is not None:
            aside.add(ref)
        warn(f"set aside checkpoint {run.uri}/{ref.key}: {problem}")

    with ExitStack() as stack:
        segments = _Segments(run)

        def restored(ref: CheckpointRef) -> Restored | None:
            try:
                found = stack.enter_context(opened(run, ref, groups))
                check_written_here(run, found.manifest)
            except (BadDataError, ObjectMissingError) as error:
                set_aside(ref, str(error))
                return None
            if damaged := segments.damaged(found.manifest):
                warn(
                    f"using checkpoint {run.uri}/{ref.key} without metrics that are lost: {'; '.join(damaged.values())}"
                )
                left = tuple(segment for segment in found.manifest.metric_segments if segment not in damaged)
                found = replace(found, manifest=found.manifest.model_copy(update={"metric_segments": left}))
            return found

        refs = list_checkpoints(run)[::-1]
        if lost := _lost_manifest(run, refs, warn):
            problems.append(lost)
        found: Restored | None = None
        spare: CheckpointRef | None = None
        for ref, older in zip_longest(refs, refs[1:]):
            if older and not spare and (problem := segments.learnt_again(ref, older)):
                set_aside(ref, problem)
                spare = ref
                continue
            found = restored(ref) or (restored(spare) if spare else None)
            spare = None
            if found:
                break
        if found is None and problems:
            raise BadDataError(
                f"no checkpoint of {run.uri} can be used: {'; '.join(problems)}. Restore one of them, or start another "
                "run with --run NAME"
            )
        yield found


def _lost_manifest(run: Store, refs: list[CheckpointRef], warn: Callable[[str], None]) -> str:
    try:
        lost = lost_manifest(run, refs)
    except BadDataError as error:
        warn(f"{error}; the manifests tell which checkpoint is the newest")
        return ""
    if lost:
        warn(f"set aside a checkpoint: {lost}")
    return lost


class _Segments:
    """The metric segments of a run's checkpoints, which share most of them: each is read once."""

    def __init__(self, run: Store) -> None:
        self._run = run
        self._problems: dict[MetricSegment, str] = {}

    def damaged(self, manifest: Manifest) -> dict[MetricSegment, str]:
        """What is wrong with the rows that a checkpoint names, by segment."""
        unread = [segment for segment in manifest.metric_segments if segment not in self._problems]
        with ThreadPoolExecutor(READERS) as pool:
            self._problems |= zip(unread, pool.map(self._problem, unread), strict=True)
        problems = {segment: self._problems[segment] for segment in manifest.metric_segments}
        return {segment: problem for segment, problem in problems.items() if problem}

    def learnt_again(self, ref: CheckpointRef, older: CheckpointRef) -> str:
        """What is wrong with the rows of `ref`, if whoever goes on from `older` learns just those again; or nothing."""
        try:
            manifest, before = load_manifest(self._run, ref), load_manifest(self._run, older)
        except (BadDataError, ObjectMissingError):
            return ""
        damaged = self.damaged(manifest)
        new = {*manifest.metric_segments} - {*before.metric_segments}
        return "; ".join(damaged.values()) if len(new) == 1 and damaged.keys() == new else ""

    def _problem(self, segment: MetricSegment) -> str:
        try:
            read_segment(self._run, segment)
        except BadDataError as error:
            return str(error)
        return ""
