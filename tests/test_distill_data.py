"""Training data: three kinds of sources, pictures to tensors, the order of samples, the loader, the cache."""

import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import tarfile
import time
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("safetensors", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='training needs the extra: pip install "linattn[train]"')

from PIL import Image, ImageOps

from linattn.distill import recipe
from linattn.distill.cache import Cache, CacheError
from linattn.distill.data import (
    DataError,
    Order,
    bucket_of,
    buckets,
    captions,
    latent_key,
    loader,
    open_source,
    pictures,
    prepare_image,
    sample_rng,
    targets,
)

SIZES = {"a/one": (40, 60), "a/two": (64, 64), "b": (90, 30), "c.d": (16, 200), "e": (8, 8)}  # (height, width)
CAPTIONS = {name: f"a picture of {name}, ünïcode" for name in SIZES}


def settings(path=".", **changes):
    """The data section of a recipe."""
    return recipe.Data(**{"kind": "images", "path": str(path), "resolution": 32, "workers": 0, **changes})


def noise(size, seed=0, channels=3):
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(name):
    return Image.fromarray(noise(SIZES[name], seed=len(name)))


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, format={"jpg": "jpeg"}.get(kind, kind), **options)
    return file.getvalue()


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def folder_beside(root):
    files = {f"{name}.png": encoded(picture(name)) for name in SIZES}
    return settings(write(root, files | {f"{name}.txt": CAPTIONS[name] + "\n" for name in SIZES}))


def folder_json(root):
    """As CLEAR's training data lies."""
    files = {f"{name}.png": encoded(picture(name)) for name in SIZES}
    return settings(write(root, files | {f"{name}.json": json.dumps({"prompt": CAPTIONS[name]}) for name in SIZES}))


def folder_metadata(root):
    lines = [json.dumps({"file_name": f"{name}.png", "text": CAPTIONS[name]}) for name in SIZES]
    files = {f"{name}.png": encoded(picture(name)) for name in SIZES}
    return settings(write(root, files | {"metadata.jsonl": "\n".join(lines)}))


def tar_text(root):
    # "c.d" would be sample "c" with member "d.png"
    members = [(f"{name}.{kind}", content) for name, kind, content in shard_members("txt")]
    write_tar(root / "0.tar", members[:4])
    write_tar(root / "1.tar", members[4:])
    return settings(root, kind="webdataset")


def tar_json(root):
    write_tar(root / "all.tar", [(f"./{name}.{kind}", content) for name, kind, content in shard_members("json")])
    return settings(root / "all.tar", kind="webdataset")


def shard_members(kind):
    for name in SIZES:
        caption = CAPTIONS[name] if kind == "txt" else json.dumps({"caption": CAPTIONS[name], "width": 3})
        yield name.replace(".", "-"), kind, caption
        yield name.replace(".", "-"), "png", encoded(picture(name))


def arrow(root):
    datasets = pytest.importorskip("datasets", reason="this source needs datasets: pip install datasets")
    rows = {"image": [picture(name) for name in SIZES], "text": list(CAPTIONS.values())}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(root)
    return settings(root, kind="datasets")


def arrow_bytes(root):
    datasets = pytest.importorskip("datasets", reason="this source needs datasets: pip install datasets")
    rows = {"caption": list(CAPTIONS.values()), "image": [encoded(picture(name)) for name in SIZES]}
    split = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows), test=datasets.Dataset.from_dict(rows))
    split.save_to_disk(root)
    return settings(root, kind="datasets", split="train")


SOURCES = pytest.mark.parametrize(
    "make",
    [folder_beside, folder_json, folder_metadata, tar_text, tar_json, arrow, arrow_bytes],
    ids=lambda make: make.__name__,
)


# ----------------------------------------------------------------------------------------------------------- sources


@SOURCES
def test_the_same_pictures_are_the_same_samples_from_every_source(make, tmp_path):
    source = open_source(make(tmp_path))
    assert len(source) == len(SIZES)
    for index, (name, size) in enumerate(SIZES.items()):
        assert source.size(index) == size
        image = source.image(index)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(picture(name)))
        assert source.caption(index) == CAPTIONS[name]


@SOURCES
def test_a_source_can_be_pickled_and_its_keys_name_each_sample_for_good(make, tmp_path):
    data = make(tmp_path)
    source = open_source(data)
    copy = pickle.loads(pickle.dumps(source))
    again = open_source(data)
    everything = [(source.key(i), source.stamp(i)) for i in range(len(source))]
    assert len(set(everything)) == len(source)
    for other in (copy, again):
        assert [(other.key(i), other.stamp(i)) for i in range(len(source))] == everything
        assert np.array_equal(np.asarray(other.image(2)), np.asarray(source.image(2)))


@SOURCES
def test_what_the_loader_gives_is_the_same_from_every_source(make, tmp_path):
    flips_and_crops = {"random_flip": True, "random_crop": True, "caption_drop": 0.3}
    reference = folder_beside(tmp_path / "reference").model_copy(update=flips_and_crops)
    data = make(tmp_path / "data").model_copy(update=flips_and_crops)
    assert_equal_batches(run(data, count=4), run(reference, count=4))


def test_a_picture_s_stamp_changes_with_its_file(tmp_path):
    source = open_source(folder_beside(tmp_path))
    before = latent_key(source, 0, (32, 32), settings())
    (tmp_path / "a/one.png").write_bytes(encoded(Image.fromarray(noise((40, 60), seed=9))))
    os.utime(tmp_path / "a/one.png", (1, 1))
    assert latent_key(source, 0, (32, 32), settings()) != before


def test_a_latent_s_key_tells_apart_all_that_changes_it(tmp_path):
    source = open_source(folder_beside(tmp_path))
    keys = {latent_key(source, i, (32, 32), settings()) for i in range(len(source))}
    keys |= {latent_key(source, 0, (32, 40), settings()), latent_key(source, 0, (40, 32), settings())}
    keys |= {latent_key(source, 0, (32, 32), settings(resize="squash"))}
    keys |= {latent_key(source, 0, (32, 32), settings(interpolation="lanczos"))}
    assert len(keys) == len(source) + 4


def image_folder(root, files, **changes):
    return open_source(settings(write(root, files), **changes))


PNG = encoded(Image.new("RGB", (8, 8), "red"))


def keys_of(source):
    return [source.key(index) for index in range(len(source))]


def test_a_folder_is_searched_through_in_order_and_hidden_names_are_passed_over(tmp_path):
    files = {f"{name}.txt": name for name in ("z", "a/b", "a/.hidden", ".git/x", "a.b/c.d", "Upper")}
    pictures_ = {
        "z.png": PNG,
        "a/b.JPG": PNG,
        "a/.hidden.png": PNG,
        ".git/x.png": PNG,
        "a.b/c.d.webp": PNG,
        "Upper.PNG": PNG,
    }
    source = image_folder(tmp_path, {**files, **pictures_, "README.md": "no picture", "notes.txt": "of nothing"})
    assert keys_of(source) == ["Upper.PNG", "a.b/c.d.webp", "a/b.JPG", "z.png"]
    assert [source.caption(i) for i in range(4)] == ["Upper", "a.b/c.d", "a/b", "z"]


def test_linked_folders_count_and_loops_of_links_end(tmp_path):
    write(tmp_path / "elsewhere", {"x.png": PNG, "x.txt": "x"})
    root = write(tmp_path / "root", {"y.png": PNG, "y.txt": "y"})
    try:
        (root / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        for name in ("loop", "second_loop"):  # followed without end, the ways through two are 2^40
            (root / name).symlink_to(root, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"links cannot be made here: {error}")
    assert keys_of(open_source(settings(root))) == ["link/x.png", "y.png"]


def test_metadata_may_lie_in_each_folder_and_goes_before_files_beside(tmp_path):
    lines = lambda *entries: "\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n\n"  # noqa: E731
    source = image_folder(
        tmp_path,
        {
            "metadata.jsonl": lines({"file_name": "one.png", "text": "of the top"}),
            "sub/metadata.jsonl": lines({"file_name": "two.png", "text": "of the\u2028sub", "more": [1]}),
            "one.png": PNG,
            "one.txt": "of the file",
            "sub/two.png": PNG,
            "three.png": PNG,
            "three.txt": "\ufeff of the file \n",
        },
    )
    assert keys_of(source) == ["one.png", "sub/two.png", "three.png"]
    assert [source.caption(i) for i in range(3)] == ["of the top", "of the\u2028sub", "of the file"]


def test_the_keys_of_metadata_can_be_chosen(tmp_path):
    line = json.dumps({"image": "one.png", "blip": "seen", "text": "read"})
    source = image_folder(tmp_path, {"metadata.jsonl": line, "one.png": PNG}, image_key="image", caption_key="blip")
    assert source.caption(0) == "seen"


def test_json_beside_a_picture_is_read_under_its_key_which_then_goes_before_text(tmp_path):
    files = {
        "one.png": PNG,
        "one.json": json.dumps({"prompt": "asked for", "blip": " seen "}),
        "one.txt": "written",
        "s/two.png": PNG,
        "s/two.json": json.dumps({"prompt": "asked for", "blip": "seen too"}),
        "three.png": PNG,
        "three.txt": "written too",
    }

    def captions_of(source):
        return [source.caption(i) for i in range(3)]

    source = image_folder(tmp_path, files)
    assert keys_of(source) == ["one.png", "s/two.png", "three.png"]
    assert captions_of(source) == ["written", "asked for", "written too"]
    assert captions_of(image_folder(tmp_path, files, caption_key="blip")) == ["seen", "seen too", "written too"]


def test_an_empty_caption_is_one(tmp_path):
    assert image_folder(tmp_path, {"a.png": PNG, "a.txt": ""}).caption(0) == ""


TRUNCATED = encoded(Image.fromarray(noise((64, 64))))[:2000]
FOLDER_ERRORS = {
    "nothing there": ({}, {}, ["data.path", "expected images (png, jpg, jpeg, webp)"]),
    "no caption": ({"a.png": PNG, "a.txt": "a", "s/b.png": PNG, "c.png": PNG}, {}, ["c.png", "'c.txt'", "2 of 3"]),
    "not json": ({"a.png": PNG, "metadata.jsonl": "{}\n{"}, {}, ["metadata.jsonl, line 1", "'file_name'"]),
    "broken json": ({"a.png": PNG, "metadata.jsonl": "\n{"}, {}, ["metadata.jsonl, line 2", "expected JSON"]),
    "a list": ({"a.png": PNG, "metadata.jsonl": "[1]"}, {}, ["line 1", "JSON object", "list"]),
    "no text": (
        {"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "caption": "x"}'},
        {},
        ["'text'", "data.caption_key", "file_name, caption"],
    ),
    "text is null": (
        {"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "text": null}'},
        {},
        ["expected text under 'text'", "None"],
    ),
    "no such file": (
        {"a.png": PNG, "metadata.jsonl": '{"file_name": "b.png", "text": ""}'},
        {},
        ["b.png", "not exist"],
    ),
    "twice": ({"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "text": ""}\n' * 2}, {}, ["line 2", "again"]),
    "no metadata": ({"a.png": PNG, "a.txt": ""}, {"caption_key": "blip"}, ["data.caption_key", "metadata.jsonl"]),
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"caption": "x"}', ["a.json", "expected text under 'prompt' (data.caption_key)", "keys: caption"]),
        ('{"prompt": ["x"]}', ["a.json", "got ['x']"]),
        ("{", ["a.json", "expected JSON"]),
    ],
)
def test_json_beside_a_picture_that_holds_no_caption_is_named(tmp_path, content, words):
    source = image_folder(tmp_path, {"a.png": PNG, "a.json": content})
    with pytest.raises(DataError) as caught:
        source.caption(0)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_a_folder_with_something_wrong_is_refused_at_once_by_name(case, tmp_path):
    files, changes, words = FOLDER_ERRORS[case]
    with pytest.raises(DataError) as caught:
        image_folder(tmp_path, files, **changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no picture", TRUNCATED, PNG[:40]], ids=["empty", "text", "cut", "header"])
@pytest.mark.parametrize("kind", ["images", "webdataset", "datasets"])
def test_a_picture_that_cannot_be_read_is_named(kind, content, tmp_path):
    if kind == "images":
        source = image_folder(tmp_path, {"broken.png": content, "broken.txt": ""})
        name = str(tmp_path / "broken.png")
    elif kind == "webdataset":
        write_tar(tmp_path / "x.tar", [("broken.png", content), ("broken.txt", "")])
        source, name = open_source(settings(tmp_path, kind=kind)), "x.tar, sample 'broken'"
    else:
        datasets = pytest.importorskip("datasets", reason="this source needs datasets: pip install datasets")
        datasets.Dataset.from_dict({"image": [content], "text": [""]}).save_to_disk(tmp_path)
        source, name = open_source(settings(tmp_path, kind=kind)), "row 0"
    with pytest.raises(DataError, match="expected a readable image") as caught:
        source.image(0)
    assert name in str(caught.value)
    with pytest.raises(DataError) as caught:
        next(iter(loader(source, Order([(8, 8)], settings(), 1, 0), settings(), first=0, count=1)))
    assert source.key(0) in str(caught.value)


def test_text_that_is_not_utf_8_is_named(tmp_path):
    source = image_folder(tmp_path, {"a.png": PNG, "a.txt": b"\xff\xfe\xfa"})
    with pytest.raises(DataError, match=r"a\.txt: expected text in UTF-8"):
        source.caption(0)


# -------------------------------------------------------------------------------------------------------------- tars


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_members_that_no_one_asked_for_are_never_unpickled(tmp_path):
    fuse = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(fuse))
    pickle.loads(bomb).close()
    assert fuse.exists(), "the bomb must work for this test to mean anything"
    fuse.unlink()
    kinds = ("pkl", "pickle", "pyd", "pt", "pth", "npy", "cls", "txt.pkl")
    write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.txt", "a"), *[(f"a.{kind}", bomb) for kind in kinds]])
    data = settings(tmp_path, kind="webdataset")
    (batch,) = run(data, count=1, batch_size=1)
    assert batch["caption"] == ["a"]
    assert not fuse.exists()


def test_samples_are_the_members_with_one_name_up_to_the_first_dot(tmp_path):
    long = "n" * 150
    members = [
        ("dir.with.dots/a.png", PNG),
        ("dir.with.dots/a.txt", "dots in folders"),
        ("b.PNG", PNG),
        ("ünï cödé.png", PNG),
        ("b.TXT", "capitals, and not side by side"),
        ("ünï cödé.txt", "letters"),
        (f"{long}/{long}.jpeg", PNG),
        (f"{long}/{long}.txt", "long"),
        ("c.seg.png", noise((4, 4)).tobytes()),
        ("c.png", PNG),
        ("c.txt", "one image by its plain name"),
        ("only.left.webp", PNG),
        ("only.txt", "one image by a longer name"),
        (".DS_Store", b"hidden"),
        ("__MACOSX/._b.png", b"hidden too"),
        ("README", "no kind"),
        ("meta.json", "{}"),
    ]
    write_tar(tmp_path / "x.tar", members, format=tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = open_source(settings(tmp_path, kind="webdataset"))
    found = {source.key(i): source.caption(i) for i in range(len(source))}
    assert found == {
        "x.tar/dir.with.dots/a": "dots in folders",
        "x.tar/b": "capitals, and not side by side",
        "x.tar/ünï cödé": "letters",
        f"x.tar/{long}/{long}": "long",
        "x.tar/c": "one image by its plain name",
        "x.tar/only": "one image by a longer name",
    }
    assert all(source.size(i) == (8, 8) for i in range(len(source)))


def test_a_caption_or_image_of_many_can_be_chosen(tmp_path):
    other = encoded(Image.new("RGB", (16, 24)))
    members = [
        ("a.left.png", PNG),
        ("a.right.png", other),
        ("a.txt", "plain"),
        ("a.blip.txt", "blip"),
        ("a.json", '{"alt": "json"}'),
    ]
    write_tar(tmp_path / "x.tar", members)
    make = lambda **keys: open_source(settings(tmp_path, kind="webdataset", image_key="right.png", **keys))  # noqa: E731
    assert make().size(0) == (24, 16)
    assert [make(caption_key=key).caption(0) for key in (None, "txt", "blip.txt", "alt")] == [
        "plain",
        "plain",
        "blip",
        "json",
    ]


def test_samples_without_an_image_are_counted_aloud(tmp_path, caplog):
    write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.txt", "a"), ("b.tiff", b""), ("b.txt", ""), ("c.json", "{}")])
    with caplog.at_level(logging.WARNING):
        assert len(open_source(settings(tmp_path, kind="webdataset"))) == 1
    assert "2 samples have no image" in caplog.text and "tiff, txt" in caplog.text


def test_shards_are_found_by_folder_file_glob_range_and_list(tmp_path, monkeypatch):
    for name in ("b/1.tar", "0.tar", "2.tar", ".hidden.tar"):
        write_tar(tmp_path / name, [("a.png", PNG), ("a.txt", name)])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    def found(path):
        source = open_source(recipe.Data(kind="webdataset", path=path, resolution=32))
        return [source.caption(i) for i in range(len(source))]

    root = str(tmp_path)
    assert found(root) == ["0.tar", "2.tar", "b/1.tar"]
    assert found(f"{root}/2.tar") == ["2.tar"]
    assert found("~/*.tar") == ["0.tar", "2.tar"]
    assert found("~/{0..2..2}.tar") == ["0.tar", "2.tar"]
    assert found([f"{root}/2.tar", f"{root}/**/*.tar"]) == ["2.tar", "0.tar", "b/1.tar"]


TAR_ERRORS = {
    "no tar": (None, {}, ["data.path", "none at"]),
    "no samples": ([("a.txt", "a")], {}, ["expected samples with an image", "1 of txt"]),
    "no caption": ([("a.png", PNG)], {}, ["x.tar, sample 'a'", "'txt' or 'json'", "found png"]),
    "no such text": ([("a.png", PNG), ("a.json", "{}")], {"caption_key": "b.txt"}, ["sample 'a'", "data.caption_key"]),
    "no such image": ([("a.png", PNG), ("a.txt", "")], {"image_key": "jpg"}, ["'jpg'", "data.image_key", "png, txt"]),
    "two images": ([("a.png", PNG), ("a.jpg", PNG), ("a.txt", "")], {}, ["one image", "png, jpg", "data.image_key"]),
    "twice": ([("a.png", PNG), ("a.txt", ""), ("./a.png", PNG)], {}, ["every member once", "a.png"]),
}


@pytest.mark.parametrize("case", TAR_ERRORS)
def test_a_tar_with_something_wrong_is_refused_at_once_by_name(case, tmp_path):
    members, changes, words = TAR_ERRORS[case]
    if members is not None:
        write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError) as caught:
        open_source(settings(tmp_path, kind="webdataset", **changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "caption_key", "word"),
    [
        ('{"caption": 3}', None, "'caption'"),
        ('{"a": ""}', "b", "'b'"),
        ("{", None, "expected JSON"),
        ("[]", None, "list"),
    ],
)
def test_json_without_the_caption_names_the_sample(tmp_path, content, caption_key, word):
    write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.json", content)])
    source = open_source(settings(tmp_path, kind="webdataset", caption_key=caption_key))
    with pytest.raises(DataError, match=r"x\.tar, sample 'a'") as caught:
        source.caption(0)
    assert word in str(caught.value)


def test_a_tar_that_is_not_whole_is_refused(tmp_path):
    big = encoded(Image.fromarray(noise((64, 64))))
    whole = write_tar(tmp_path / "whole.tar", [("a.txt", "a"), ("a.png", big), ("b.png", big), ("b.txt", "b")])
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        ends = [(member.offset_data, member.size) for member in tar.getmembers()]
    start, size = ends[2]
    last_block = start + size // 512 * 512
    for length in (0, 100, start - 100, start, start + 1024, start + 1025, last_block, last_block + 1):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut\.tar: expected"):
            open_source(settings(cut, kind="webdataset"))
    compressed = write(tmp_path, {"x.tar": gzip.compress(content)}) / "x.tar"
    with pytest.raises(DataError, match="uncompressed"):
        open_source(settings(compressed, kind="webdataset"))


def test_a_tar_that_shrank_after_it_was_indexed_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", "a"), ("a.png", encoded(Image.fromarray(noise((64, 64)))))])
    source = open_source(settings(path, kind="webdataset"))
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=r"sample 'a': expected .* bytes"):
        source.image(0)


def test_the_size_of_a_tar_s_picture_is_read_without_its_pixels(tmp_path, monkeypatch):
    big = Image.fromarray(noise((300, 400)))
    late = encoded(big, "jpg", icc_profile=bytes(200_000))  # the size stands behind more than is read at first
    write_tar(tmp_path / "x.tar", [("a.png", encoded(big)), ("a.txt", ""), ("b.jpg", late), ("b.txt", "")])
    source = open_source(settings(tmp_path, kind="webdataset"))
    read = []
    original = type(source)._read
    monkeypatch.setattr(type(source), "_read", lambda *args: read.append(len(original(*args))) or original(*args))
    assert source.size(0) == (300, 400)
    assert sum(read) < len(encoded(big))
    assert source.size(1) == (300, 400)


# ---------------------------------------------------------------------------------------------------------- datasets


def saved(root, rows, **splits):
    datasets = pytest.importorskip("datasets", reason="this source needs datasets: pip install datasets")
    made = datasets.Dataset.from_dict(rows)
    (datasets.DatasetDict(dict.fromkeys(splits, made)) if splits else made).save_to_disk(root)
    return root


@pytest.mark.parametrize(
    ("rows", "splits", "changes", "words"),
    [
        ({"image": [PNG], "text": ["a"]}, ["train", "test"], {}, ["data.split", "train, test", "None"]),
        ({"image": [PNG], "text": ["a"]}, ["train"], {"split": "tran"}, ["data.split", "'tran'"]),
        ({"image": [PNG], "text": ["a"]}, [], {"split": "train"}, ["data.split", "null"]),
        ({"picture": [PNG], "text": ["a"]}, [], {}, ["data.image_key", "'image'", "picture, text"]),
        ({"image": [PNG], "label": ["a"]}, [], {}, ["data.caption_key", "'text' or 'caption'", "image, label"]),
        ({"image": [PNG], "text": ["a"], "caption": ["b"]}, [], {}, ["data.caption_key", "'text' or 'caption'"]),
        ({"image": [PNG], "text": ["a"]}, [], {"caption_key": "txt"}, ["data.caption_key", "'txt'"]),
        ({"image": [], "text": []}, [], {}, ["data.path", "expected samples"]),
    ],
)
def test_a_data_set_with_something_wrong_is_refused_at_once(tmp_path, rows, splits, changes, words):
    saved(tmp_path, rows, **dict.fromkeys(splits))
    with pytest.raises(DataError) as caught:
        open_source(settings(tmp_path, kind="datasets", **changes))
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_no_data_set_was_saved_to_is_told(tmp_path):
    pytest.importorskip("datasets", reason="this source needs datasets: pip install datasets")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"data.path: expected .*save_to_disk"):
            open_source(settings(path, kind="datasets"))


def test_rows_without_a_picture_or_text_are_named(tmp_path):
    source = open_source(settings(saved(tmp_path, {"image": [PNG, None], "text": ["a", None]}), kind="datasets"))
    with pytest.raises(DataError, match="row 1: expected text in column 'text', got None"):
        source.caption(1)
    with pytest.raises(DataError, match="row 1: expected an image in column 'image'"):
        source.image(1)


def test_columns_can_be_chosen_and_pictures_may_be_files(tmp_path):
    write(tmp_path, {"x.png": PNG})
    rows = {"p": [str(tmp_path / "x.png")], "blip": ["b"], "text": ["t"]}
    data = settings(saved(tmp_path / "d", rows), kind="datasets", image_key="p", caption_key="blip")
    source = open_source(data)
    assert source.size(0) == (8, 8)
    assert source.image(0).size == (8, 8)
    assert source.caption(0) == "b"


# ---------------------------------------------------------------------------------------------------------- pictures


def decoded(content):
    return pictures.decode(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_and_so_does_their_size(orientation, kind):
    lossless = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}}[kind]
    image = Image.fromarray(noise((5, 9)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, kind, exif=exif, **lossless)
    with Image.open(io.BytesIO(content)) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    assert np.array_equal(np.asarray(decoded(content)), np.asarray(upright))
    assert pictures.decode_size(io.BytesIO(content)) == (upright.height, upright.width)
    assert (upright.size == (5, 9)) == (orientation >= 5)


def test_a_broken_exif_block_does_not_cost_the_picture(monkeypatch):
    content = encoded(Image.fromarray(noise((5, 9))), "jpg", exif=b"Exif\0\0nonsense" * 3)

    def fails(image):
        raise SyntaxError("not a TIFF file")  # as Pillow says it or not, by its version

    for broken in (Image.Image.getexif, fails):
        monkeypatch.setattr(Image.Image, "getexif", broken)
        assert decoded(content).size == (9, 5)
        assert pictures.decode_size(io.BytesIO(content)) == (5, 9)


def colour(image):
    """The colour of a picture of one colour."""
    values = np.asarray(decoded(encoded(image)))
    assert (values == values[0, 0]).all()
    return tuple(values[0, 0].tolist())


def test_transparency_is_seen_over_white():
    assert colour(Image.new("RGBA", (4, 4), (10, 20, 30, 0))) == (255, 255, 255)
    assert colour(Image.new("RGBA", (4, 4), (10, 20, 30, 255))) == (10, 20, 30)
    half = colour(Image.new("RGBA", (4, 4), (0, 100, 200, 128)))
    exact = [255 + (value - 255) * 128 / 255 for value in (0, 100, 200)]
    assert all(abs(a - b) <= 1 for a, b in zip(half, exact, strict=True))  # 8 bits
    assert colour(Image.new("LA", (4, 4), (50, 0))) == (255, 255, 255)
    assert colour(Image.new("LA", (4, 4), (50, 255))) == (50, 50, 50)


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_and_their_transparent_entry(transparent):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    content = encoded(image, transparency=1) if transparent else encoded(image)
    assert np.asarray(decoded(content))[0, 0].tolist() == ([255, 255, 255] if transparent else [40, 50, 60])


def test_one_colour_of_an_rgb_picture_may_be_transparent():
    content = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert np.asarray(decoded(content))[0, 0].tolist() == [255, 255, 255]


def test_grey_one_bit_and_cmyk_become_rgb():
    assert colour(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert colour(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    cmyk = decoded(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "jpg", quality=100))
    assert np.asarray(cmyk)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_rounded_to_eight_not_clipped():
    values = np.array([[0, 1, 128, 129, 256, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    result = np.asarray(decoded(encoded(Image.fromarray(values))))
    assert np.array_equal(result[..., 0], np.round(values / 257))
    assert (result == result[..., :1]).all()


def prepared(image, target, **options):
    options = {"resize": "crop", **options}
    return prepare_image(image, target, **options)


def test_pixels_are_float32_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 128, 255]] * 8] * 8, dtype=np.uint8))
    pixels, crop = prepared(image, (8, 8))
    assert (pixels.dtype, pixels.shape, crop) == (torch.float32, (3, 8, 8), (0, 0))
    assert pixels[:, 0, 0].tolist() == [-1.0, np.float32(128) / np.float32(127.5) - 1, 1.0]
    assert pixels.is_contiguous()


def levels(pixels):
    return ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)


def ramps(height, width):
    """Smooth in both directions, different in every pixel and mirrored nowhere."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([255 * y // height, 255 * x // width, 255 * (x + y) // (height + width)], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(
    ("size", "target", "resized", "crop"),
    [
        ((120, 60), (32, 32), (64, 32), (16, 0)),
        ((60, 120), (32, 32), (32, 64), (0, 16)),
        ((50, 50), (32, 32), (32, 32), (0, 0)),
        ((8, 10), (32, 32), (32, 40), (0, 4)),
        ((8, 5), (32, 32), (51, 32), (10, 0)),
        ((60, 120), (48, 32), (48, 96), (0, 32)),
        ((120, 60), (24, 40), (80, 40), (28, 0)),
        ((32, 64), (32, 32), (32, 64), (0, 16)),
    ],
    ids=str,
)
def test_a_crop_is_what_resizing_all_and_cutting_gives(size, target, resized, crop, interpolation):
    image = ramps(*size)
    pixels, found = prepared(image, target, interpolation=interpolation)
    assert found == crop
    kernel = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR, "lanczos": Image.LANCZOS}[interpolation]
    whole = np.asarray(image.resize(resized[::-1], kernel)).astype(int)
    (top, left), (height, width) = crop, target
    # One level: PIL rounds between its two passes, and computes the part in another order than the whole.
    assert abs(levels(pixels) - whole[top : top + height, left : left + width]).max() <= 1


def test_squash_ignores_the_aspect_ratio_and_is_pil_s_resize():
    image = Image.fromarray(noise((50, 90)))
    pixels, crop = prepared(image, (32, 40), resize="squash", interpolation="bicubic")
    assert crop == (0, 0)
    assert np.array_equal(levels(pixels), np.asarray(image.resize((40, 32), Image.BICUBIC)))


def test_the_interpolations_differ():
    image = Image.fromarray(noise((50, 90)))
    results = [prepared(image, (32, 32), interpolation=name)[0] for name in ("bicubic", "bilinear", "lanczos")]
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


def test_a_panorama_needs_no_memory_for_what_is_cut_off():
    image = Image.new("RGB", (60_000, 2), "red")  # as a whole: 512 x 15 million pixels
    started = time.perf_counter()
    pixels, (top, left) = prepared(image, (512, 512))
    assert time.perf_counter() - started < 20
    assert (top, left) == (0, (60_000 * 256 - 512 + 1) // 2)
    assert torch.equal(pixels[0], torch.ones(512, 512))


def test_a_flip_mirrors_left_and_right_and_the_crop_is_of_the_mirrored_picture():
    image = ramps(32, 96)
    rolls = {False: None, True: None}
    for number in range(40):
        rng = sample_rng(0, number)
        flipped = sample_rng(0, number).random() < 0.5
        rolls[flipped] = prepared(image, (32, 32), rng=rng, random_flip=True)
    plain, crop = prepared(image, (32, 32))
    assert torch.equal(rolls[False][0], plain)
    mirrored = np.asarray(image)[:, ::-1][:, 32:64]
    assert np.array_equal(levels(rolls[True][0]), mirrored)
    assert crop == rolls[True][1] == (0, 32)
    assert not torch.equal(rolls[True][0], plain)


def test_half_of_the_pictures_are_flipped_and_every_place_is_cut_about_equally_often():
    image = ramps(32, 36)
    flips, lefts = 0, Counter()
    draws = 1000
    for number in range(draws):
        pixels, (top, left) = prepared(image, (32, 32), rng=sample_rng(7, number), random_flip=True, random_crop=True)
        flips += bool(pixels[1, 0, 0] > pixels[1, 0, -1])
        lefts[left] += 1
        assert top == 0
    # Five standard deviations of a fair draw.
    assert abs(flips - draws / 2) < 5 * math.sqrt(draws / 4)
    assert sorted(lefts) == [0, 1, 2, 3, 4]
    assert all(abs(count - draws / 5) < 5 * math.sqrt(draws * 0.2 * 0.8) for count in lefts.values())


def test_what_a_random_crop_draws_does_not_depend_on_whether_flips_are_on():
    image = ramps(48, 64)
    for number in range(10):
        crops = {
            prepared(image, (32, 32), rng=sample_rng(0, number), random_crop=True, random_flip=flip)[1]
            for flip in (False, True)
        }
        assert len(crops) == 1


def test_randomness_without_its_source_is_refused():
    for option in ("random_crop", "random_flip"):
        with pytest.raises(ValueError, match="needs rng"):
            prepared(ramps(8, 8), (8, 8), **{option: True})


@hypothesis.given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    target=st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda t: (8 * t[0], 8 * t[1])),
    resize=st.sampled_from(["squash", "crop", "buckets"]),
    number=st.integers(0, 5),
)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_every_picture_fills_every_target_and_the_crop_lies_within(size, target, resize, number):
    image = Image.new("RGB", size[::-1], (255, 0, 255))
    rng = random.Random(number)
    pixels, (top, left) = prepared(
        image, target, resize=resize, rng=rng, random_crop=resize != "squash", random_flip=True
    )
    placement = pictures.place(size, target, resize=resize)
    assert pixels.shape == (3, *target)
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, 1.0])[:, None, None].expand_as(pixels))
    assert 0 <= top <= placement.resized[0] - target[0]
    assert 0 <= left <= placement.resized[1] - target[1]
    if resize != "squash":
        assert any(placement.resized[i] == target[i] for i in (0, 1))
        for i in (0, 1):  # the aspect ratio is kept as far as whole pixels go
            scale = max(target[0] / size[0], target[1] / size[1])
            assert abs(placement.resized[i] - size[i] * scale) <= 0.5 + 1e-9 * placement.resized[i]


# ----------------------------------------------------------------------------------------------------------- buckets


@hypothesis.given(
    steps=st.integers(1, 16), step=st.sampled_from([8, 16, 64]), extra=st.integers(0, 7), max_aspect=st.floats(1, 6)
)
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_buckets_have_about_the_pixels_of_the_resolution(steps, step, extra, max_aspect):
    resolution = steps * step + extra * 8
    sizes = buckets(resolution, step, max_aspect)
    assert len(set(sizes)) == len(sizes) >= 1
    assert any(height == width for height, width in sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert abs(height * width - resolution**2) <= step * max(height, width, resolution)
        assert max(height, width) <= max_aspect * min(height, width)
        assert (width, height) in sizes
        assert bucket_of((height, width), sizes) == (height, width)


def test_the_buckets_of_sd_15():
    assert buckets(512, 64, 2.0) == [
        (384, 640),
        (384, 704),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
        (704, 384),
    ]


def test_the_largest_aspect_ratio_is_one_that_may_be():
    assert (32, 128) in buckets(64, 16, 4.0)
    assert (32, 128) not in buckets(64, 16, 3.99)


def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect_ratio():
    sizes = buckets(512, 64, 2.0)
    assert bucket_of((1000, 1000), sizes) == (512, 512)
    assert bucket_of((100, 1000), sizes) == (384, 704)
    assert bucket_of((1000, 100), sizes) == (704, 384)
    assert bucket_of((30, 40), sizes) == (448, 576)
    between = math.sqrt(576 / 448)  # on a logarithmic scale just between (512, 512) and (448, 576)
    assert bucket_of((1_000_000, round(1_000_000 * between * 0.999)), sizes) == (512, 512)
    assert bucket_of((1_000_000, round(1_000_000 * between * 1.001)), sizes) == (448, 576)


# ------------------------------------------------------------------------------------------------------------- order

ORDERS = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=30),
        "batch_size": st.integers(1, 7),
        "seed": st.integers(0, 2**63 - 1),
    }
)
MANY = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)


def make_order(case, resize):
    data = settings(resize=resize, resolution=64, bucket_step=16, max_aspect=3.0)
    return Order(case["sizes"], data, case["batch_size"], case["seed"])


@pytest.mark.parametrize("resize", ["squash", "crop"])
@hypothesis.given(case=ORDERS, epochs=st.integers(1, 3))
@MANY
def test_each_epoch_shows_every_sample_once(resize, case, epochs):
    order = make_order(case, resize)
    length, batch = len(case["sizes"]), case["batch_size"]
    draws = list(itertools.chain.from_iterable(order.micro_batch(k) for k in range(-(-epochs * length // batch))))
    assert [draw.number for draw in draws] == list(range(len(draws)))
    for epoch in range(epochs):
        assert sorted(draw.index for draw in draws[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert {draw.target for draw in draws} == {(64, 64)}
    assert order.batches_per_epoch == length / batch


@hypothesis.given(case=ORDERS, epochs=st.integers(1, 3))
@MANY
def test_with_buckets_each_epoch_shows_every_sample_and_each_batch_one_size(case, epochs):
    order = make_order(case, "buckets")
    sizes = buckets(64, 16, 3.0)
    own = [bucket_of(size, sizes) for size in case["sizes"]]
    batch = case["batch_size"]
    assert order.batches_per_epoch == sum(-(-count // batch) for count in Counter(own).values())
    for epoch in range(epochs):
        first = epoch * order.batches_per_epoch
        micro_batches = [order.micro_batch(first + j) for j in range(order.batches_per_epoch)]
        for k, draws in enumerate(micro_batches, start=first):
            assert [draw.number for draw in draws] == list(range(k * batch, (k + 1) * batch))
            assert len({draw.target for draw in draws}) == 1
            assert all(draw.target == own[draw.index] for draw in draws)
        seen = Counter(draw.index for draws in micro_batches for draw in draws)
        assert set(seen) == set(range(len(own)))
        # Only tails are filled up: in a bucket, no sample comes more than once more often than another.
        for target, count in Counter(own).items():
            times = [seen[index] for index in range(len(own)) if own[index] == target]
            assert sum(times) == -(-count // batch) * batch
            assert max(times) - min(times) <= 1


@pytest.mark.parametrize("resize", ["crop", "buckets"])
@hypothesis.given(case=ORDERS, ks=st.lists(st.integers(0, 60), min_size=1, max_size=10))
@MANY
def test_a_micro_batch_depends_on_nothing_but_its_number(resize, case, ks):
    one, other = make_order(case, resize), make_order(case, resize)
    for k in ks:
        other = pickle.loads(pickle.dumps(other))
        assert one.micro_batch(k) == other.micro_batch(k) == make_order(case, resize).micro_batch(k)


@pytest.mark.parametrize("resize", ["crop", "buckets"])
def test_epochs_and_seeds_give_other_orders(resize):
    sizes = [(64, 64 + 3 * i) for i in range(40)]
    firsts = set()
    for seed in range(3):
        order = make_order({"sizes": sizes, "batch_size": 4, "seed": seed}, resize)
        per_epoch = math.ceil(order.batches_per_epoch)
        for epoch in range(3):
            ks = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            firsts.add(tuple(draw.index for k in ks for draw in order.micro_batch(k)))
    assert len(firsts) == 9


def test_the_order_stays_what_it_was():
    """A run that is resumed after an update of this library or of numpy must find its place again."""
    for resize, expected in ORDER_OF_TODAY.items():
        order = make_order({"sizes": [(40 + i, 80) for i in range(50)], "batch_size": 3, "seed": 5}, resize)
        draws = [draw.index for k in range(40) for draw in order.micro_batch(k)]
        assert hashlib.sha256(json.dumps(draws).encode()).hexdigest()[:16] == expected, draws[:10]
    assert sample_rng(3, 1000).random() == RANDOM_OF_TODAY


ORDER_OF_TODAY = {"crop": "dec66a626a8e82a0", "buckets": "f08729be986d373a"}
RANDOM_OF_TODAY = 0.21725560384523068


def test_samples_of_a_run_have_random_numbers_of_their_own():
    assert len({sample_rng(seed, number).random() for seed in range(20) for number in range(200)}) == 4000
    assert sample_rng(1, 2).random() == sample_rng(1, 2).random()


def test_an_order_of_a_source_reads_sizes_only_for_buckets(tmp_path):
    source = open_source(folder_beside(tmp_path))
    sizes = [source.size(i) for i in range(len(source))]
    data = settings(resize="buckets", bucket_step=8)
    assert Order.of(source, data, 2, 0).micro_batch(3) == Order(sizes, data, 2, 0).micro_batch(3)
    assert dict(targets(source, data)) == {i: bucket_of(s, buckets(32, 8, 2.0)) for i, s in enumerate(sizes)}
    source.size = None  # would fail
    assert Order.of(source, settings(), 2, 0).micro_batch(3) == Order(sizes, settings(), 2, 0).micro_batch(3)
    assert dict(targets(source, settings())) == dict.fromkeys(range(len(source)), (32, 32))


def test_orders_of_nothing_are_refused():
    for case in ({"sizes": [], "batch_size": 1, "seed": 0}, {"sizes": [(8, 8)], "batch_size": 0, "seed": 0}):
        with pytest.raises(ValueError, match="Order needs"):
            make_order(case, "crop")
    with pytest.raises(ValueError, match="k=-1"):
        make_order({"sizes": [(8, 8)], "batch_size": 1, "seed": 0}, "crop").micro_batch(-1)


# ------------------------------------------------------------------------------------------------------------ loader


def run(data, *, first=0, count=6, rank=0, world=1, batch_size=2, seed=0, **caches):
    source = open_source(data)
    order = Order.of(source, data, batch_size, seed)
    return list(loader(source, order, data, first=first, count=count, rank=rank, world=world, seed=seed, **caches))


def assert_equal_batches(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, dict):
                assert_equal_batches([value], [other[name]])
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


@pytest.fixture(params=["crop", "squash", "buckets"])
def folder(request, tmp_path):
    chosen = {"resize": request.param, "bucket_step": 8, "random_flip": True, "caption_drop": 0.3}
    return folder_beside(tmp_path).model_copy(update={**chosen, "random_crop": request.param != "squash"})


def test_a_batch_holds_what_a_training_step_needs(folder, tmp_path):
    source = open_source(folder)
    order = Order.of(source, folder, 2, 0)
    for k, batch in enumerate(run(folder)):
        draws = order.micro_batch(k)
        target = draws[0].target
        assert set(batch) == {"number", "pixels", "caption", "original_size", "crop", "target_size"}
        assert batch["number"].tolist() == [draw.number for draw in draws] == [2 * k, 2 * k + 1]
        assert (batch["pixels"].shape, batch["pixels"].dtype) == ((2, 3, *target), torch.float32)
        assert batch["original_size"].tolist() == [list(source.size(draw.index)) for draw in draws]
        assert batch["target_size"].tolist() == [list(target)] * 2
        assert {batch[name].dtype for name in ("number", "original_size", "crop", "target_size")} == {torch.int64}
        for j, draw in enumerate(draws):
            rng = sample_rng(0, draw.number)
            caption = "" if rng.random() < 0.3 else source.caption(draw.index)
            options = {
                name: getattr(folder, name) for name in ("resize", "interpolation", "random_crop", "random_flip")
            }
            pixels, crop = prepare_image(source.image(draw.index), target, rng=rng, **options)
            assert torch.equal(batch["pixels"][j], pixels)
            assert batch["crop"][j].tolist() == list(crop)
            assert batch["caption"][j] == caption


def test_a_run_that_stops_goes_on_where_it_was(folder):
    whole = run(folder, count=9)
    assert_equal_batches(whole[4:], run(folder, first=4, count=5))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(folder, world):
    alone = run(folder, count=2 * world)
    shared = [run(folder, count=2, rank=rank, world=world) for rank in range(world)]
    assert_equal_batches(alone, [shared[rank][step] for step in range(2) for rank in range(world)])
    assert_equal_batches(alone[world + 1 : world + 2], run(folder, first=1, count=1, rank=1, world=world))


@pytest.mark.parametrize("make", [folder_beside, tar_text, arrow], ids=lambda make: make.__name__)
def test_workers_change_nothing(make, tmp_path):
    data = make(tmp_path).model_copy(update={"random_flip": True, "random_crop": True, "caption_drop": 0.3})
    assert_equal_batches(run(data, count=6), run(data.model_copy(update={"workers": 2}), count=6))


def test_workers_that_are_spawned_can_be_sent_all_of_it(folder, tmp_path):
    source = open_source(folder)
    made = loader(
        source, Order.of(source, folder, 2, 0), folder, first=0, count=3, text_cache=filled(tmp_path, folder)[0]
    )
    sent = pickle.loads(pickle.dumps(made.dataset))
    assert_equal_batches([sent[k] for k in range(3)], list(made))


def test_a_loader_leaves_the_random_numbers_of_the_run_alone(folder):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(folder)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_a_loader_can_be_gone_through_twice_and_knows_its_length(tmp_path):
    data = folder_beside(tmp_path)
    source = open_source(data)
    made = loader(source, Order.of(source, data, 2, 0), data, first=1, count=3)
    assert len(made) == 3
    assert_equal_batches(list(made), list(made))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_its_sample(tmp_path, workers):
    data = folder_beside(tmp_path).model_copy(update={"workers": workers})
    (tmp_path / "b.png").write_bytes(TRUNCATED)
    with pytest.raises(DataError, match=r"sample 'b\.png'.*expected a readable image"):
        run(data)


def test_captions_are_dropped_as_often_as_asked(tmp_path):
    data = folder_beside(tmp_path)
    dropped = {}
    for rate in (0.0, 0.25, 1.0):
        batches = run(data.model_copy(update={"caption_drop": rate}), count=20, batch_size=10)
        dropped[rate] = sum(caption == "" for batch in batches for caption in batch["caption"])
    assert (dropped[0.0], dropped[1.0]) == (0, 200)
    assert abs(dropped[0.25] - 50) < 5 * math.sqrt(200 * 0.25 * 0.75)


def test_an_option_does_not_change_what_another_draws(tmp_path):
    data = folder_beside(tmp_path).model_copy(update={"random_crop": True})
    plain = run(data)
    dropping = run(data.model_copy(update={"caption_drop": 0.5}))
    for one, other in zip(plain, dropping, strict=True):
        assert torch.equal(one["pixels"], other["pixels"])


@pytest.mark.parametrize(
    "wrong", [{"rank": 2, "world": 2}, {"rank": -1}, {"first": -1}, {"count": -1}], ids=lambda wrong: str(wrong)
)
def test_wrong_positions_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="loader needs 0 <= rank < world"):
        run(folder_beside(tmp_path), **wrong)


# ------------------------------------------------------------------------------------------------------------- cache


def filled(root, data):
    """A text and a latent cache with an entry of its own for whatever can be asked."""
    source = open_source(data)
    texts, latents = Cache(root / "cache", {"what": "text"}), Cache(root / "cache", {"what": "latents"})
    for number, caption in enumerate(captions(source, data)):
        texts.put(caption, {"states": torch.full((4, 6), float(number)), "pooled": torch.full((6,), float(number))})
    for index, target in targets(source, data):
        shape = (4, target[0] // 8, target[1] // 8)
        entry = {"mean": torch.full(shape, float(index)), "std": torch.full(shape, index + 0.5)}
        latents.put(latent_key(source, index, target, data), entry)
    return texts, latents


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", ["crop", "squash", "buckets"])
def test_caches_take_the_place_of_pixels_and_add_conditions(tmp_path, resize, workers):
    changes = {"resize": resize, "bucket_step": 8, "caption_drop": 0.5, "workers": workers}
    data = folder_beside(tmp_path / "pictures").model_copy(update=changes)
    texts, latents = filled(tmp_path, data)
    source = open_source(data)
    order = Order.of(source, data, 3, 0)
    numbers = {caption: number for number, caption in enumerate(captions(source, data))}
    assert "" in numbers
    plain = run(data, batch_size=3)
    cached = run(data, batch_size=3, text_cache=texts, latent_cache=latents)
    for k, (batch, other) in enumerate(zip(cached, plain, strict=True)):
        indices = [draw.index for draw in order.micro_batch(k)]
        height, width = order.micro_batch(k)[0].target
        assert "pixels" not in batch
        assert batch["latent_mean"].shape == (3, 4, height // 8, width // 8)
        assert batch["latent_mean"][:, 0, 0, 0].tolist() == indices
        assert batch["latent_std"][:, 0, 0, 0].tolist() == [index + 0.5 for index in indices]
        assert batch["condition"]["states"].shape == (3, 4, 6)
        assert batch["condition"]["pooled"][:, 0].tolist() == [numbers[caption] for caption in batch["caption"]]
        assert_equal_batches(
            [{name: batch[name] for name in other if name != "pixels"}],
            [{name: value for name, value in other.items() if name != "pixels"}],
        )


def test_captions_are_asked_for_once_each_and_the_empty_one_if_some_are_dropped(tmp_path):
    files = {f"{n}.png": PNG for n in range(4)} | {f"{n}.txt": text for n, text in enumerate(["a", "b", "a", "c"])}
    source = image_folder(tmp_path, files)
    assert list(captions(source, settings())) == ["a", "b", "c"]
    assert sorted(captions(source, settings(caption_drop=0.1))) == ["", "a", "b", "c"]


def test_what_a_cache_lacks_is_named(tmp_path):
    data = folder_beside(tmp_path / "pictures")
    for name in ("text_cache", "latent_cache"):
        with pytest.raises(DataError, match=r"sample '.*': expected an entry .* in the (text|latent) cache .*empty"):
            run(data, **{name: Cache(tmp_path / "empty", {})})


@pytest.mark.parametrize("option", ["random_crop", "random_flip"])
def test_cached_latents_and_random_pictures_exclude_each_other(tmp_path, option):
    data = folder_beside(tmp_path).model_copy(update={option: True})
    with pytest.raises(ValueError, match="latent_cache needs"):
        run(data, latent_cache=Cache(tmp_path, {}))


def test_entries_of_different_shapes_in_a_batch_are_refused(tmp_path):
    data = folder_beside(tmp_path / "pictures")
    texts = Cache(tmp_path / "cache", {})
    for length, caption in enumerate(CAPTIONS.values(), start=1):
        texts.put(caption, {"states": torch.zeros(length, 2)})
    with pytest.raises(DataError, match=r"'states' of one shape"):
        run(data, text_cache=texts)


ENTRY = {"half": torch.randn(3, 4).half(), "view": torch.arange(12.0).view(3, 4).T, "integers": torch.tensor([1, 2])}


def test_what_is_put_in_comes_out(tmp_path):
    cache = Cache(tmp_path / "not" / "yet", {"model": "m", "sizes": [1, 2]})
    assert cache.get("a") is None
    assert "a" not in cache
    shared = torch.arange(6.0)
    entry = {**ENTRY, "one": shared[:3], "other": shared[3:], "both": shared}
    cache.put("a", entry)
    cache.put("", {"empty": torch.zeros(0, 3)})
    found = cache.get("a")
    assert found.keys() == entry.keys()
    for name, tensor in entry.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert cache.get("")["empty"].shape == (0, 3)
    assert cache.missing(["b", "a", "", "b", "c"]) == ["b", "c"]


def test_other_settings_never_find_an_entry(tmp_path):
    first = Cache(tmp_path, {"model": "m", "resolution": 512})
    first.put("a", ENTRY)
    assert "a" in Cache(tmp_path, {"resolution": 512, "model": "m"}), "the order of a dictionary means nothing"
    for other in ({"model": "n", "resolution": 512}, {"model": "m", "resolution": 513}, {"model": "m"}, {}):
        assert Cache(tmp_path, other).get("a") is None
        assert "a" not in Cache(tmp_path, other)
    with pytest.raises(TypeError, match="fingerprint"):
        Cache(tmp_path, {"model": object()})


def test_keys_and_fingerprints_do_not_run_into_each_other(tmp_path):
    paths = {Cache(tmp_path, {"a": one}).path(two) for one in ("", "x", 'x"}') for two in ("", "x", '", "x')}
    assert len(paths) == 9
    assert all(len(path.parent.name) == 2 for path in paths)


def test_a_file_that_is_not_whole_is_named_not_used(tmp_path):
    cache = Cache(tmp_path, {})
    cache.put("a", ENTRY)
    content = cache.path("a").read_bytes()
    for broken in (b"", content[:5], content[:-1], content[: len(content) // 2], b"\xff" * len(content)):
        cache.path("a").write_bytes(broken)
        with pytest.raises(CacheError, match="expected a whole safetensors file") as caught:
            cache.get("a")
        assert str(cache.path("a")) in str(caught.value)
    cache.put("a", ENTRY)
    assert torch.equal(cache.get("a")["half"], ENTRY["half"])


def test_an_entry_appears_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = Cache(tmp_path, {})
    cache.put("a", {"x": torch.zeros(3)})

    def dies(*args):
        raise KeyboardInterrupt

    for broken in ("replace", "write"):
        with monkeypatch.context() as patch:
            if broken == "replace":
                patch.setattr(os, "replace", dies)
            else:
                patch.setattr(
                    type(tmp_path), "write_bytes", lambda path, content: path.open("wb").write(content[:9]) and dies()
                )
            with pytest.raises(KeyboardInterrupt):
                cache.put("a", {"x": torch.ones(3)})
            with pytest.raises(KeyboardInterrupt):
                cache.put("b", {"x": torch.ones(3)})
        assert torch.equal(cache.get("a")["x"], torch.zeros(3))
        assert cache.get("b") is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path("a")], "nothing is left behind"


def _write_often(cache, value):
    for _ in range(50):
        cache.put("a", {"x": torch.full((1000,), float(value))})


def test_several_processes_may_write_one_entry(tmp_path):
    cache = Cache(tmp_path, {})
    context = torch.multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    writers = [context.Process(target=_write_often, args=(cache, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if entry := cache.get("a"):
            assert (entry["x"] == entry["x"][0]).all()
            seen.add(float(entry["x"][0]))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert float(cache.get("a")["x"][0]) in (1.0, 2.0)
    assert seen <= {1.0, 2.0}
