"""Recipes: what may stand in one, and that everything that may not is said by its key, all at once."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason='recipes need the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='recipes need the extra: pip install "linattn[train]"')

import hypothesis
import hypothesis.strategies as st
import pydantic
import yaml

from linattn.distill import recipe
from linattn.distill.recipe import Recipe, RecipeError

SMALLEST = {
    "model": {"pretrained": "owner/model"},
    "student": {"adapter": "linattn.adapters:LinFusion"},
    "data": {"kind": "images", "path": "pictures", "resolution": 512},
    "training": {"steps": 10, "batch_size": 2, "learning_rate": 0.0001},
    "output": {"folder": "out"},
}
KEYS = [key for key, _, _ in recipe.keys()]  # noqa: SIM118 (no dict)
SECTIONS = sorted({"", *(key.rpartition(".")[0] for key in KEYS)})
#: Keys that an objective of this kind has, and the default one has not.
ONLY_OF = {
    key: kind.model_fields["kind"].default
    for kind in (
        *(recipe.EDMStepsObjective, recipe.FlashObjective, recipe.PeRFlowObjective),
        *(recipe.FlowAttentionObjective, recipe.EDMObjective),
    )
    for key, _, _ in recipe.keys(kind, "objective.")
    if key not in {common for common, _, _ in recipe.keys(recipe.AttentionObjective, "objective.")}
}


def smallest_with(key):
    """The smallest recipe that may have this key."""
    content = with_value("objective.kind", ONLY_OF[key]) if key in ONLY_OF else SMALLEST
    if ONLY_OF.get(key) == "flash":  # sections that are null where nothing is said
        content = with_value("objective.discriminator", {}, with_value("objective.fake_score", {}, content))
    enlarges = ONLY_OF.get(key) in ("edm", "edm_steps")
    return with_value("student.adapter", None, content) if enlarges else content


def with_value(key, value, content=SMALLEST):
    """A copy of a recipe's content in which a dotted key has another value."""
    content = copy.deepcopy(content)
    *sections, name = key.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    return content


def problems(content):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(content)
    assert all(line in str(caught.value) for line in caught.value.problems)
    return list(caught.value.problems)


def problem(key, value, content=SMALLEST):
    """The one problem of a recipe in which a key has this value."""
    (line,) = problems(with_value(key, value, content))
    return line


def written(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- unknown keys


def misspellings(name):
    """Slips of the finger: a letter left out, doubled, swapped with its neighbour; dashes and capitals."""
    middle = len(name) // 2
    yield name[:-1]
    yield name[:middle] + name[middle] + name[middle:]
    yield name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    yield name.upper()
    yield name.replace("_", "-")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_misspelt_gives_the_key(key):
    section, _, name = key.rpartition(".")
    holder = {known.rpartition(".")[2] for known in KEYS if known.rpartition(".")[0] == section}
    tried, content = 0, smallest_with(key)
    for wrong in {*misspellings(name)} - holder:
        unknown = f"{section}.{wrong}".lstrip(".")
        lines = problems(with_value(unknown, 1, content))
        assert any(f"{unknown}: unknown key; did you mean '{key}'" in line for line in lines), lines
        tried += 1
    assert tried


def test_the_schema_walk_knows_every_key_that_is_written_out():
    def leaves(content, prefix=""):
        for name, value in content.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")

    contents = [SMALLEST, *(smallest_with(key) for key in ONLY_OF)]
    written_out = {leaf for content in contents for leaf in leaves(yaml.safe_load(Recipe.parse(content).to_yaml()))}
    assert sorted(written_out) == sorted(KEYS)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_that_is_near_to_none_gives_all_there_are(section):
    unknown = f"{section}.xqzj".lstrip(".")
    lines = problems(with_value(unknown, 1, smallest_with(section)))
    kind = ONLY_OF.get(section, "attention")
    names = [
        key.rpartition(".")[2]
        for key in KEYS
        if key.rpartition(".")[0] == section and ONLY_OF.get(key, "attention") == kind
    ]
    (line,) = [line for line in lines if "xqzj" in line]
    assert line == f"{unknown}: unknown key; expected one of {', '.join(names)}"


def test_a_key_in_the_wrong_section_gives_its_own():
    assert "did you mean 'training.learning_rate' or 'objective.disc" in problem("learning_rate", 1e-4)
    assert "'model.revision' or 'data.resolution'?" in problem("model.resolution", 512)
    both = problem("seed", 0)
    assert "'training.seed' or 'output.validation.seed'" in both


def test_a_key_that_is_no_text_is_unknown():
    lines = problems({**SMALLEST, 1: 2, "data": {**SMALLEST["data"], 3: 4}})
    assert sorted(line.partition(";")[0] for line in lines) == ["1: unknown key", "data.3: unknown key"]


# ----------------------------------------------------------------------------------------- missing and wrong values


@pytest.mark.parametrize("key", [f"{section}.{name}" for section, keys in SMALLEST.items() for name in keys])
def test_a_required_key_that_is_missing_is_named(key):
    content = copy.deepcopy(SMALLEST)
    section, name = key.split(".")
    del content[section][name]
    assert problems(content) == [f"{key}: required, and missing"]


@pytest.mark.parametrize("section", list(SMALLEST))
def test_a_section_that_is_missing_or_empty_is_named(section):
    without = {name: keys for name, keys in SMALLEST.items() if name != section}
    assert problems(without) == [f"{section}: required, and missing"]
    assert problems({**without, section: None}) == [
        f"{section}.{name}: required, and missing" for name in SMALLEST[section]
    ]


@pytest.mark.parametrize("key", ["objective", "objective.weights", "student.lora", "data.cache", "output.validation"])
def test_an_empty_section_without_required_keys_holds_the_defaults(key):
    assert Recipe.parse(with_value(key, None)) == Recipe.parse(with_value(key, {})) == Recipe.parse(SMALLEST)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("student.options", "model.options")])
def test_every_key_refuses_a_value_of_the_wrong_kind_by_name(key):
    wrong = {"nothing": "of the kind"} if key not in SECTIONS else ["a", "list"]
    lines = problems(with_value(key, wrong, smallest_with(key)))
    ways = (f"{key}: expected", f"{key}.nothing: unknown key", f"{key}.nothing: expected")
    assert any(line.startswith(ways) and ("got" in line or "unknown" in line) for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.steps", 0, ["greater than or equal to 1", "got 0"]),
        ("training.steps", 2.5, ["whole number", "got 2.5"]),
        ("training.steps", True, ["whole number", "got true"]),
        ("training.steps", "10", ["whole number", "got '10'"]),
        ("training.learning_rate", 0, ["greater than 0", "got 0"]),
        ("training.learning_rate", "fast", ["a number", "got 'fast'"]),
        ("training.learning_rate", float("inf"), ["finite number", "got inf"]),
        ("training.learning_rate", None, ["a number", "got null"]),
        ("training.betas", [0.9], ["one more value", "got [0.9]"]),
        ("training.betas", [0.9, 0.99, 0.999], ["at most 2 items", "got [0.9, 0.99, 0.999]"]),
        ("training.betas", [0.9, 1.0], ["training.betas[1]", "below 1", "got 1.0"]),
        ("training.betas", [0.9, "x"], ["training.betas[1]", "a number", "got 'x'"]),
        ("training.ema_decay", 1, ["less than 1", "got 1"]),
        ("training.mixed_precision", "fp8", ["'no', 'fp16' or 'bf16'", "got 'fp8'"]),
        ("training.lr_schedule", "cosin", ["'cosine'", "got 'cosin'"]),
        ("training.gradient_checkpointing", 1, ["true or false", "got 1"]),
        ("training.optimizer", "prodgy", ["'adamw' or 'prodigy'", "got 'prodgy'"]),
        ("training.prodigy.beta3", 1.0, ["less than 1", "got 1.0"]),
        ("training.prodigy.slice_p", 0, ["greater than or equal to 1", "got 0"]),
        ("model.text_length", 600, ["less than or equal to 512", "got 600"]),
        ("training.seed", -1, ["greater than or equal to 0", "got -1"]),
        ("training.max_grad_norm", 0, ["greater than 0", "got 0"]),
        ("data.kind", "image", ["'images', 'webdataset' or 'datasets'", "got 'image'"]),
        ("data.path", "", ["a path", "got ''"]),
        ("data.path", [], ["a list of paths", "got []"]),
        ("data.path", [1], ["a list of paths", "got [1]"]),
        ("data.resolution", 500, ["multiple of 8", "got 500"]),
        ("data.resolution", 0, ["greater than or equal to 8", "got 0"]),
        ("data.max_aspect", 0.5, ["greater than or equal to 1", "got 0.5"]),
        ("data.caption_drop", 1.5, ["less than or equal to 1", "got 1.5"]),
        ("data.workers", -1, ["greater than or equal to 0", "got -1"]),
        ("data.bucket_step", 12, ["multiple of 8", "got 12"]),
        ("model.revision", 12, ["text (put it in quotes)", "got 12"]),
        ("model.pretrained", "", ["not empty", "got ''"]),
        ("student.adapter", "linattn.adapters", ["'module:Class'", "got 'linattn.adapters'"]),
        ("student.options", [1], ["mapping", "got [1]"]),
        ("student.options", {1: 2}, ["text as keys", "got 1"]),
        ("student.train", "lroa", ["'full' or 'lora'", "got 'lroa'"]),
        ("student.lora.targets", "to_q", ["a list", "got 'to_q'"]),
        ("student.lora.targets", [], ["at least one", "got []"]),
        ("student.lora.targets", ["to_q", 3], ["student.lora.targets[1]", "text", "got 3"]),
        ("objective.kind", "atention", ["'attention'", "'flow_attention'", "got 'atention'"]),
        ("objective.weights.noise", -1, ["greater than or equal to 0", "got -1"]),
        ("objective.features", [], ["weights.feature", "got []"]),
        ("output.keep_checkpoints", 0, ["greater than or equal to 1", "got 0"]),
        ("output.log_with", "wandb", ["'tensorboard'", "got 'wandb'"]),
        ("output.validation.prompts", "a cat", ["a list", "got 'a cat'"]),
        ("output.validation.height", 100, ["multiple of 8", "got 100"]),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_was_expected(key, value, words):
    line = problem(key, value)
    assert line.startswith(key)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"data.cache.latents": True, "data.random_crop": True}, ["data.cache.latents", "data.random_crop"]),
        ({"data.cache.latents": True, "data.random_flip": True}, ["data.cache.latents", "data.random_flip"]),
        ({"data.resize": "squash", "data.random_crop": True}, ["data.random_crop", "data.resize"]),
        ({"data.split": "train"}, ["data.split", "data.kind"]),
        ({"data.path": ["a", "b"]}, ["data.path", "data.kind"]),
        (
            {"data.resize": "buckets", "data.resolution": 64, "data.bucket_step": 128},
            ["data.bucket_step", "data.resolution"],
        ),
        ({"training.warmup_steps": 5}, ["training.warmup_steps", "training.lr_schedule"]),
        ({"training.warmup_steps": 11, "training.lr_schedule": "linear"}, ["training.warmup_steps", "training.steps"]),
        ({f"objective.weights.{name}": 0 for name in ("noise", "prediction", "feature")}, ["objective.weights"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_values_that_are_wrong_together_are_told_with_both_keys(changes, keys):
    content = SMALLEST
    for key, value in changes.items():
        content = with_value(key, value, content)
    (line,) = problems(content)
    assert line.startswith(keys[0])
    assert all(key in line for key in keys)


def test_each_of_those_values_is_right_alone():
    for key, value in [
        ("data.cache.latents", True),
        ("data.random_crop", True),
        ("data.random_flip", True),
        ("data.resize", "squash"),
        ("training.lr_schedule", "linear"),
        ("objective.weights.noise", 0),
        ("objective.weights.feature", 0),
    ]:
        Recipe.parse(with_value(key, value))


def test_all_problems_are_told_at_once():
    wrong = {
        "training.stesp": 3,
        "training.batch_size": 0,
        "data.kind": "pictures",
        "data.cache.text": "yes",
        "objective.weights.noise": -1,
        "output.validation.every": 0,
        "outptu": {},
    }
    content = SMALLEST
    for key, value in wrong.items():
        content = with_value(key, value, content)
    del content["model"]["pretrained"]
    lines = problems(content)
    assert {line.partition(":")[0] for line in lines} == {*wrong, "model.pretrained"}
    with pytest.raises(RecipeError, match=f"{len(lines)} problems"):
        Recipe.parse(content)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_mapping_is_told_so(content):
    (line,) = problems(content)
    assert "expected a mapping" in line
    assert "model, student, objective, data, training, output" in line


@hypothesis.given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(sorted({name for key in KEYS for name in key.split(".")}))
                | st.text(max_size=5)
                | st.integers(),
                inner,
                max_size=6,
            )
        ),
        max_leaves=20,
    )
)
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_a_file_holds_the_only_error_is_a_recipe_error(content):
    try:
        made = Recipe.parse(content)
    except RecipeError as error:
        assert error.problems
    else:
        assert isinstance(made, Recipe)


def test_objectives_are_told_apart_by_kind_and_explained_by_plain_keys():
    def lines(objective):
        return problems({**SMALLEST, "objective": objective})

    flow = {**SMALLEST, "objective": {"kind": "flow_attention", "feature_interval": 2}}
    assert Recipe.parse(flow).objective == recipe.FlowAttentionObjective(feature_interval=2)
    assert Recipe.parse(SMALLEST).objective == recipe.AttentionObjective()
    assert lines({"kind": "flow_attention", "feature_intervall": 2}) == [
        "objective.feature_intervall: unknown key; did you mean 'objective.feature_interval'?"
    ]
    assert lines({"feature_interval": 2}) == [
        "objective.feature_interval: unknown key; expected only beside objective.kind: flow_attention"
    ]
    assert lines({"kind": "flow_attention", "features": ["attn1"]}) == [
        "objective.features: unknown key; expected only beside objective.kind: attention"
    ]
    assert lines({"kind": "flow_attention", "logit_std": 0})[0].startswith("objective.logit_std: expected a number")
    assert lines({"kind": "neither"}) == [
        "objective.kind: expected 'attention', 'flow_attention', 'edm', 'edm_steps', 'perflow', 'flash', got 'neither'"
    ]
    assert lines({"weights": {"nose": 1}}) == [
        "objective.weights.nose: unknown key; did you mean 'objective.weights.noise'?"
    ]


# --------------------------------------------------------------------------------------------------- YAML and files


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".1e-3", "10e-5"])
def test_every_usual_way_to_write_a_small_number_is_one(tmp_path, text):
    smallest = yaml.safe_dump(SMALLEST).replace("learning_rate: 0.0001", f"learning_rate: {text}")
    assert recipe.load(written(tmp_path, smallest)).training.learning_rate == pytest.approx(1e-4, rel=1e-15)
    assert recipe.load(written(tmp_path, smallest), [f"training.betas=[{text}, {text}]"]).training.betas[1] < 1


@pytest.mark.parametrize("text", ["no", "'no'", "No"])
def test_no_mixed_precision_may_be_written_without_quotes(tmp_path, text):
    path = written(tmp_path, yaml.safe_dump(SMALLEST))
    assert recipe.load(path, [f"training.mixed_precision={text}"]).training.mixed_precision == "no"


def test_a_number_in_place_of_text_is_not_converted():
    assert Recipe.parse(with_value("output.folder", "1e-4")).output.folder == "1e-4"
    assert "put it in quotes" in problem("output.folder", 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {pretrained: a\ntraining: 3", ["line 2", "not YAML"]),
        ("model:\n\tpretrained: a", ["line 2", "not YAML"]),
        ("a: 1\nb: 2\na: 3", ["line 3", "'a' stands twice"]),
        ("model:\n  pretrained: a\n  revision: b\n  pretrained: c", ["line 4", "'pretrained' stands twice"]),
        ("model: !!python/object/apply:os.system ['true']", ["line 1", "not YAML", "python/object"]),
        ("model: *nowhere", ["line 1", "not YAML"]),
        ("model: 2026-13-45", ["not YAML"]),
        ("a: 1\n---\nb: 2", ["line 2", "not YAML"]),
        ("", ["expected a mapping", "got null"]),
    ],
)
def test_a_file_that_is_not_yaml_is_told_with_the_line(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_bytes_that_are_no_text_are_told(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match="not YAML"):
        recipe.load(path)


def test_a_file_that_does_not_exist_gives_the_nearest(tmp_path):
    written(tmp_path, yaml.safe_dump(SMALLEST), "distill.yaml")
    with pytest.raises(RecipeError, match=r"no such file.*did you mean '.*/distill\.yaml'"):
        recipe.load(tmp_path / "distil.yaml")
    with pytest.raises(RecipeError, match="got a folder"):
        recipe.load(tmp_path)


def test_anchors_and_merges_work_and_share_nothing_with_overrides(tmp_path):
    content = yaml.safe_dump({k: v for k, v in SMALLEST.items() if k != "student"})
    content += "student:\n  adapter: a:B\n  options: {one: &part {x: 1}, two: *part, three: {<<: *part, x: 5}}\n"
    made = recipe.load(written(tmp_path, content), ["student.options.one.x=9"])
    assert made.student.options == {"one": {"x": 9}, "two": {"x": 1}, "three": {"x": 5}}


# ------------------------------------------------------------------------------------------------------- overrides


def test_overrides_take_the_place_of_what_the_file_says(tmp_path):
    path = written(tmp_path, yaml.safe_dump(SMALLEST))
    made = recipe.load(
        path,
        [
            "training.steps=3",
            "training.learning_rate=1e-5",
            "training.max_grad_norm=1",
            "output.validation.prompts=[a cat, 'b = c']",
            "objective.weights.feature=0",
            "student.options.mid_dim.deep=16",
            "output.folder=a=b",
            "data.split=",
        ],
    )
    assert (made.training.steps, made.training.learning_rate, made.training.max_grad_norm) == (3, 1e-5, 1)
    assert made.output.validation.prompts == ("a cat", "b = c")
    assert made.objective.weights == recipe.AttentionWeights(feature=0)
    assert made.student.options == {"mid_dim": {"deep": 16}}
    assert made.output.folder == "a=b"
    assert made.data.split is None


def test_wrong_overrides_and_a_wrong_file_are_told_at_once(tmp_path):
    path = written(tmp_path, yaml.safe_dump(with_value("data.resolution", 3)))
    with pytest.raises(RecipeError, match="3 problems") as caught:
        recipe.load(path, ["training.steps=0", "data.path"])
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "override 'data.path'",
        "data.resolution",
        "training.steps",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.step=3", ["training.step", "did you mean 'training.steps'"]),
        ("training.steps=many", ["training.steps", "whole number", "'many'"]),
        ("training.steps", ["expected key=value", "'training.steps'"]),
        ("=3", ["expected key=value", "'=3'"]),
        ("training..steps=3", ["expected key=value"]),
        ("training.steps.more=3", ["training.steps holds a value (10)"]),
        ("training.betas=[1", ["training.betas", "a value in YAML", "'[1'"]),
    ],
)
def test_a_wrong_override_is_told(tmp_path, override, words):
    with pytest.raises(RecipeError) as caught:
        recipe.load(written(tmp_path, yaml.safe_dump(SMALLEST)), [override])
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------- shipped, written


def yaml_files():
    return sorted((Path(recipe.__file__).parent / "recipes").glob("*.y*ml"))


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name_and_by_path(path, tmp_path, monkeypatch):
    assert recipe.shipped()[path.stem] == path
    made = recipe.load(path)
    monkeypatch.chdir(tmp_path)
    assert recipe.load(path.stem) == made
    assert recipe.load(written(tmp_path, made.to_yaml())) == made


def test_there_are_shipped_recipes_and_their_names_are_suggested(tmp_path):
    names = recipe.shipped()
    assert names, "the parametrised test above would check nothing"
    name = next(iter(names))
    with pytest.raises(RecipeError, match=f"did you mean the shipped recipe '{name}'"):
        recipe.load(f"{name}_.yaml")


def test_a_file_comes_before_a_shipped_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    written(tmp_path / "shipped", yaml.safe_dump(with_value("training.steps", 1)), "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert recipe.load("mine").training.steps == 1
    written(tmp_path, yaml.safe_dump(with_value("training.steps", 2)), "mine")
    assert recipe.load("mine").training.steps == 2


def test_what_is_written_reads_back_equal(tmp_path):
    unusual = {
        "model.revision": "1234567",
        "model.variant": "no",
        "student.options": {"list": [1, 2.5, None], "text": "ünï: # \n two lines", "flag": True},
        "training.learning_rate": 3e-5,
        "training.epsilon": 1e-12,
        "training.max_grad_norm": 1.0,
        "data.kind": "webdataset",
        "data.path": ["a.tar", "b/*.tar"],
        "output.keep_checkpoints": None,
        "output.log_with": None,
        "output.validation.prompts": ["a photo: of\ta cat", "", "null", "1e-4", "no", "x" * 500],
    }
    content = SMALLEST
    for key, value in unusual.items():
        content = with_value(key, value, content)
    made = Recipe.parse(content)
    again = recipe.load(written(tmp_path, made.to_yaml()))
    assert again == made
    assert again.to_yaml() == made.to_yaml()


def test_differences_are_told_by_key_with_both_values():
    here = Recipe.parse(SMALLEST)
    assert here.differences(here) == {}
    there = with_value("student.options.mid_dim_scale", 16, with_value("training.betas", [0.9, 0.99]))
    assert here.differences(Recipe.parse(there)) == {
        "student.options.mid_dim_scale": (None, 16),
        "training.betas": ((0.9, 0.999), (0.9, 0.99)),
    }


def test_a_recipe_cannot_be_changed():
    made = Recipe.parse(SMALLEST)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        made.training.steps = 3


def test_reading_a_recipe_imports_no_model_library(tmp_path):
    code = (
        "import sys; from linattn.distill import recipe; recipe.load(sys.argv[1]); "
        "print([name for name in ('diffusers', 'transformers', 'datasets') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(written(tmp_path, yaml.safe_dump(SMALLEST)))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ paths


def checked(**changes):
    content = SMALLEST
    for key, value in changes.items():
        content = with_value(key.replace("__", "."), value, content)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(content).check_paths()
    return list(caught.value.problems)


def test_paths_that_lead_nowhere_are_told_by_key_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a_file").write_text("")
    Recipe.parse(SMALLEST).check_paths()
    Recipe.parse(with_value("data.path", str(tmp_path / "pictures"))).check_paths()
    (line,) = checked(data__path="picturse")
    assert line.startswith("data.path: expected") and "got 'picturse'; did you mean 'pictures'?" in line
    (line,) = checked(data__path="pictures/of/cats")
    assert "'pictures/of' does not exist" in line
    for nowhere in ("./model", "/nowhere/student", "runs/of/mine", "~/runs"):
        lines = checked(model__pretrained=nowhere, student__pretrained=nowhere, output__folder="a_file")
        assert [line.partition(":")[0] for line in lines] == ["model.pretrained", "student.pretrained", "output.folder"]
    for may_be_on_the_hub in ("model", "owner/model"):
        Recipe.parse(with_value("student.pretrained", may_be_on_the_hub)).check_paths()
    (line,) = checked(data__cache={"folder": "a_file"})
    assert line.startswith("data.cache.folder")


def test_globs_lists_and_home_are_paths_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "0.tar").write_text("")
    content = with_value("data.kind", "webdataset")
    for path in ["~/0.tar", "~/*.tar", str(tmp_path), [str(tmp_path / "0.tar"), "~"]]:
        Recipe.parse(with_value("data.path", path, content)).check_paths()
    (tmp_path / "01.tar").write_text("")
    (tmp_path / "02.tar").write_text("")
    Recipe.parse(with_value("data.path", "~/{01..02}.tar", content)).check_paths()
    (line,) = checked(data__kind="webdataset", data__path="~/{01..03}.tar")
    assert "'~/03.tar'" in line
    lines = checked(data__kind="webdataset", data__path=["~/1*.tar", "~/0.tar", os.fspath(tmp_path / "9.tar")])
    assert len(lines) == 2
    assert "'~/1*.tar'" in lines[0]
