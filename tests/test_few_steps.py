"""Few-step students of the bundled model: loaded, scored in pairs, and what the recorded rows of the table claim."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from linattn import bundled, delta_weights, few_steps
from linattn.schedulers import PeRFlowScheduler

ROOT = pathlib.Path(__file__).parents[1]


def record(exact: str, distance: float = 0.03, **changes) -> dict:
    """Scores of one set of held-out orders."""
    n = len(exact)
    value = exact.count("1") / n
    rng = np.random.default_rng(n)
    made = {
        "format": few_steps.FORMAT,
        "row": "perflow",
        "title": "PeRFlow",
        "beside": "ddim_4",
        "training": {"seed": 0, "cpu_seconds": 300},
        "steps": 4,
        "guidance": 1.0,
        "network_calls": 4,
        "settings": {"n": n, "digits": [2, 3], "seed": 8, "batch": 20},
        "exact": {"2 digits": exact, "seen": "1" * n},
        "held_out": ["2 digits"],
        "summary": {
            "exact": {"held out": [value, value, value]},
            "canvas_distance": [distance, distance - 0.01, distance + 0.01],
        },
        "canvas_distance_resampled": list(distance + 0.002 * rng.standard_normal(50)),
        "cpu_seconds": [0.06, 0.05, 0.07],
        "device": "a processor",
        "date": "2026-11-22",
        "versions": {"torch": "2"},
    }
    return made | changes


PLAIN = {"row": "ddim_4", "title": "teacher, DDIM", "beside": None, "training": None, "guidance": 2.5}


class TestScores:
    def test_gain_is_paired_so_that_what_is_hard_for_both_does_not_count(self):
        plain, better = record("0101" * 25), record("0111" * 25)
        value, low, high = few_steps.gain(better, plain)
        assert value == pytest.approx(0.25) and 0.15 < low < high < 0.35
        assert few_steps.gain(plain, plain) == (0, 0, 0)

    def test_gain_of_several_students_is_that_of_their_mean(self):
        plain = record("0000" * 25)
        assert few_steps.gain([record("0011" * 25), record("0000" * 25)], plain).value == pytest.approx(0.25)

    def test_a_smaller_distance_is_a_gain(self):
        value, low, high = few_steps.distance_gain(record("01" * 50, 0.02), record("01" * 50, 0.03))
        assert value == pytest.approx(0.01) and low <= value <= high

    def test_of_two_sizes_what_both_drew_is_compared(self):
        small, large = record("1111"), record("0011" + "0" * 96)
        assert few_steps.gain(small, large).value == few_steps.gain(small, record("0011")).value == 0.5
        with pytest.raises(ValueError, match="same orders"):
            few_steps.distance_gain(small, large)

    @pytest.mark.parametrize("key, other", [("seed", 9), ("digits", [3])])
    def test_other_orders_or_seeds_cannot_be_paired(self, key, other):
        one = record("01" * 50)
        with pytest.raises(ValueError, match=f"same orders and seeds.*{other}".replace("[", r"\[")):
            few_steps.gain(one | {"settings": one["settings"] | {key: other}}, one)

    def test_only_held_out_orders_count(self):
        assert few_steps.exact(record("0010")).tolist() == [0, 0, 1, 0]

    def test_guidance_doubles_the_calls_of_the_network(self):
        assert few_steps.Way(None, 4, 2.5).network_calls == 8
        assert few_steps.Way(None, 4, 1.0).network_calls == 4


@pytest.fixture(scope="module")
def changed() -> dict:
    """A delta of the bundled UNet."""
    rng = torch.Generator().manual_seed(0)
    unet = few_steps.teacher(steps=1).pipe.unet
    return {key: 0.01 * torch.randn(value.shape, generator=rng) for key, value in unet.state_dict().items()}


class TestStudents:
    def test_a_student_is_the_teacher_and_its_delta_with_its_own_scheduler(self, tmp_path, changed):
        delta_weights.save(changed, tmp_path)
        PeRFlowScheduler(prediction_type="velocity", num_time_windows=2).save_pretrained(tmp_path / "scheduler")
        way, plain = few_steps.student(tmp_path, steps=2), few_steps.teacher(steps=2)
        before = plain.pipe.unet.state_dict()
        for key, value in way.pipe.unet.state_dict().items():
            torch.testing.assert_close(value, before[key] + changed[key])
        assert type(way.pipe.scheduler) is PeRFlowScheduler and way.pipe.scheduler.config.num_time_windows == 2
        assert way.arguments == {} and way.network_calls == 2

    def test_a_student_with_linear_attention_has_its_adapter_and_the_delta_of_the_rest(self, tmp_path, changed):
        import shutil

        shutil.copytree(bundled.path("tiny_sd_linfusion"), tmp_path / "adapter")
        rest = {key: value for key, value in changed.items() if ".attn1." not in key}
        delta_weights.save(rest, tmp_path)
        PeRFlowScheduler(prediction_type="velocity").save_pretrained(tmp_path / "scheduler")
        unet = few_steps.student(tmp_path, steps=4).pipe.unet
        before = few_steps.teacher(steps=4).pipe.unet.state_dict()
        torch.testing.assert_close(unet.conv_in.weight, before["conv_in.weight"] + rest["conv_in.weight"])
        assert any(type(module).__module__.startswith("linattn") for module in unet.modules())

    def test_a_flash_student_starts_at_the_levels_of_its_training(self, tmp_path, changed):
        from diffusers import LCMScheduler

        delta_weights.save({key: 0 * value for key, value in changed.items()}, tmp_path)
        config = few_steps.teacher(steps=1).pipe.scheduler.config
        LCMScheduler.from_config(config, clip_sample=False).save_pretrained(tmp_path / "scheduler")
        way = few_steps.student(tmp_path, steps=4)
        assert way.arguments["timesteps"] == [999, 749, 499, 249]
        seen = []
        way.pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1])))
        found = few_steps.score(way, n=2, lengths=(2,), batch=3)
        assert seen[:4] == [999, 749, 499, 249]
        assert found["exact"].keys() == {"2 digits", "seen"} and found["held_out"] == ["2 digits"]
        assert found["network_calls"] == 4 and found["cpu_seconds"][0] > 0

    def test_a_folder_without_a_scheduler_is_no_student(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a few-step student"):
            few_steps.student(tmp_path, steps=4)

    def test_spacing_chooses_where_ddim_begins(self):
        way = few_steps.teacher(steps=4, spacing="trailing")
        way.pipe.scheduler.set_timesteps(4)
        assert way.pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the script sets them for itself; here they are taken back afterwards
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    spec = importlib.util.spec_from_file_location("few_steps_example", ROOT / "examples" / "few_steps.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class TestRows:
    def test_every_student_has_a_recipe_that_loads_and_a_row_of_as_many_steps_beside_it(self, script, tmp_path):
        recipe = pytest.importorskip("linattn.distill.recipe")
        for row in script.ROWS.values():
            if row.recipe is None:
                continue
            command = script.command_of(row, 3, tmp_path, tmp_path / "run")
            found = recipe.load(command[2], command[4::2])
            assert found.training.seed == 3 and found.output.folder == str(tmp_path / "run")
            assert (found.student.adapter is not None) == row.linear
            beside = script.ROWS[row.beside]
            assert beside.recipe is None and beside.steps == row.steps and beside.guidance > 1

    def test_a_student_is_trained_once_and_scored_beside_the_teacher(self, script, tmp_path, monkeypatch, capsys):
        def distilled(command, environment):
            if command[-1] == "--prepare":
                return 7.0
            folder = pathlib.Path(next(word for word in command if word.startswith("output.folder=")).partition("=")[2])
            zero = {key: 0 * value for key, value in few_steps.teacher(steps=1).pipe.unet.state_dict().items()}
            delta_weights.save(zero, folder / "final")
            PeRFlowScheduler(prediction_type="velocity", num_time_windows=2).save_pretrained(
                folder / "final" / "scheduler"
            )
            return 100.0

        calls = []
        monkeypatch.setattr(script, "_cpu_seconds", lambda *a: calls.append(a) or distilled(*a))
        monkeypatch.setattr(script.canvases, "write_folder", lambda *a, **k: None)
        options = ["--n", "2", "--digits", "2", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())]
        assert script.main(["ddim_2", *options]) == 0
        for _ in range(2):
            assert script.main(["perflow_2", "--seed", "5", *options, "--bundle", str(tmp_path / "shipped")]) == 0
        assert len(calls) == 2  # prepared and trained, once
        said = capsys.readouterr().out
        assert "exact above ddim_2: " in said
        found = json.loads((tmp_path / "perflow_2-5.json").read_text())
        assert found["training"]["cpu_seconds"] == 100 and found["training"]["seed"] == 5
        assert found["command"].startswith("python examples/few_steps.py perflow_2 --seed 5 --n 2 --digits 2")
        assert str(tmp_path) not in found["command"]
        shipped = few_steps.student(tmp_path / "shipped", steps=2)
        assert shipped.pipe.scheduler.config.num_time_windows == 2
        assert {value.dtype for value in delta_weights.load(tmp_path / "shipped").values()} == {torch.float16}
        card = (tmp_path / "shipped" / "card.json").read_text()
        assert json.loads(card)["scores"] == found["summary"] and str(tmp_path) not in card


RECORDS = ROOT / "benchmarks" / "results" / "cpu-amd-epyc-avx512-bf16-2t" / "few_steps"


def recorded(name: str) -> dict:
    if not RECORDS.is_dir():
        pytest.skip("no recorded results (an sdist has none)")
    return json.loads((RECORDS / f"{name}.json").read_text())


class TestRecorded:
    """What the rows claim. Low: the lower end of the 95 % interval of a paired difference."""

    @pytest.mark.parametrize("student", ["flash-0", "perflow-0"])
    def test_students_read_more_often_than_ddim_at_as_many_calls(self, student):
        one = recorded(student)
        for name in ("ddim_2", "ddim_4_unguided"):
            assert recorded(name)["network_calls"] == one["network_calls"]
            assert few_steps.gain(one, recorded(name)).low > 0

    @pytest.mark.parametrize("student", ["flash-0", "perflow-0"])
    def test_students_are_not_below_guided_ddim_at_as_many_steps_with_half_the_calls(self, student):
        one, other = recorded(student), recorded("ddim_4")
        assert one["steps"] == other["steps"] and 2 * one["network_calls"] == other["network_calls"]
        assert few_steps.gain(one, other).high > 0 and few_steps.gain(one, other).low > -0.05

    def test_fresh_pictures_do_not_show_that_flash_is_above_its_guided_teacher(self):
        fresh = [recorded(f"draw_seed_9/{name}") for name in ("flash-0", "ddim_4")]
        value, low, high = few_steps.gain(*fresh)
        assert fresh[0]["settings"]["seed"] == 9 and low < 0 < value < high

    def test_no_student_took_more_than_sixteen_minutes_of_a_core(self):
        found = [json.loads(path.read_text()) for path in RECORDS.glob("*.json")]
        assert all(one["training"]["cpu_seconds"] <= 16 * 60 for one in found if one["training"])

    @pytest.mark.parametrize("name, row", [("tiny_sd_perflow", "perflow-0"), ("tiny_sd_flash", "flash-0")])
    def test_the_bundled_student_draws_what_was_recorded(self, name, row):
        """In float16, and on other machines: not every picture to the bit."""
        card, wanted = json.loads((bundled.path(name) / "card.json").read_text()), recorded(row)
        assert card["scores"] == wanted["summary"] and card["training"] == wanted["training"]
        seed, n = wanted["settings"]["seed"], 16
        drawn = few_steps.score(few_steps.student(name, steps=card["steps"]), n=n, lengths=(2,), seed=seed)
        same = sum(a == b for a, b in zip(drawn["exact"]["2 digits"], wanted["exact"]["2 digits"][:n], strict=True))
        assert same >= n - 2


class TestDemo:
    def test_the_quick_part_draws_and_scores_every_way(self, tmp_path):
        pytest.importorskip("PIL")
        from PIL import Image

        from linattn.demos import few_steps as part

        said = []
        picture, numbers = part.run(tmp_path, quick=True, report=said.append)
        figures = json.loads(numbers.read_text())
        assert list(figures["scores"]) == ["teacher", "ddim", *part.STUDENTS] and list(figures["gain"]) == list(
            part.STUDENTS
        )
        assert figures["scores"]["ddim"]["network_calls"] == 2 * figures["scores"]["tiny_sd_flash"]["network_calls"]
        assert any("PeRFlow, 4 steps" in line and "Flash, 4 steps" in line for line in said)
        assert Image.open(picture).width > 600


class TestTable:
    @pytest.fixture
    def readme(self):
        return pytest.importorskip("benchmarks.readme.few_steps")

    def test_several_seeds_are_a_mean_and_their_own_lines(self, readme, tmp_path):
        from benchmarks import tables

        folder = tmp_path / "cpu-x" / "few_steps"
        folder.mkdir(parents=True)
        made = {"ddim_4": record("0001" * 25, **PLAIN), "perflow-0": record("0011" * 25)}
        made["perflow-1"] = record("0111" * 25, training={"seed": 1, "cpu_seconds": 900})
        for name, one in made.items():
            (folder / f"{name}.json").write_text(json.dumps(one))
        (folder / "other.json").write_text("{}")
        lines = readme.render(tables.Results({"cpu-x": []}), tmp_path).splitlines()
        titles = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("|")]
        assert titles[2:] == ["teacher, DDIM", "**PeRFlow**", "seed 0", "seed 1"]
        mean = lines[3].split(" | ")
        assert (
            mean[3] == "100"
            and mean[4].startswith("0.625 [")
            and mean[5].startswith("+0.375 [")
            and mean[6] == mean[7] == "—"
        )
        assert "10.0" in mean[-1]

    def test_without_results_it_says_so(self, readme, tmp_path):
        from benchmarks import tables

        assert "No results are recorded" in readme.render(tables.Results({"cpu-x": []}), tmp_path)
