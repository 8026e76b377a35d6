"""`linattn demo`: the registry of parts, the command, and the quick form of every part for real."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image

from linattn import demos
from linattn.bundled import canvases
from linattn.cli import demo
from linattn.demos import _layout


class TestRegistry:
    def test_parts_are_the_modules_of_the_folder(self):
        assert "stable_diffusion" in demos.parts()
        for name, part in demos.parts().items():
            assert name == part.NAME and part.SUMMARY and "\n" not in part.SUMMARY
            assert demos.missing(part) == []

    def test_a_new_file_is_a_new_part(self, monkeypatch, tmp_path):
        (tmp_path / "extra_part.py").write_text(
            'NAME, SUMMARY, REQUIRES = "extra", "more", ("no_such_module", "json")\n'
            "def run(out, *, quick, report):\n    return []\n"
        )
        monkeypatch.setattr(demos, "__path__", [str(tmp_path)])
        assert list(demos.parts()) == ["extra"]
        assert demos.missing(demos.parts()["extra"]) == ["no_such_module"]

    def test_a_file_that_is_no_part_says_what_it_lacks(self, monkeypatch, tmp_path):
        (tmp_path / "half_part.py").write_text('NAME = "half"\ndef run(out, *, quick, report):\n    return []\n')
        monkeypatch.setattr(demos, "__path__", [str(tmp_path)])
        with pytest.raises(TypeError, match=r"half_part: .* SUMMARY, REQUIRES"):
            demos.parts()


class TestCommand:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        # The command sets these for its process, which is the test's here.
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            monkeypatch.setenv(name, os.environ.get(name, "1" if name == "HF_HUB_OFFLINE" else "error"))

    @pytest.fixture
    def part(self, monkeypatch):
        """A part that notes how it was called."""
        calls = []

        def run(out, *, quick, report):
            calls.append((out, quick))
            report("at work")
            return [out / "picture.png"]

        fake = SimpleNamespace(NAME="fake", SUMMARY="a stand-in", REQUIRES=("json",), run=run, calls=calls)
        monkeypatch.setattr(demos, "parts", lambda: {"fake": fake})
        return fake

    def test_runs_the_part_into_a_new_folder(self, part, tmp_path, capsys):
        out = tmp_path / "new" / "folder"
        assert demo.run(SimpleNamespace(out=out, part=None, quick=True)) == 0
        assert part.calls == [(out, True)] and out.is_dir()
        said = capsys.readouterr().out
        assert "at work" in said and str(out / "picture.png") in said

    def test_a_folder_that_cannot_be_made_is_one_clear_line(self, part, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert demo.run(SimpleNamespace(out=tmp_path / "file" / "sub", part=None, quick=True)) == 1
        error = capsys.readouterr().err
        assert "cannot write to" in error and "--out" in error and error.count("\n") == 1
        assert part.calls == []

    def test_a_missing_package_is_named_with_its_extra(self, part, tmp_path, capsys):
        part.REQUIRES = ("json", "no_such_module")
        assert demo.run(SimpleNamespace(out=tmp_path, part=["fake"], quick=True)) == 1
        assert "fake needs no_such_module: pip install 'linattn[demo]'" in capsys.readouterr().err
        assert part.calls == []


class TestLayout:
    def test_table_aligns_names_left_and_numbers_right(self):
        assert _layout.table(["op", "ms"], [["linear", "1.5"], ["sdpa", "12.25"]]).splitlines() == [
            "op         ms",
            "------  -----",
            "linear    1.5",
            "sdpa    12.25",
        ]

    def test_sheet_shows_every_picture_enlarged_in_its_place(self):
        colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
        cells = [[Image.new("RGB", (8, 8), colour) for colour in cell] for cell in colours]
        columns = [_layout.Column("one", ["note"]), _layout.Column("two", [])]
        sheet = _layout.sheet("title", columns, [("row", cells)], zoom=4)
        found = {colour: count for count, colour in sheet.getcolors(1 << 20)}
        assert [found[colour] for cell in colours for colour in cell] == [32 * 32] * 4


def test_prompts_that_are_said_to_be_unseen_are_held_out():
    from linattn.demos import _comparison

    unseen = {
        canvases.caption(order)
        for n in (2, 3, 4)
        for order in itertools.product(range(10), repeat=n)
        if canvases.held_out(order)
    }
    assert set(_comparison.PROMPTS[:3]) <= unseen
    assert not set(_comparison.PROMPTS[3:]) & unseen


@pytest.mark.parametrize(
    ("part", "model", "control", "adapter"),
    [
        ("stable_diffusion", "tiny_sd", "zeroed", "LinFusion.construct_for(pipe)"),
        ("flux", "tiny_flux", "alone", "CLEAR.construct_for("),
    ],
    ids=["stable_diffusion", "flux"],
)
def test_quick_demo_draws_scores_and_measures_all_sides(tmp_path, part, model, control, adapter):
    command = [sys.executable, "-m", "linattn", "demo", "--quick", "--part", part, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / f"{part}.json").read_text())
    assert figures["backend"] in ("cpu", "reference") and f"backend {figures['backend']!r}" in done.stdout
    variants = figures["scores"]["variants"]
    assert list(variants) == ["teacher", control, "before", "after"]
    assert variants["teacher"]["summary"]["error"] is None
    assert all(variants[name]["summary"]["error"][0] > 0 for name in (control, "before", "after"))
    assert figures["unmounting_restores_the_pictures"] is True
    pixels_per_token, text = (8, 0) if part == "stable_diffusion" else (16, 16)
    tokens = (canvases.RESOLUTION // pixels_per_token) ** 2 + text
    assert max(row["tokens"] for row in figures["layers"]) == tokens
    assert all(row["teacher_seconds"] > 0 and row["after_seconds"] > 0 for row in figures["layers"])
    assert adapter in done.stdout and f"linattn eval --model {model}" in done.stdout

    picture = Image.open(tmp_path / f"{part}.png").convert("RGB")
    assert picture.width > 600 and picture.height > 300
    assert len(picture.getcolors(1 << 24)) > 100  # more than labels on paper
