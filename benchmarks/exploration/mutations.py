"""Protocols broken on purpose, one at a time: an exploration that does not find each of them proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from benchmarks.exploration import training
from benchmarks.exploration.runtime import world
from job.coordination import lease, pieces
from job.coordination.lease import Lease
from job.coordination.pieces import Pieces
from job.coordination.sealed import NamedObject
from job.data import latents, pack, shards
from job.evaluation import evaluate
from job.evaluation.evaluation_plan import FeaturePieces
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.runs import checkpoints, metric_rows, retention, writer
from job.runs.retention import Retention
from job.store.base import ObjectExistsError, Store
from job.verbs import upkeep

Replace = Callable[[Any, str, Any], None]
"""Puts another object in the place of an attribute."""


@dataclass(frozen=True)
class Mutation:
    """A way to break a protocol, and the scenarios in which that can show, or a schedule that shows it."""

    what: str
    scenarios: tuple[str, ...]
    plant: Callable[[Replace], None]


MUTATIONS: dict[str, Mutation] = {}


def _mutation(what: str, *scenarios: str) -> Callable[[Callable[[Replace], None]], Callable[[Replace], None]]:
    def register(plant: Callable[[Replace], None]) -> Callable[[Replace], None]:
        MUTATIONS[plant.__name__.strip("_").replace("_", "-")] = Mutation(what, scenarios, plant)
        return plant

    return register


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Breaks a protocol until the context ends; an empty name breaks none."""
    with ExitStack() as stack:
        if name:
            MUTATIONS[name].plant(
                lambda owner, attribute, ours: stack.enter_context(patch.object(owner, attribute, ours))  # type: ignore[arg-type]
            )
        yield


# Commit


@_mutation("the manifest is created before the files are uploaded", "train")
def _manifest_first(replace: Replace) -> None:
    upload = writer.CheckpointFiles.upload

    def uploaded(files: Any, run: Any, held: Any, ref: Any, when_written: Any) -> Any:
        named = upload(files, _Nowhere(), held, ref, lambda: None)  # type: ignore[arg-type]
        _late.append(lambda: upload(files, run, held, ref, when_written))
        return named

    def commit(run: Any, manifest: Any) -> None:
        checkpoints.commit_manifest(run, manifest)
        _late.pop()()

    _late.clear()
    replace(writer.CheckpointFiles, "upload", uploaded)
    replace(writer, "commit_manifest", commit)


_late: list[Callable[[], Any]] = []


class _Nowhere:
    """A store that keeps nothing."""

    def retry(self, work: Any) -> Any:
        """Does nothing."""

    def move(self, path: Any, key: str, *, fresh: bool = False) -> None:
        """Keeps nothing."""

    create = move


@_mutation("the lease is confirmed neither before a commit nor before a deletion", "train", "train-here")
def _commit_unconfirmed(replace: Replace) -> None:
    replace(Lease, "confirm", lambda held: None)
    replace(Lease, "check_lost", lambda held: None)


@_mutation("the metrics of a checkpoint are uploaded after its manifest, which names them", "train")
def _late_metrics(replace: Replace) -> None:
    waiting = dict[str, bytes]()

    def commit(run: Any, manifest: Any) -> None:
        checkpoints.commit_manifest(run, manifest)
        for key, data in waiting.items():
            real(run, key, data)
        waiting.clear()

    def create(this: Any, key: str, data: bytes) -> str:
        if not key.startswith(("metrics/", "tensorboard/")):
            return real(this, key, data)
        waiting[key] = data
        return ""

    real = Store.create
    replace(writer, "commit_manifest", commit)
    replace(Store, "create", create)


@_mutation("a segment of the metrics lacks the rows of those that it takes in", "train")
def _merged_rows_lost(replace: Replace) -> None:
    replace(metric_rows.History, "_read", lambda history, segment: [b"", b""])


@_mutation("a segment of the metrics that another one has taken in stays in the manifest", "train")
def _merged_rows_twice(replace: Replace) -> None:
    add = metric_rows.History.add

    def added(history: Any, rows: Any, ref: Any, *, is_hurried: bool) -> None:
        before = history.segments
        add(history, rows, ref, is_hurried=is_hurried)
        history.segments = (*before, *history.segments[-1:])

    replace(metric_rows.History, "add", added)


# Lease


@_mutation("the lease is put, and not compared and swapped", "train", "train-here")
def _lease_put(replace: Replace) -> None:
    def write(run: Store, record: Any, version: str) -> str:
        run.put(lease.LEASE_KEY, record.to_json())
        return run.read(lease.LEASE_KEY).version

    replace(lease, "_write_lease", write)


@_mutation("the fence of a new holder is that of the one before", "train")
def _fence_not_raised(replace: Replace) -> None:
    record = lease.LeaseRecord

    def lower(**fields: Any) -> Any:
        return record(**fields | {"fence": max(1, fields["fence"] - 1)})

    lower.load, lower.from_json = record.load, record.from_json  # type: ignore[attr-defined]
    replace(lease, "LeaseRecord", lower)


@_mutation("a held lease is taken without watching it", "train", "train-here")
def _taken_unwatched(replace: Replace) -> None:
    replace(lease._Watch, "why_free", lambda watch: "it looked old")


@_mutation("a lease is taken after a third of the time", "train")
def _taken_early(replace: Replace) -> None:
    why_free = lease._Watch.why_free

    def soon(watch: Any) -> str:
        return why_free(watch) or ("it was silent" if watch.silent_seconds >= lease.EXPIRE_SECONDS / 3 else "")

    replace(lease._Watch, "why_free", soon)


@_mutation("a holder swaps its record for that of another holder, at its renewal or release", "train", "train-here")
def _swaps_any_record(replace: Replace) -> None:
    def swap(held: Any, released: bool) -> None:
        asked_at = lease.boot_clock()
        update = {"renewal": held._record.renewal + 1, "released": released}
        held._record = held._record.model_copy(update=update)
        for _ in range(3):
            if version := lease._write_lease(held._run, held._record, held._version):
                held._version, held._confirmed_at = version, asked_at
                return
            held._version = lease._read_lease(held._run)[1]

    replace(Lease, "_swap", swap)


@_mutation("a confirmation only asks whether the loss of the lease is known already", "train", "train-here")
def _confirmed_from_memory(replace: Replace) -> None:
    replace(Lease, "confirm", Lease.check_lost)


@_mutation("a lost answer of the lease's creation counts as a lost race", "train", "train-here")
def _own_write_unknown(replace: Replace) -> None:
    replace(Store, "_version_if_equal", lambda store, key, content: None)


# The store's own part


@_mutation("a conflict counts as success, without a comparison of the contents", "train", "pack-twice", "sample")
def _conflict_is_success(replace: Replace) -> None:
    def version(store: Any, key: str, content: Any) -> str:
        return str(store._read(key).version)

    replace(Store, "_version_if_equal", version)


@_mutation("`create` overwrites what is there", "sample", "average")
def _create_overwrites(replace: Replace) -> None:
    def created(store: Any, key: str, content: Any) -> str:
        return str(store._attempt(store._written, key, content, None))

    replace(Store, "_created", created)


# Retention


@_mutation("the objects of a checkpoint are deleted before its manifest", "train")
def _objects_deleted_first(replace: Replace) -> None:
    def delete(run: Store, ref: Any) -> None:
        for entry in run.list(ref.key):
            if entry.key != ref.manifest_key:
                run.delete(entry.key)
        run.delete(ref.manifest_key)

    replace(retention, "delete_checkpoint", delete)


@_mutation("the newest checkpoint is retired, and not the oldest", "train")
def _newest_retired(replace: Replace) -> None:
    def retire(this: Retention, refs: Any) -> list[Any]:
        return sorted(refs, reverse=True)[: -this.config.checkpoint.keep_last]

    replace(Retention, "retire", retire)


@_mutation("a save in between displaces the last end of an epoch", "train")
def _epoch_displaced(replace: Replace) -> None:
    def retire(this: Retention, refs: Any) -> list[Any]:
        return sorted(refs)[: -this.config.checkpoint.keep_last]

    replace(Retention, "retire", retire)


@_mutation("a segment of the metrics goes when a later one has taken it in, though a manifest names it", "train")
def _merged_deleted_early(replace: Replace) -> None:
    leftovers = retention.leftovers

    def only_newest(run: Any, places: Any, until: Any, named: Any, read: Any) -> Any:
        unnamed = {place.checkpoint: set[str]() for place in places.values()}
        return leftovers(run, places, until, unnamed | {until: named[until]}, read)

    replace(retention, "leftovers", only_newest)


@_mutation("the sweep deletes metrics of earlier attempts, which manifests name", "train", "train-here")
def _sweeps_metrics_in_use(replace: Replace) -> None:
    def none_named(run: Any, ref: Any) -> Any:
        return checkpoints.load_manifest(run, ref).model_copy(update={"segments": (), "snapshots": ()})

    replace(retention, "load_manifest", none_named)


@_mutation("retention deletes a checkpoint though it is being read", "read")
def _readers_ignored(replace: Replace) -> None:
    replace(retention, "being_read", lambda run: set())


@_mutation("a reader chooses a checkpoint before it marks it, and never looks again", "read")
def _unmarked_choice(replace: Replace) -> None:
    @contextmanager
    def chosen(run: Store, choose: Any) -> Iterator[Any]:
        with retention.kept_while_read(run, *(refs := choose())) as renew:
            yield refs, renew

    replace(training, "reading_chosen", chosen)


@_mutation("checkpoints of all attempts share a folder", "train", "train-here")
def _prefix_shared(replace: Replace) -> None:
    ref = checkpoints.CheckpointRef

    def same(fence: int, images_seen: int) -> Any:
        return ref(1, images_seen)

    attempt = writer.CheckpointWriter.save

    def save(this: Any, images_seen: int, loss_sums: Any) -> None:
        leased = this._leased
        object.__setattr__(leased, "record", leased.record.model_copy(update={"fence": 1}))
        attempt(this, images_seen, loss_sums)

    replace(writer, "CheckpointRef", same)
    replace(writer.CheckpointWriter, "save", save)


@_mutation("metrics of an attempt that was replaced are kept besides those of the next", "train", "train-here")
def _metrics_repeated(replace: Replace) -> None:
    init = writer.CheckpointWriter.__init__

    def keeping(this: Any, leased: Any, live: Any, *, before: Any, stop: Any) -> None:
        init(this, leased, live, before=before, stop=stop)
        named = {one.rows.key for one in this._history.segments}
        for entry in leased.store.list("metrics"):
            if entry.key not in named:
                rows = NamedObject.of(entry.key, leased.store.read(entry.key).data)
                events = NamedObject.of(
                    entry.key.replace("metrics/", "tensorboard/events.out.tfevents.")[:-6], b"events"
                )
                this._history.segments += (checkpoints.Segment(saves=1, rows=rows, events=events),)

    replace(writer.CheckpointWriter, "__init__", keeping)


# Pieces


@_mutation("the record of a piece is created before its files", "pack", "sample")
def _record_first(replace: Replace) -> None:
    commit, stored = Pieces.commit, pieces._stored

    def first(this: Any, number: int, made: Any) -> bool:
        with patch.object(pieces, "_stored", lambda store, equal, key, content: pieces.NamedObject.of(key, content)):
            is_first = commit(this, number, made)
        for key, content in made.files.items():
            stored(this.store, this._equal_bytes, key, content)
        return is_first

    replace(Pieces, "commit", first)


@_mutation("a piece is put over another machine's, and not created", "sample")
def _piece_overwritten(replace: Replace) -> None:
    def stored(store: Store, equal: bool, key: str, content: Any) -> Any:
        data = content if isinstance(content, bytes) else content.read_bytes()
        store.put(key, data)
        return pieces.NamedObject.of(key, data)

    replace(pieces, "_stored", stored)


@_mutation("the record of a piece names this machine's bytes, though another's lie there", "sample")
def _own_bytes_named(replace: Replace) -> None:
    stored = pieces._stored

    def named(*args: Any) -> Any:
        stored(*args)
        return pieces.NamedObject.of(args[2], args[3])

    replace(pieces, "_stored", named)


@_mutation("two records of a piece of the same second are equal: both machines count it", "sample-twice")
def _attempts_alike(replace: Replace) -> None:
    record = pieces.PieceRecord

    def alike(**fields: Any) -> Any:
        return record(**fields | {"attempt": "0" * 32})

    alike.load = record.load  # type: ignore[attr-defined]
    replace(pieces, "PieceRecord", alike)


@_mutation("the records are deleted before the index is there", "pack", "pack-twice")
def _cleared_early(replace: Replace) -> None:
    publish = pack._Packing.publish

    def early(this: Any, dataset: Store, records: Any) -> None:
        for entry in dataset.list(pieces.RECORDS):
            dataset.delete(entry.key)
        publish(this, dataset, records)

    replace(pack._Packing, "publish", early)


@_mutation("the index is created as soon as one piece is missing", "pack", "pack-twice")
def _index_incomplete(replace: Replace) -> None:
    records = Pieces.records

    def some(this: Any, numbers: Any = None, stop: Any = pieces.NEVER) -> Any:
        there = sorted(this.committed())
        return records(this, there if numbers is None else numbers, stop)

    replace(Pieces, "records", some)


@_mutation("the index is put, and holds the time", "pack-twice", "pack")
def _index_differs(replace: Replace) -> None:
    to_json = shards.DatasetIndex.to_json

    def with_time(this: Any) -> bytes:
        return to_json(this.model_copy(update={"licence": f"at {world().now:g}"}))

    replace(shards.DatasetIndex, "to_json", with_time)


@_mutation("encoded shards of all machines share a name", "encode")
def _latents_share_a_name(replace: Replace) -> None:
    encoded = latents._Encoding.made

    def same(this: Any, number: int, advance: Any) -> Any:
        made = encoded(this, number, advance)
        shard = dict(made.facts["shard"])
        names = {shard["name"]: f"shard-{number:05d}.tar"}
        shard["name"] = names[shard["name"]]
        files = {f"shard-{number:05d}.{key.rpartition('.')[2]}": content for key, content in made.files.items()}
        return pieces.Made(files, made.facts | {"shard": shard})

    replace(latents._Encoding, "made", same)


@_mutation("after the index a machine deletes a file that the index names", "encode")
def _named_file_deleted(replace: Replace) -> None:
    publish = latents._Encoding.publish

    def all_deleted(this: Any, dataset: Store, records: Any) -> None:
        publish(this, dataset, records)
        dataset.delete(next((entry.key for entry in dataset.list() if entry.key.endswith(".offsets")), ""))

    replace(latents._Encoding, "publish", all_deleted)


@_mutation("features are deleted before the scores are there", "score")
def _features_deleted_early(replace: Replace) -> None:
    scored = evaluate.scored
    publish = evaluate._publish

    def early(evaluation: Any, real: Any, bound: Any, stop: Any) -> None:
        def and_delete(*args: Any) -> Any:
            evaluation.features.delete()
            return scored(*args)

        with patch.object(evaluate, "scored", and_delete):
            publish(evaluation, real, bound, stop)

    replace(evaluate, "_publish", early)


@_mutation("an average's record is put over another's, whose files are then gone", "average")
def _average_put(replace: Replace) -> None:
    def create(store: Store, key: str, data: bytes) -> str:
        if "/averages/" in key and key.endswith(".json"):
            store.put(key, data)
            return ""
        return real(store, key, data)

    real = Store.create
    replace(Store, "create", create)


@_mutation("a set's index is created from the pieces that are there", "sample")
def _set_incomplete(replace: Replace) -> None:
    missing = Pieces.missing

    def fewer(this: Any) -> list[int]:
        return missing(this)[1:]

    replace(Pieces, "missing", fewer)


# Faults that explorations found in the protocols of the job, each with the schedule that showed it


@_mutation("a packer's test object lies where another packer clears, and is not written again", "pack:1a25")
def _probe_cleared(replace: Replace) -> None:
    def check_writable(store: Store, key: str) -> None:
        store.create(key, b"of the first writer")
        try:
            store.create(key, b"of a second one")
        except ObjectExistsError:
            return
        finally:
            store.delete(key)
        raise BadRequestError(f"{store.uri} lets a second writer overwrite the first")

    replace(Store, "check_writable", check_writable)


@_mutation("features that a faster machine has scored and deleted count as damaged", "score:34w6")
def _scored_is_damaged(replace: Replace) -> None:
    replace(FeaturePieces, "_content", lambda this, record: _forgetting(this, record))


def _forgetting(this: Any, record: Any) -> bytes:
    try:
        content: bytes = record.files[0].read(this.store)
        return content
    except BadDataError:
        this.forget(record)
        raise


@_mutation("an attempt that lost its run while it restored says that the checkpoint is damaged", "train-here:36c,48o30")
def _loss_is_damage(replace: Replace) -> None:
    replace(Lease, "unless_lost", lambda held: nullcontext())


@_mutation("a reader compares `LATEST` with a listing from before it", "read:3c,20s1,28s,29Z25")
def _listed_once(replace: Replace) -> None:
    def choose(run: Store, *_: object) -> list[Any]:
        if refs := checkpoints.list_checkpoints(run):
            return [max(refs)]
        if lost := checkpoints.lost_manifest(run, []):
            raise BadDataError(lost)
        raise MissingInputError(f"{run.uri} has no checkpoint yet")

    replace(training, "choose", choose)


@_mutation("a prune deletes what a suspended attempt has uploaded and not committed yet", "prune:38Z25")
def _suspended_is_over(replace: Replace) -> None:
    replace(upkeep, "_fence_at_work", lambda run: upkeep.records.highest_fence(run) + 1)
