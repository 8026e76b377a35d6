"""Which samples `data.filters` leaves, from all three kinds of sources; that a filtered run is one on these alone."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='training needs the extra: pip install "linattn[train]"')
pytest.importorskip("datasets", reason='training needs the extra: pip install "linattn[train]"')

import io
import tarfile

from PIL import Image

from linattn.distill import recipe
from linattn.distill.data import DataError, LargeEnough, Order, loader, open_source

NAN = float("nan")
#: What stands beside each picture, besides its caption.
RECORDS = {
    "a": {"score": 6.5, "language": "en", "adult": False, "width": 64},
    "b": {"score": 5.9, "language": "en", "adult": False, "width": 32},
    "c": {"score": 6, "language": "de", "adult": True, "width": 64},  # a whole number is one
    "d": {"language": "en", "adult": False, "width": 64},
    "e": {"score": None, "language": "fr", "width": 64},
    "f": {"score": 7.5, "language": "en", "adult": False, "width": 16},
}
SOURCES = ("table", "json", "webdataset", "datasets")


def picture(name):
    side = RECORDS[name]["width"]
    return Image.fromarray(np.random.default_rng(ord(name)).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(name):
    file = io.BytesIO()
    picture(name).save(file, format="png")
    return file.getvalue()


def write(kind, root, records=RECORDS):
    """The records as a data set of a kind; what `data` says of it."""
    root.mkdir(parents=True, exist_ok=True)
    if kind in ("table", "json"):
        for name, record in records.items():
            (root / f"{name}.png").write_bytes(encoded(name))
            if kind == "json":
                (root / f"{name}.json").write_text(json.dumps({"prompt": f"a {name}"} | record))
        if kind == "table":
            lines = [json.dumps({"file_name": f"{n}.png", "text": f"a {n}"} | r) for n, r in records.items()]
            (root / "metadata.jsonl").write_text("\n".join(lines))
        return {"kind": "images", "path": str(root)}
    if kind == "webdataset":
        halves = list(records)[:2], list(records)[2:]
        for number, names in enumerate(halves):
            with tarfile.open(root / f"{number}.tar", "w") as tar:
                for name in names:
                    for suffix, content in (
                        ("png", encoded(name)),
                        ("json", json.dumps({"caption": f"a {name}"} | records[name]).encode()),
                    ):
                        member = tarfile.TarInfo(f"{name}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        return {"kind": "webdataset", "path": str(root)}
    from datasets import Dataset

    columns = sorted({key for record in records.values() for key in record})
    rows = {key: [record.get(key) for record in records.values()] for key in columns}
    images = [{"bytes": encoded(name), "path": None} for name in records]
    Dataset.from_dict({"image": images, "text": [f"a {name}" for name in records]} | rows).save_to_disk(root)
    return {"kind": "datasets", "path": str(root)}


def settings(where, **filters):
    return recipe.Data(**where, resolution=32, workers=0, filters=filters)


def kept(where, **filters):
    """First letters of the samples that are left."""
    source = open_source(settings(where, **filters))
    return "".join(source.caption(index)[-1] for index in range(len(source)))


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("filters")
    return {kind: write(kind, root / kind) for kind in SOURCES}


@pytest.fixture(params=SOURCES)
def where(request, data_sets):
    return data_sets[request.param]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "abcdef"),
        ({"at_least": {"score": 6.0}, "missing": "drop"}, "acf"),
        ({"at_least": {"score": 6.0}, "missing": "keep"}, "acdef"),
        ({"at_least": {"score": 6.0}, "at_most": {"score": 7.0}, "missing": "drop"}, "ac"),
        ({"at_most": {"score": 5.9}, "missing": "keep"}, "bde"),
        ({"require": ["score"]}, "abcf"),
        ({"require": ["score"], "at_least": {"score": 6.0}}, "acf"),  # and none is lacking then
        ({"require": ["adult", "score"], "one_of": {"language": ["en", "fr"]}}, "abf"),
        ({"one_of": {"language": ["de", "fr"]}}, "ce"),
        ({"one_of": {"adult": [False]}, "missing": "drop"}, "abdf"),
        ({"one_of": {"width": [64]}}, "acde"),
        ({"one_of": {"width": [64.0, 16]}}, "acdef"),
    ],
)
def test_samples_are_kept_by_what_stands_beside_them_from_every_source(where, filters, expected):
    assert kept(where, **filters) == expected


def test_a_sample_without_the_key_is_an_error_by_name_unless_it_is_said_what_becomes_of_it(where):
    name = {"images": "d.png", "webdataset": "1.tar/d", "datasets": "row 3"}[where["kind"]]
    with pytest.raises(
        DataError, match=f"^{name}: expected 'score' beside the picture .*at_least.*missing: keep or dr"
    ):
        kept(where, at_least={"score": 6.0})


def test_what_is_passed_over_is_counted_aloud_by_its_reason(where, caplog):
    with caplog.at_level(logging.WARNING):
        kept(where, at_least={"score": 6.0}, missing="drop")
    (record,) = [r for r in caplog.records if "data.filters" in r.message]
    assert "3 of 6 samples are passed over: 2 without 'score', 1 with 'score' below 6" in record.message
    caplog.clear()
    kept(where, at_most={"width": 64})
    assert not caplog.records


def test_nan_is_no_value(tmp_path):
    records = {"a": {"width": 64, "score": NAN}, "b": {"width": 64, "score": 6.0}}
    for kind in SOURCES:
        assert kept(write(kind, tmp_path / kind, records), at_least={"score": 5.0}, missing="keep") == "ab"
        assert kept(write(kind, tmp_path / kind, records), at_most={"score": 7.0}, missing="drop") == "b"


def test_a_key_that_no_sample_has_is_refused_even_where_missing_ones_are_kept(where):
    """It is misspelt."""
    with pytest.raises(DataError, match=r"data\.filters: expected 'aesthetics' beside .* none of the 6 samples has it"):
        kept(where, at_least={"aesthetics": 6.0, "score": 6.0}, missing="keep")


def test_filters_that_leave_nothing_are_refused(where):
    with pytest.raises(
        DataError, match="expected to leave samples, and all 6 are passed over: 6 with 'width' below 65"
    ):
        kept(where, at_least={"width": 65})


def test_what_cannot_be_compared_names_the_sample(where):
    with pytest.raises(DataError, match=r"expected a number under 'language' \(data\.filters\.at_least\), got 'en'"):
        kept(where, at_least={"language": 6.0})
    with pytest.raises(DataError, match=r"expected a number under 'adult' .*at_most\), got False"):
        kept(where, at_most={"adult": 6.0})


@pytest.mark.parametrize("kind", SOURCES)
def test_a_filtered_run_is_a_run_on_what_is_left(kind, data_sets, tmp_path):
    """The same numbers, pictures and captions, from any micro batch on, in a worker or here."""
    left = {name: RECORDS[name] for name in "acf"}
    alone = settings(write(kind, tmp_path / "left", left))
    filtered = settings(data_sets[kind], at_least={"score": 6.0}, missing="drop")
    runs = []
    for data in (alone, filtered):
        data = data.model_copy(update={"random_crop": True, "random_flip": True})
        source = pickle.loads(pickle.dumps(open_source(data)))
        order = Order.of(source, data, batch_size=2, seed=5)
        runs.append(list(loader(source, order, data, first=0, count=6, seed=5)))
        resumed = list(loader(source, order, data, first=4, count=2, seed=5))
        for one, other in zip(runs[-1][4:], resumed, strict=True):
            assert torch.equal(one["pixels"], other["pixels"]) and one["caption"] == other["caption"]
    for one, other in zip(*runs, strict=True):
        assert one["caption"] == other["caption"] and torch.equal(one["number"], other["number"])
        assert torch.equal(one["pixels"], other["pixels"]) and torch.equal(one["crop"], other["crop"])


def test_filters_go_before_sizes_and_need_no_captions(tmp_path):
    """As runs without captions have them (Inf-DiT)."""
    for kind in SOURCES:
        data = settings(write(kind, tmp_path / kind), at_least={"score": 6.0}, missing="drop")
        source = open_source(data, captions=False)
        assert len(source) == 3 and len(LargeEnough(source, 32)) == 2
        assert [dict(values) for values in LargeEnough(source, 32).values(["score"])] == [{"score": 6.5}, {"score": 6}]


def test_pictures_without_json_lack_every_key(tmp_path):
    where = write("json", tmp_path / "some")
    for name in "bf":
        (tmp_path / "some" / f"{name}.json").unlink()
        (tmp_path / "some" / f"{name}.txt").write_text(f"a {name}")
    assert kept(where, at_least={"score": 6.0}, missing="drop") == "ac"
    assert kept(where, at_least={"score": 6.0}, missing="keep") == "abcdef"


@pytest.mark.parametrize(
    ("filters", "line"),
    [
        ({"at_least": {"score": "high"}}, "data.filters.at_least.score: expected a number, got 'high'"),
        ({"missing": "ignore"}, "data.filters.missing: expected 'keep', 'drop' or 'error', got 'ignore'"),
        (
            {"one_of": {"language": "en"}},
            "data.filters.one_of.language: expected a list of texts, numbers, true or fal",
        ),
        ({"one_of": {"language": []}}, "data.filters.one_of.language: expected at least one value, got []"),
        ({"atleast": {"score": 6}}, "data.filters.atleast: unknown key; did you mean 'data.filters.at_least'?"),
        (
            {"at_least": {"score": 7}, "at_most": {"score": 6}},
            "data.filters.at_least.score: expected at most data.filters.at_most.score (6.0), got 7.0",
        ),
    ],
)
def test_what_is_wrong_with_filters_is_told_by_key(filters, line):
    overrides = [f"data.filters={json.dumps(filters)}"]
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load("linfusion_sd15", overrides)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems


def test_filters_can_be_set_from_the_command_line_and_are_written_back():
    made = recipe.load("linfusion_sd15", ["data.filters.at_least.aesthetic_score=6", "data.filters.missing=drop"])
    assert made.data.filters.at_least == {"aesthetic_score": 6.0} and made.data.filters.keys == ("aesthetic_score",)
    assert "aesthetic_score: 6" in made.to_yaml()
    other = recipe.load("linfusion_sd15", ["data.filters.missing=drop"])
    assert list(made.differences(other)) == ["data.filters.at_least.aesthetic_score"]
