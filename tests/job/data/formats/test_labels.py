"""Labels in and beside the images: each format's own code says which image has which."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import webdataset
from hypothesis import strategies as st

from job.data.source import members, open_source
from job.data.source.labels import join_labels, read_labels, table_in
from job.data.source.members import Member, RefusedError, Source, refusing
from job.data.source.survey import survey
from job.exits import BadDataError, BadRequestError, Exit, JobError, MissingInputError
from job.progress import printable
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here, refused, started, succeeded
from tests.job.launching import eventually
from tests.job.packing import entries_of, packed
from tests.job.some_images import folder_of, jpeg, mnist, png, tar_of, zip_of

ANIMALS = ("cat", "dog", "dog", "owl", "cat", "owl", "owl")


def labels_of(place: str | Path, **options) -> list[tuple[str, str]]:
    """The labels of a source's images by name, and that the images come in the same order."""
    source = open_source(str(place), **options)
    found = list(source.images(labelled=True))
    assert [one.name for one in found] == [name for name, _ in entries_of(source)]
    return [(one.name, one.label) for one in found]


def edm(labels: object) -> tuple[str, bytes]:
    """The table of EDM's `dataset_tool.py`."""
    return "dataset.json", json.dumps({"labels": labels}).encode()


@pytest.mark.parametrize("make", [zip_of, folder_of])
def test_edm_labels_are_joined_by_name(tmp_path, make):
    """As `dataset_tool.py` writes them: `dataset.json` last, with the labels in another order than the images.

    EDM's loader sorts the names of the images, and looks each up in the table (Karras et al. 2022).
    """
    names = [f"{n // 4:05d}/img{n:08d}.png" for n in range(10)]
    table = {name: (n * 7) % 12 for n, name in enumerate(names)}
    files = [(name, png(n)) for n, name in enumerate(names)]
    _, content = edm([[*row] for row in table.items()][::-1])
    path = make(tmp_path / "edm.zip", [*files, ("dataset.json", content)])
    assert labels_of(path) == [(name, str(table[name])) for name in sorted(names)]
    index = packed(tmp_path / "b", path)
    assert index.classes == tuple(map(str, sorted(set(table.values()))))
    assert (index.classes_from, index.skipped) == ("labels", {})
    # Its user has zipped the folder, and not what is in it; or has two of them.
    inner = [(f"edm/{name}", image) for name, image in (*files, ("dataset.json", content))]
    found = labels_of(make(tmp_path / "inner.zip", inner))
    assert [label for _, label in found] == [str(table[name]) for name in sorted(names)]
    two = make(tmp_path / "two.zip", [*inner, ("other/dataset.json", content), ("other/1.png", png(1))])
    with pytest.raises(BadRequestError, match=r"several tables of labels, edm/dataset.json, other/dataset.json"):
        open_source(str(two))
    # -1 stands for no class, also where all others have one.
    known = make(tmp_path / "known", [*files, edm([[name, 1 if n else -1] for n, name in enumerate(names)])])
    assert packed(tmp_path / "known-b", known, unlabelled="drop").classes == ("1",)
    # Without labels the folders are no classes, which hold the images by number.
    for nothing in (b'{"labels": null}', b"[1, 2]", b"{}"):
        bare = make(tmp_path / f"bare-{len(nothing)}", [*files, ("dataset.json", nothing)])
        assert packed(tmp_path / f"b{len(nothing)}", bare).classes == ()
    _, vectors = edm([[name, [0.5, 1.0]] for name in names])
    for harmed in (vectors, content[:-9], b'{"labels": [["a", 1, 2]]}', b'{"labels": [7]}', b'{"labels": 7}'):
        place = make(tmp_path / f"harmed-{len(harmed)}", [*files, ("dataset.json", harmed)])
        said = "has several values of its label, and not one" if harmed == vectors else "has no labels such as|is trunc"
        with pytest.raises(BadDataError, match=rf"dataset.json ({said})"):
            open_source(str(place))
        assert packed(tmp_path / f"without-{len(harmed)}", place, classes=False).classes == ()


def test_large_tables_are_refused(tmp_path, monkeypatch):
    """Of kilobytes that unpack to a large table, and of more bytes than a table has."""
    rows = b'["a", 0],' * 3_000_000
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png(0))
        archive.writestr("dataset.json", b'{"labels": [%b]}' % rows[:-1])
    said = "dataset.json unpacks to more than 200 times its size: do not trust this archive"
    at = ("x", "--size", 8, "--bucket", tmp_path / "bucket")
    assert said in refused(ddpm_here("data", "pack", tmp_path / "bomb.zip", *at), Exit.BAD_DATA)
    monkeypatch.setattr(members, "TABLE_BYTES", 1000)
    folder = folder_of(tmp_path / "folder", [("0.png", png(0)), ("dataset.json", rows[:1001]), ("l.csv", rows[:1001])])
    for words in ((), ("--labels", folder / "l.csv")):
        line = refused(ddpm_here("data", "pack", folder, *at, *words), Exit.BAD_DATA)
        assert "has 1,001 bytes, more than the 1,000 that a table of labels may have" in line


@pytest.mark.slow
def test_a_large_table_does_not_delay_stop(tmp_path):
    """The seconds of the processor count, of which reading this table takes about thirty."""
    rows = b'["a", 0],' * 6_000_000
    folder = folder_of(tmp_path / "a", [("0.png", png(0)), ("dataset.json", b'{"labels": [%b]}' % rows[:-1])])
    process = started("data", "pack", folder, "x", "--size", 8, "--bucket", tmp_path / "bucket")
    while (busy_seconds := sum(psutil.Process(process.pid).cpu_times()[:2])) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    # Linux keeps the times of a process that has ended until it is waited for.
    eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, seconds=60)
    assert sum(psutil.Process(process.pid).cpu_times()[:2]) - busy_seconds < 8
    said, _ = process.communicate()
    assert process.returncode == Exit.STOPPED and "stopped by SIGTERM while looking at what becomes x" in said


def test_similar_labels_are_two_classes(tmp_path):
    """A label with a control character, and one that looks like what is shown of it."""
    labels = ["a\x01", "a%01", "a%2501", "50%", "New%20York"]
    table = edm([[f"{n}.png", labels[n % 5]] for n in range(10)])
    path = folder_of(tmp_path / "a", [*((f"{n}.png", png(n)) for n in range(10)), table])
    assert packed(tmp_path / "b", path).classes == ("50%", "New%20York", "a%01", "a%2501", "a%252501")


def write_tars(folder: Path, kind: str) -> Path:
    """Seven images in three tars by the real library, with classes by number or name."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%05d.tar"), maxcount=3, verbose=0) as writer:
        for n, animal in enumerate(ANIMALS):
            label = {"cls": 2 * n % 5} if kind == "cls" else {"json": {"label": animal, "width": 40}}
            writer.write({"__key__": f"{n:04d}", "jpg": jpeg(n), "txt": "a", **label})
    return folder


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_webdataset_labels_are_those_of_its_library(tmp_path, kind):
    folder = write_tars(tmp_path / "wds", kind)
    urls = sorted(map(str, folder.iterdir()))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    said = [s["cls"].decode() if kind == "cls" else json.loads(s["json"])["label"] for s in theirs]
    for place in (folder, f"{folder}/train-*.tar", f"{folder}/train-{{00000..00002}}.tar"):
        assert [label for _, label in labels_of(place)] == said
        assert [content for _, content in entries_of(open_source(str(place)))] == [s["jpg"] for s in theirs]
    index = packed(tmp_path / "b", folder)
    found = (index.classes, index.images, index.skipped, index.splits)
    assert found == (tuple(sorted(set(said))), 7, {".txt": 7}, ())
    # An image without a label among others that have one is left out only if a person says so, and counted.
    with webdataset.ShardWriter(str(folder / "train-9%04d.tar"), verbose=0) as writer:
        writer.write({"__key__": "x", "jpg": jpeg(50), "txt": "a"})
        writer.write({"__key__": "y", "jpg": jpeg(51), "cls": -1})
    with pytest.raises(BadDataError, match=r"2 of 9 images have no label, such as train-90000.tar/x.jpg, train-90000"):
        packed(tmp_path / "c", folder)
    index = packed(tmp_path / "c", folder, unlabelled="drop")
    assert (index.images, index.unlabelled_images, index.rejected_images) == (7, 2, 0)
    assert packed(tmp_path / "d", folder, classes=False).images == 9


def test_index_and_pack_read_the_same_labels(tmp_path):
    folder = tmp_path / "wds"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=3, verbose=0) as writer:
        for n in range(7):
            writer.write({"__key__": f"{n:04d}", "jpg": jpeg(n), "json": {"label": "x", "kind": n % 3}})
    copied = packed(tmp_path / "a", folder, labels=":kind")
    in_place = packed(tmp_path / "b", "", tars=(str(folder),), shard_images=None, labels=":kind")
    assert copied.classes == in_place.classes == ("0", "1", "2")
    shutil.copytree(folder, tmp_path / "splits/train")
    (tmp_path / "splits/val-0.tar").write_bytes((folder / "00000.tar").read_bytes())
    for tars, splits in [("splits", ("train", "val")), ("splits/train", ())]:
        index = packed(tmp_path / tars / "b", "", tars=(str(tmp_path / tars),), shard_images=None, labels=":kind")
        assert index.splits == splits
    said = "has the label 'x', and no number up to 99999: `ddpm data pack` takes names"
    with pytest.raises(BadDataError, match=said):
        packed(tmp_path / "c", "", tars=(str(folder),), shard_images=None)
    with pytest.raises(BadRequestError, match="labels beside the images: use :KEY"):
        packed(tmp_path / "d", "", tars=(str(folder),), labels="a.csv:kind")


def test_label_that_no_image_has_is_refused(tmp_path):
    """Otherwise a mistyped key gives a dataset without classes, or with those of another label."""
    images = [(f"{n}.png", png(n)) for n in range(4)]
    places = [
        write_tars(tmp_path / "json", "json"),
        write_tars(tmp_path / "cls", "cls"),
        zip_of(tmp_path / "edm.zip", [*images, edm([[name, n] for n, (name, _) in enumerate(images)])]),
        folder_of(tmp_path / "flat", images),
        tmp_path / "mnist",
    ]
    mnist(places[-1], "train", np.zeros((4, 28, 28)), np.arange(4), gz=False)
    for place in places:
        with pytest.raises(BadRequestError, match="none of its images has a label 'lable'"):
            packed(tmp_path / "b", place, labels=":lable")
    for place in places[:2]:
        with pytest.raises(BadRequestError, match=r"none of its images has a label lable"):
            packed(tmp_path / place.name, "", tars=(str(place),), shard_images=None, labels=":lable")


METADATA = b"""{"file_name": "000001.jpg", "text": "x", "label": 3}

{"file_name": "000002.jpg", "label": null}
{"file_name": "000003.jpg", "label": 0}
"""
SPACES = b'id, kind , x\r\n./img/000001.jpg, "a, b", 1\r\n img/000002, c, 1\r\nimg/000003,d,1,\r\n'
CELEBA_ATTRIBUTES = b"3\nSmiling Young\n000001.jpg  1 -1\n000002.jpg -1  1\n000003.jpg  1  1\n"
TABLES = [
    ("identity_CelebA.txt", b"000001.jpg 2880\n000002.jpg 2937\n000003.jpg 2880\n", "", ["2880", "2937", "2880"]),
    ("list_attr_celeba.txt", CELEBA_ATTRIBUTES, "Smiling", ["Smiling", "not Smiling", "Smiling"]),
    ("train.csv", b"id,breed\n000001,pug\n000002,boxer\n000003,pug\n", "", ["pug", "boxer", "pug"]),
    ("a.csv", b"\xef\xbb\xbflabel;Image\n7;img/000001.jpg\n8;img/000002.jpg\n7;img/000003.jpg\n", "", ["7", "8", "7"]),
    ("a.tsv", b'name\tkind\n000001.jpg\t"a, b"\n000002.jpg\tc\n000003.jpg\td\n', "", ["a, b", "c", "d"]),
    ("metadata.jsonl", METADATA, "label", ["3", "", "0"]),
    ("a.json", b'{"000001.jpg": "cat", "000003.jpg": "dog"}', "", ["cat", "", "dog"]),
    ("b.csv", SPACES, "kind", ["a, b", "c", "d"]),
    ("d.csv", b"kind,filepaths\na,img/000001.jpg\nb,img/000002.jpg\na,img/000003.jpg\n", "", ["a", "b", "a"]),
    # Labels such as 1 are names of images, too.
    ("h.csv", b"7,000003.jpg\n1,000001.jpg\n1,000002.jpg\n", "", ["1", "1", "7"]),
    # pandas makes floats of a column that lacks a number.
    ("c.csv", b"id,n\n000001,10.0\n000002,\n000003,2.0\n", "", ["10", "", "2"]),
    # pandas writes its index first, without a name; after a concatenation each number is there twice.
    ("e.csv", b",id,n\n0,000001,a\n1,000002,b\n0,000003,a\n", "", ["a", "b", "a"]),
    ("f.csv", b",n\n000001,a\n000002,b\n000003,a\n", "", ["a", "b", "a"]),
    ("g.json", b'[{"id": "000001", "n": "a"}, {"id": "000003", "n": "b"}]', "n", ["a", "", "b"]),
    ("b.jsonl", b'{"id": "000001", "is": true}\n{"id": "000002", "is": false}\n', "", ["true", "false", ""]),
]


@pytest.mark.parametrize(("name", "content", "column", "expected"), TABLES)
def test_tables_name_the_classes(name, content, column, expected):
    names = [f"img/{n:06d}.jpg" for n in (1, 2, 3, 4)]
    table = join_labels(table_in(name, content), names, column)
    assert [table.of(image) for image in names] == [*expected, ""]


def test_table_is_joined_by_file_name(tmp_path):
    source = zip_of(tmp_path / "img_align.zip", [(f"img/{n:06d}.jpg", jpeg(n)) for n in range(6)])
    table = tmp_path / "train.csv"
    table.write_text("id,breed\n" + "".join(f"{n:06d},{ANIMALS[n]}\n" for n in range(5)))
    at = ("small", "--size", 16, "--bucket", tmp_path / "b")
    words = ("data", "pack", source, *at, "--labels", table)
    assert "1 of 6 images have no label, such as img/000005.jpg: label them, leave" in refused(ddpm_here(*words), 65)
    said = succeeded(ddpm_here(*words, "--unlabelled", "drop"))
    assert "classes  cat, dog, owl" in said and "images   5 colour" in said and "1 without a label" in said
    (tmp_path / "attr.txt").write_bytes(CELEBA_ATTRIBUTES)
    for words, code, line in [
        (("--labels", tmp_path / "attr.txt"), 64, "has several columns: Smiling, Young: choose one with --labels"),
        (("--labels", f"{tmp_path}/attr.txt:Old"), 64, "has no column 'Old', but Smiling, Young"),
        (("--labels", tmp_path / "none.csv"), 66, "nothing at"),
        (("--labels", table, "--no-classes"), 64, "contradict each other"),
        (("--labels", source), 65, "is not a text in UTF-8: save it in that encoding"),
    ]:
        assert line in refused(ddpm_here("data", "pack", source, "other", *at[1:], *words), code)
    (tmp_path / "else.csv").write_text("id,breed\nx,pug\ny,boxer\n")
    words = ("--labels", tmp_path / "else.csv")
    said = refused(ddpm_here("data", "pack", source, "other", *at[1:], *words), 64)
    assert "has no column that names images, such as 'img/000000.jpg': its last row has y, boxer; one column" in said


def test_labels_that_nobody_chose_are_named(tmp_path, caplog):
    """A source of labels under odd names would be packed without classes in silence; the named words work."""
    files = [("test/9.png", png(9)), *((f"train/{n}.png", png(n)) for n in range(4))]
    breeds = ["pug", "boxer", "pug", "boxer"]
    csv = "id,breed\n" + "".join(f"{n},{breed}\n" for n, breed in enumerate(breeds))
    kaggle = [("train.csv", csv.encode()), *files]
    np.savez(tmp_path / "a.npz", pictures=np.zeros((4, 8, 8, 3), np.uint8), breed=breeds)
    rows = {"image": [content for _, content in files[1:]], "breed": breeds}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    archives = folder_of(tmp_path / "archives", kaggle[:1])
    for split, part in (("test", files[:1]), ("train", files[1:])):
        zip_of(archives / f"{split}.zip", [(name.partition("/")[2], content) for name, content in part])
    for place, words in [
        (zip_of(tmp_path / "kaggle.zip", kaggle), "train.csv:COLUMN"),
        (folder_of(tmp_path / "kaggle", kaggle), "train.csv:COLUMN"),
        (archives, "train.csv:COLUMN"),
        (tmp_path / "a.npz", ":breed"),
        (tmp_path / "a.parquet", ":breed"),
    ]:
        caplog.clear()
        assert packed(tmp_path / f"{place.name}-without", place, shard_images=None).classes == ()
        assert f"--labels {words} would take labels" in caplog.text
        index = packed(tmp_path / f"{place.name}-with", place, labels=words.replace("COLUMN", "breed"))
        assert (index.images, index.classes, index.splits) == (4, ("boxer", "pug"), ())
    caplog.clear()
    packed(tmp_path / "plain", folder_of(tmp_path / "photos", files[1:]))
    assert "packed without classes: its images have neither labels nor folders of classes" in caplog.text


def test_row_is_one_image_of_one_class(tmp_path):
    """Kaggle's CIFAR-10 has a table for train, and the same names in test: their images would get those labels."""
    files = [(f"{split}/{n}.png", png(n)) for split in ("test", "train") for n in range(4)]
    images = zip_of(tmp_path / "a.zip", files)
    both = "would label both 'test/0.png' and 'train/0.png': pack one of their folders"
    for name, split, said in [
        ("{}", "", both),
        ("{}", "train", both),
        ("train/{}.png", "all", "4 of 8 images have no label"),
    ]:
        table = tmp_path / "labels.csv"
        table.write_text("id,label\n" + "".join(f"{name.format(n)},{n % 2}\n" for n in range(4)))
        with pytest.raises(JobError, match=said):
            packed(tmp_path / "b", images, labels=str(table), split=split)
    assert packed(tmp_path / "b", images, labels=str(table)).images == 4
    for name, content, said in [
        ("a.csv", b"id,label\n1,cat\n1,cat\n1,dog\n", "labels '1' as 'cat' and as 'dog'"),
        ("a.txt", b"1.jpg cat\n2.jpg golden retriever\n", "has 3 values in the row of '2.jpg', and 2 columns"),
        ("a.csv", b"id,label\n1,dog, big\n2,cat\n", "has 3 values in the row of '1', and 2 columns"),
        ("a.csv", "id,label\n1,thé\n2,thè\n".encode("latin-1"), "in UTF-8: save it in that encoding"),
        ("a.csv", "id,label\n1,a\n2,b\n".encode("utf-16"), "in UTF-8: save it in that encoding"),
    ]:
        with pytest.raises(RefusedError, match=said):
            join_labels(table_in(name, content), ["1.jpg", "2.jpg"])
    with pytest.raises(BadRequestError, match="has no column 'breed', but label"):
        join_labels(table_in("a.json", b'{"1": 2}'), ["1.png"], "breed")


WORDS = st.sampled_from(["file", "label", "1.png", "-1", "1", "", *'",;\t \n\r{}[]'])
TEXTS = st.lists(WORDS, max_size=30).map("".join).map(str.encode) | st.binary(max_size=200)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["labels", "file_name", "a"]), inner),
).map(lambda value: json.dumps(value).encode())


@examples(few=60, many=3000)
def test_odd_tables_give_labels_or_a_line(tmp_path, count):
    @search(count, st.sampled_from([".csv", ".txt", ".jsonl", ".json"]), TEXTS | JSON)
    def check(suffix: str, content: bytes) -> None:
        path = tmp_path / f"table{suffix}"
        path.write_bytes(content)
        try:
            with refusing(str(path)):
                table = join_labels(read_labels(str(path)), ["1.png", "label.png"])
        except JobError as error:
            assert error.exit_code in (Exit.BAD_DATA, Exit.BAD_REQUEST) and len(str(error).splitlines()) == 1
        else:
            assert all(label == printable(label) and len(label) <= 100 for label in table.labels.values())


def test_folder_of_archives_is_one_source(tmp_path):
    """As ImageNet has a tar for each class; the names of the archives are classes only if a person says so."""
    (tars := tmp_path / "tars").mkdir()
    (zips := tmp_path / "zips").mkdir()
    for n, kind in enumerate(("n01", "n02")):
        tar_of(tars / f"{kind}.tar", [(f"{kind}_{number}.jpg", jpeg(10 * n + number)) for number in range(3)])
    names = [name for name, _ in labels_of(tars)]
    assert names == [f"{kind}.tar/{kind}_{number}.jpg" for kind in ("n01", "n02") for number in range(3)]
    assert packed(tmp_path / "a", tars).classes == ()
    assert packed(tmp_path / "b", tars, classes=True).classes == ("n01", "n02")
    zip_of(tars / "more.zip", [("9.jpg", jpeg(90))])
    tar_of(tars / "n03.tar", [("7.jpg", jpeg(70)), ("7.cls", b"3")])
    assert dict(labels_of(tars))["n03.tar/7.jpg"] == "3", "a zip beside them takes no labels from tars"
    for split in ("train", "test"):
        zip_of(zips / f"{split}.zip", [(f"{kind}/{split}.png", png(1)) for kind in ("cat", "dog")])
    both = packed(tmp_path / "c", zips, split="all")
    assert (both.classes, both.splits) == (("cat", "dog"), ("test", "train"))
    one = packed(tmp_path / "d", zips, split="test")
    assert (one.images, one.splits) == (2, ())


@pytest.mark.parametrize("make", [zip_of, folder_of])
def test_images_beside_archives_are_packed_with_a_line(tmp_path, make, caplog):
    """A preview beside shards must not become the dataset in silence; nor must photos beside a backup of them."""
    place = make(tmp_path / "a.zip", [("preview.jpg", jpeg(1)), ("a/1.tar", b""), ("a/2.tar", b""), ("b.txt", b"")])
    assert packed(tmp_path / "b", place, classes=False).images == 1
    assert "packing its images, and not those in a/1.tar and 1 more: name these to pack them" in caplog.text


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    coco = [("annotations/instances_train2017.json", b"{}"), ("train2017/1.jpg", jpeg(1)), ("val2017/2.jpg", jpeg(2))]
    for place in (zip_of(tmp_path / "coco.zip", coco), folder_of(tmp_path / "coco", coco)):
        index = packed(tmp_path / f"of-{place.name}", place)
        assert (index.images, index.classes) == (1, ())
    zip_of(tmp_path / "nested.zip", [("a/train.zip", b"PK"), ("b.txt", b"")])
    folder_of(tmp_path / "f", [("x/a.h5", b"1")])
    for name, content, said in [
        ("a.h5", b"\x89HDF\r\n\x1a\n", "HDF5 is not read"),
        ("b.rar", b"Rar!\x1a\x07", "7-Zip or RAR"),
        ("c.pkl", b"\x80\x04\x95", "pickles are programs"),
        ("d", b"\x89HDF\r\n\x1a\n", "HDF5 is not read"),
        ("f", None, "HDF5 is not read"),
        ("nested.zip", None, "it holds archives: unpack it once, and pack the folder of archives"),
    ]:
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BadDataError, match=said):
            packed(tmp_path / "b", tmp_path / name)
    with pytest.raises(MissingInputError):
        open_source(str(tmp_path / "*.jpg"))


def test_each_image_with_its_own_label_has_no_class():
    images = [Member(f"{n}.png", bytes, label=f"name {n}") for n in range(200)]
    with pytest.raises(BadRequestError, match="another label for each image"):
        survey(Source("here", lambda: iter(images)))
    assert survey(Source("here", lambda: iter(images)), classes=False).classes == ()
    some = [Member(f"{n}.png", bytes, label=label) for n, label in enumerate(("10", "9", "cat"))]
    numbers = survey(Source("here", lambda: iter(some), classes=("dog", "cat")))
    assert numbers.classes == ("dog", "cat", "9", "10")
    assert [numbers.label(n) for n in range(3)] == [3, 2, 1]
    assert re.search("name 4 classes that the network will learn: dog, cat, 9, 10", numbers.notes[0])
