"""The trainer: what it trains, that it can be killed at any moment, that processes share a run, what it writes."""

import functools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml

pytest.importorskip("diffusers", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("pydantic", reason='distillation needs the extra: pip install "linattn[train]"')
pytest.importorskip("tensorboard", reason='distillation needs the extra: pip install "linattn[train]"')

from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from helpers import runs
from helpers.runs import free_port, reset_accelerator
from helpers.tiny_pipelines import tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

from linattn import bundled
from linattn.adapters import CLEAR, LinFusion
from linattn.cli import main
from linattn.cli.distill import resolve
from linattn.distill import checkpoint, pipelines, recipe
from linattn.distill.precompute import fill_caches
from linattn.distill.student import merged_state_dict
from linattn.distill.trainer import Interrupted, Trainer

FAMILIES = {
    "linfusion_sd15": "sd15",
    "linfusion_sd21": "sd21",
    "linfusion_sdxl": "sdxl",
    "linfusion_tiny_sd": "sd15",
    "clear": "flux",
    "clear_tiny_flux": "flux-schnell",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("one_thread_in_module")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in the process: each run here starts as a new process would."""
    reset_accelerator()
    yield
    reset_accelerator()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny pipelines by family, and "pictures": a folder of 11 pictures with captions."""
    root = tmp_path_factory.mktemp("distill")
    for family in {*FAMILIES.values(), "sd35"}:
        tiny_pipeline(family).save_pretrained(root / family)
    pictures = root / "pictures"
    pictures.mkdir()
    numbers = numpy.random.default_rng(0)
    with open(pictures / "metadata.jsonl", "w") as captions:
        for i in range(11):
            height, width = [(40, 40), (32, 64), (64, 36)][i % 3]
            pixels = numbers.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(pictures / f"{i}.png")
            captions.write(json.dumps({"file_name": f"{i}.png", "text": f"a handwritten {i}"}) + "\n")
    return root


#: Small and quick, on the CPU; everything else is as the shipped recipe has it.
SMALL = (
    "training.batch_size=2",
    "training.gradient_accumulation=1",
    "training.steps=3",
    "training.warmup_steps=0",
    "training.learning_rate=1e-3",
    "data.resolution=32",
    "data.workers=0",
    "output.log_with=null",
    "output.validation.prompts=[]",
)
#: Beside these, by family. Of the 8 x 8 tokens the window of `clear` would hold all; Prodigy finds its own step.
SMALL_FLUX = {
    "clear": ("model.text_length=12", "student.options.window_size=3", "training.learning_rate=1"),
    "clear_tiny_flux": ("model.text_length=12",),
}


def small(folders, out, *overrides, name="linfusion_sd15"):
    places = (f"model.pretrained={folders / FAMILIES[name]}", f"data.path={folders / 'pictures'}")
    precision = () if any("mixed_precision" in o for o in overrides) else ("training.mixed_precision=no",)
    settings = [*SMALL, *SMALL_FLUX.get(name, ()), *places, f"output.folder={out}", *precision, *overrides]
    return recipe.load(name, settings)


def train(folders, out, *overrides, **options):
    """A whole run from its recipe; returns the trainer, whose `final` is the folder of the result."""
    reset_accelerator()
    wanted = small(folders, out, *overrides, **options)
    trainer = Trainer(wanted, resolve(wanted.student.adapter), say=lambda _: None)
    trainer.final = trainer.run()
    return trainer


def final_weights(out):
    return load_file(Path(out) / "final" / WEIGHTS)


def assert_same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} the first"


# ------------------------------------------------------------------------------------------------- the shipped recipes


def test_every_shipped_recipe_is_run():
    elsewhere = {
        name for name in recipe.shipped() if name.partition("_")[0] in ("infdit", "perflow", "flash")
    }  # in their files
    assert set(FAMILIES) == set(recipe.shipped()) - elsewhere


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_recipe_moves_the_adapter_and_nothing_else(folders, tmp_path, name):
    stock = DiffusionPipeline.from_pretrained(folders / FAMILIES[name])
    # fp16 needs a GPU; the small model is trained in float32, but for the recipe that asks for bf16.
    precision = yaml.safe_load(recipe.shipped()[name].read_text())["training"]["mixed_precision"]
    overrides = ["training.mixed_precision=bf16"] if precision == "bf16" else []
    trainer = train(folders, tmp_path / "run", *overrides, name=name)
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32

    for name, part in trainer.models.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            after = part.state_dict()
            for key, value in stock.components[name].state_dict().items():
                assert torch.equal(after[key], value.to(after[key].dtype)), f"{name}.{key} moved"
    teacher = getattr(stock, trainer.models.component).state_dict()
    for key, value in trainer.student.model.state_dict().items():
        if key not in trainer.trainable:
            assert torch.equal(value, teacher[key].to(narrow)), f"{key} moved"
    adapter_class = resolve(trainer.recipe.student.adapter)
    started = adapter_class.construct_for(stock, load_pretrained=False, **trainer.recipe.student.options)
    before, after = started.state_dict(), final_weights(tmp_path / "run")
    assert before.keys() == after.keys()
    # The first layers of a branch only learn once its last one, which starts at zero, has left zero: step two.
    still = [key for key in before if torch.equal(before[key], after[key])]
    assert not still, f"{still} did not move in three steps"
    assert all(value.dtype == torch.float32 for value in after.values()), "trained in float32 whatever the rest is"

    started.unmount()
    loaded = adapter_class.construct_for(stock, pretrained_model_name_or_path=trainer.final)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, after[key])


def test_training_lowers_the_losses(folders, tmp_path):
    values = []
    # Towards the teacher alone: one with random weights is a bad model of noise, and the two aims would pull apart.
    options = ["training.steps=60", "objective.weights={noise: 0, prediction: 1, feature: 1}"]
    trainer = Trainer(small(folders, tmp_path, *options), LinFusion, say=lambda _: None)
    step = trainer._step
    trainer._step = lambda *arguments: values.append(step(*arguments)) or values[-1]
    trainer.run()
    for name in ("prediction", "feature"):
        early, late = (sum(v[name] for v in part) for part in (values[:8], values[-8:]))
        assert late < 0.7 * early, f"{name}: {early} -> {late}"


# ---------------------------------------------------------------------------------------------- killed, and going on

KILLED = {
    "plain": ["training.steps=12", "output.checkpoint_every=2"],
    "everything": [
        "training.steps=8",
        "training.gradient_accumulation=2",
        "training.ema_decay=0.9",
        "training.lr_schedule=cosine",
        "training.max_grad_norm=0.5",
        "output.checkpoint_every=1",
        "data.resize=buckets",
        "data.bucket_step=8",
        "data.caption_drop=0.3",
        "data.random_flip=true",
    ],
    # Dropout draws from the process's own random state.
    "lora with dropout": [
        "training.steps=10",
        "student.train=lora",
        "student.lora.rank=2",
        "student.lora.dropout=0.4",
        "output.checkpoint_every=3",
    ],
    "flux, pooled keys, prodigy": [
        "training.steps=8",
        "training.optimizer=prodigy",
        "training.learning_rate=1",
        "student.options.down_factor=2",
        "objective.weighting=logit_normal",
        "output.checkpoint_every=2",
    ],
}


@pytest.mark.parametrize("case", KILLED)
def test_run_killed_at_random_moments_ends_in_the_same_bits(folders, tmp_path, case):
    overrides = KILLED[case]
    run = functools.partial(train, name="clear_tiny_flux" if case.startswith("flux") else "linfusion_sd15")
    duration = runs.timed(run, folders, tmp_path / "whole", *overrides)
    assert runs.killed_until_done(run, folders, tmp_path / "killed", *overrides, duration=duration) >= 1
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    state, other = (checkpoint.read_state(checkpoint.latest(tmp_path / name)) for name in ("whole", "killed"))
    assert state == other
    assert not list((tmp_path / "killed").glob("*.partial")), "the leftovers of killed runs are removed"


def test_restored_state_is_that_of_the_checkpoint(folders, tmp_path):
    """Optimizer, average and schedule, bit for bit: one more step from each is compared as well."""
    options = ["training.ema_decay=0.9", "training.lr_schedule=linear"]
    straight = train(folders, tmp_path / "a", "training.steps=4", *options, "output.checkpoint_every=1")
    stopped = tmp_path / "b"
    # The schedule depends on the number of steps, so the run is stopped rather than made shorter.
    with pytest.raises(Interrupted):
        stop_after(2, folders, stopped, "training.steps=4", *options)
    resumed = train(folders, stopped, "training.steps=4", *options)
    a, b = (t.accelerator._optimizers[0].state_dict() for t in (straight, resumed))
    assert a["param_groups"] == b["param_groups"]
    for index, state in a["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][index][k])) for k, v in state.items())
    shadows = straight._average.shadow_params, resumed._average.shadow_params
    assert all(torch.equal(x, y) for x, y in zip(*shadows, strict=True))
    assert_same_weights(tmp_path / "a", stopped)


def stop_after(steps, folders, out, *overrides):
    """Send SIGTERM to ourselves in the middle of step number `steps`."""
    reset_accelerator()
    trainer = Trainer(small(folders, out, *overrides), LinFusion, say=lambda _: None)
    encode, seen = trainer._encode, []

    def interrupted(batch):
        seen.append(batch)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(batch)

    trainer._encode = interrupted
    trainer.run()


def test_signal_ends_the_run_after_a_whole_step_with_a_checkpoint(folders, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="signal 15 after step 2") as stop:
        stop_after(2, folders, tmp_path, "training.steps=5")
    assert (stop.value.signal, stop.value.step) == (signal.SIGTERM, 2)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["checkpoint-00000002"]
    assert not (tmp_path / "final").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_checkpoint_is_absent_until_it_is_whole(tmp_path):
    target = checkpoint.path(tmp_path, 3)
    with pytest.raises(RuntimeError), checkpoint.whole(target) as folder:
        (folder / "state.json").write_text("{}")
        raise RuntimeError
    assert checkpoint.found(tmp_path) == [] and not target.exists()
    with checkpoint.whole(target) as folder:
        (folder / "state.json").write_text("{}")
        assert checkpoint.found(tmp_path) == []
    assert checkpoint.found(tmp_path) == [target]
    (tmp_path / "recipe.yaml.partial").write_text("half")
    checkpoint.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_no_process_walks_through_a_checkpoint_while_another_still_writes(tmp_path, monkeypatch):
    """Writers of tensors rename their files: a walk beside them finds names that are gone a moment later."""
    barrier, walking, flush = threading.Barrier(2, timeout=60), threading.Event(), checkpoint._flush

    def seen(folder):
        walking.set()
        flush(folder)

    def idle_process():
        with checkpoint.whole(tmp_path / "c", is_main=False, barrier=barrier.wait):
            pass

    monkeypatch.setattr(checkpoint, "_flush", seen)
    other = threading.Thread(target=idle_process)
    other.start()
    with checkpoint.whole(tmp_path / "c", barrier=barrier.wait) as folder:
        too_early = walking.wait(0.3)
        (folder / "weights").write_text("x")
    other.join(timeout=60)
    assert not too_early and walking.is_set()
    assert (tmp_path / "c" / "weights").read_text() == "x"


def test_only_the_newest_checkpoints_are_kept(folders, tmp_path):
    train(folders, tmp_path, "training.steps=5", "output.checkpoint_every=1", "output.keep_checkpoints=3")
    assert [checkpoint.read_state(p)["step"] for p in checkpoint.found(tmp_path)] == [3, 4, 5]
    train(folders, tmp_path, "training.steps=7", "output.checkpoint_every=1", "output.keep_checkpoints=null")
    assert [checkpoint.read_state(p)["step"] for p in checkpoint.found(tmp_path)] == [3, 4, 5, 6, 7]


def test_finished_run_can_be_given_more_steps(folders, tmp_path):
    train(folders, tmp_path / "a", "training.steps=2")
    train(folders, tmp_path / "a", "training.steps=4")
    train(folders, tmp_path / "b", "training.steps=4")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_folder_of_another_run_is_refused_by_key(folders, tmp_path):
    train(folders, tmp_path, "training.steps=1")
    different = ["training.learning_rate=5e-4", "objective.weights.feature=0.25", "data.workers=1"]
    reset_accelerator()
    with pytest.raises(recipe.RecipeError) as error:
        Trainer(small(folders, tmp_path, *different), LinFusion)
    keys = sorted(line.partition(":")[0] for line in error.value.problems)
    assert keys == ["objective.weights.feature", "training.learning_rate"]
    assert "has 0.001, this recipe 0.0005" in str(error.value)


# ------------------------------------------------------------------------------------------------------ many processes


def train_together(folders, out, *overrides, function=train):
    return runs.together(function, folders, out, *overrides)


@pytest.mark.parametrize("name", ["linfusion_sd15", "clear"])
def test_two_processes_end_in_the_bits_of_one_that_accumulates_twice_as_much(folders, tmp_path, name):
    """DDP halves each process's gradients and adds them; accumulation halves each micro step's and adds them."""
    run = functools.partial(train, name=name)
    options = ["training.steps=4", "training.ema_decay=0.5", "data.caption_drop=0.5", "training.max_grad_norm=1.0"]
    run(folders, tmp_path / "one", *options, "training.gradient_accumulation=2")
    assert train_together(folders, tmp_path / "two", *options, function=run) == [0, 0]
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    one, two = (checkpoint.read_state(checkpoint.latest(tmp_path / name)) for name in ("one", "two"))
    assert one["samples"] == two["samples"] == 4 * 2 * 2
    # Each process has random numbers of its own to restore.
    names = {p.name for p in checkpoint.latest(tmp_path / "two").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= names


def test_two_processes_go_on_where_they_were(folders, tmp_path):
    assert train_together(folders, tmp_path / "a", "training.steps=4") == [0, 0]
    assert train_together(folders, tmp_path / "b", "training.steps=2") == [0, 0]
    assert train_together(folders, tmp_path / "b", "training.steps=4") == [0, 0]
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_torchrun_runs_the_command_on_two_processes(folders, tmp_path):
    settings = [f"model.pretrained={folders / 'sd15'}", f"data.path={folders / 'pictures'}", "training.steps=2"]
    settings += [f"output.folder={tmp_path / 'run'}", "training.mixed_precision=no"]
    # accelerate launch starts one process on a CPU; torchrun, which it is made of, starts as many as it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "linattn", "distill", "linfusion_sd15"]
    command += [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of 4 samples (2 x 1 micro steps x 2 processes)" in done.stdout
    assert done.stdout.count("done: ") == 1, "one process speaks"
    options = ["training.steps=2", "training.gradient_accumulation=2"]
    train(folders, tmp_path / "alone", *options)
    assert_same_weights(tmp_path / "run", tmp_path / "alone")


def test_run_goes_on_with_another_number_of_processes_at_the_next_sample(folders, tmp_path, monkeypatch):
    assert train_together(folders, tmp_path, "training.steps=3") == [0, 0]
    seen = []
    encode = Trainer._encode
    monkeypatch.setattr(
        Trainer, "_encode", lambda self, batch: seen.extend(batch["number"].tolist()) or encode(self, batch)
    )
    train(folders, tmp_path, "training.steps=5")
    assert seen == [12, 13, 14, 15], "two processes have taken 3 steps of 2 samples each"
    state = checkpoint.read_state(checkpoint.latest(tmp_path))
    assert (state["step"], state["micro_batches"], state["samples"]) == (5, 8, 16)


def train_sharded(folders, out, *overrides):
    """One process of a run under FSDP."""
    accelerator = runs.sharded_accelerator("BasicTransformerBlock")
    trainer = Trainer(small(folders, out, *overrides), LinFusion, accelerator=accelerator, say=lambda _: None)
    trainer.run()
    pieces = {type(p).__name__ for p in trainer.student.model.parameters()}
    assert pieces == {"DTensor"}, f"nothing was sharded: {pieces}"


def test_fully_sharded_run_ends_where_the_replicated_one_does_and_can_be_resumed(folders, tmp_path):
    options = ["training.steps=4", "training.max_grad_norm=0.5", "output.checkpoint_every=2"]
    assert train_together(folders, tmp_path / "replicated", *options) == [0, 0]
    assert train_together(folders, tmp_path / "sharded", *options, function=train_sharded) == [0, 0]
    replicated, sharded = final_weights(tmp_path / "replicated"), final_weights(tmp_path / "sharded")
    assert replicated.keys() == sharded.keys()
    for key, value in replicated.items():
        # Gradients are reduced in other orders; Adam turns a rounding into a small share of its step of 1e-3.
        torch.testing.assert_close(sharded[key], value, rtol=0, atol=2e-5)
    assert train_together(folders, tmp_path / "resumed", *options, "training.steps=2", function=train_sharded) == [0, 0]
    assert train_together(folders, tmp_path / "resumed", *options, function=train_sharded) == [0, 0]
    assert_same_weights(tmp_path / "sharded", tmp_path / "resumed")


@pytest.mark.parametrize("option", ["training.share_frozen=true", "training.ema_decay=0.9"])
def test_what_sharding_cannot_do_is_refused_by_key(folders, tmp_path, option, monkeypatch):
    monkeypatch.setattr(Trainer, "_sharded", True)
    with pytest.raises(recipe.RecipeError, match=rf"{option.partition('=')[0]}: expected .*with FSDP or DeepSpeed"):
        Trainer(small(folders, tmp_path, option), LinFusion)


# ------------------------------------------------------------------------------------------------ options of training


@pytest.mark.parametrize("name", ["linfusion_sd15", "clear_tiny_flux"])
@pytest.mark.parametrize("option", ["training.share_frozen=false", "training.gradient_checkpointing=true"])
def test_saving_memory_changes_no_bit(folders, tmp_path, option, name):
    train(folders, tmp_path / "a", name=name)
    train(folders, tmp_path / "b", option, name=name)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", ["linfusion_sd15", "clear_tiny_flux"])
def test_shared_frozen_weights_are_one_copy(folders, tmp_path, name):
    wanted = small(folders, tmp_path, name=name)
    trainer = Trainer(wanted, resolve(wanted.student.adapter))
    student = {p.data_ptr() for p in trainer.student.model.parameters() if not p.requires_grad}
    assert student < {p.data_ptr() for p in trainer.models.model.parameters()}


def test_average_of_the_weights_is_what_is_exported(folders, tmp_path):
    plain = train(
        folders, tmp_path / "a", "training.steps=3", "output.checkpoint_every=1", "output.keep_checkpoints=null"
    )
    train(folders, tmp_path / "b", "training.steps=3", "training.ema_decay=0.6")
    weights = [load_file(p / "trainable.safetensors") for p in checkpoint.found(tmp_path / "a")]
    # diffusers' average: decay min(0.6, n / (9 + n)) after step n + 1, none after the first.
    shadow = load_file(checkpoint.latest(tmp_path / "b") / "ema.safetensors")
    for name, value in shadow.items():
        expected = weights[0][name]
        for n, weight in enumerate(weights[1:], start=1):
            decay = min(0.6, (1 + n) / (10 + n))
            expected = expected - (1 - decay) * (expected - weight[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    exported = final_weights(tmp_path / "b")
    key = "0.to_q.weight"
    first = next(iter(plain.student.modules))
    assert torch.equal(exported[key], shadow[f"{first}.to_q.weight"])
    raw = load_file(checkpoint.latest(tmp_path / "b") / "trainable.safetensors")
    assert torch.equal(raw[f"{first}.to_q.weight"], weights[-1][f"{first}.to_q.weight"]), "the average only watches"


def test_lora_trains_updates_and_branches_and_is_exported_merged(folders, tmp_path):
    options = ["student.train=lora", "student.lora.rank=2", "student.lora.alpha=4", "training.steps=4"]
    trainer = train(folders, tmp_path, *options)
    names = set(trainer.trainable)
    assert all(".lora_A." in n or ".lora_B." in n or ".to_q_." in n or ".to_k_." in n for n in names)
    assert len(names) == 7 * (4 * 2 + 2 * 6)
    stock = DiffusionPipeline.from_pretrained(folders / "sd15")
    stock.set_progress_bar_config(disable=True)
    linfusion = LinFusion.construct_for(stock, pretrained_model_name_or_path=trainer.final)
    for name, module in linfusion.modules_dict.items():
        expected = merged_state_dict(trainer.student.modules[name])
        own = stock.unet.get_submodule(name).state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in own)
        assert module is stock.unet.get_submodule(name)
    data = torch.randn(1, 4, 16, 16), torch.tensor([400]), torch.randn(1, 5, 16)
    with torch.no_grad():
        trainer.student.model.eval()
        wanted, got = trainer.student.model(*data).sample, stock.unet(*data).sample
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    # The updates by themselves go on top of the adapter that they were trained on, by diffusers' own loader.
    again = DiffusionPipeline.from_pretrained(folders / "sd15")
    base = LinFusion.construct_for(again, load_pretrained=False)
    for name, module in base.modules_dict.items():
        for branch in ("to_q_", "to_k_"):
            module.get_submodule(branch).load_state_dict(
                linfusion.modules_dict[name].get_submodule(branch).state_dict()
            )
    again.load_lora_weights(trainer.final / "lora")
    with torch.no_grad():
        torch.testing.assert_close(again.unet(*data).sample, wanted, rtol=1e-5, atol=1e-6)


def test_student_can_start_from_trained_weights(folders, tmp_path):
    first = train(folders, tmp_path / "a")
    trainer = Trainer(small(folders, tmp_path / "b", f"student.pretrained={first.final}"), LinFusion)
    for name, module in trainer.student.modules.items():
        expected = first.student.modules[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_frozen_weights_are_narrow_and_trained_ones_wide_in_mixed_precision(folders, tmp_path):
    trainer = train(folders, tmp_path, "training.mixed_precision=bf16")
    dtypes = {p.requires_grad: p.dtype for p in trainer.student.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {p.dtype for p in trainer.models.model.parameters()} == {torch.bfloat16}


def test_vae_that_asks_for_float32_gets_it(folders, tmp_path):
    trainer = Trainer(small(folders, tmp_path, "training.mixed_precision=bf16", name="linfusion_sdxl"), LinFusion)
    vae = trainer.models.pipeline.vae
    assert vae.config.force_upcast and vae.dtype == torch.float32
    vae.register_to_config(force_upcast=False)
    trainer.models.place(torch.device("cpu"), torch.bfloat16)
    assert vae.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------- FLUX, SD3


def test_clear_trains_stable_diffusion_3_with_pooled_keys_in_sixteen_bits(folders, tmp_path):
    """The recipe for FLUX with another model: joint attention, and the second one of SD3.5."""
    options = [f"model.pretrained={folders / 'sd35'}", "student.options.down_factor=2", "objective.feature_interval=1"]
    trainer = train(folders, tmp_path, *options, "training.mixed_precision=bf16", name="clear")
    assert trainer.objective.features == tuple(f"transformer_blocks.{i}.attn{n}" for i in (0, 1) for n in ("", "2"))
    names = {
        f"transformer_blocks.{i}.{attn}" for i in range(3) for attn in ("attn", "attn2") if (i, attn) != (2, "attn2")
    }
    assert {name.rpartition(".attn")[0] for name in trainer.trainable} == {f"transformer_blocks.{i}" for i in range(3)}
    assert set(trainer.student.modules) == names
    after = final_weights(tmp_path)
    assert after.keys() == trainer.trainable.keys()
    stock = DiffusionPipeline.from_pretrained(folders / "sd35").transformer.state_dict()
    mean = torch.full((1, 1, 1, 2, 1, 2, 1), 1 / 4)
    still = [k for k, v in after.items() if torch.equal(v, stock.get(k, mean))]
    assert not still, f"{still} did not move"


def test_prodigy_s_own_settings_reach_it(folders, tmp_path):
    settings = "{beta3: 0.9, decouple: false, bias_correction: true, safeguard_warmup: false, d_coef: 2.0, slice_p: 3}"
    options = [f"training.prodigy={settings}", "training.weight_decay=0.5", "training.steps=1"]
    trainer = train(folders, tmp_path, *options, name="clear")
    (group,) = trainer.accelerator._optimizers[0].param_groups
    expected = {"beta3": 0.9, "decouple": False, "use_bias_correction": True, "safeguard_warmup": False}
    expected |= {"d_coef": 2.0, "slice_p": 3, "weight_decay": 0.5, "lr": 1.0, "betas": (0.9, 0.999)}
    assert {key: group[key] for key in expected} == expected


def test_objective_s_settings_reach_the_noise_and_the_guidance(folders, tmp_path):
    settings = [
        "objective.weighting=cosmap",
        "objective.shift=2.5",
        "objective.guidance=2",
        "objective.weights.feature=0",
    ]
    trainer = Trainer(small(folders, tmp_path, *settings, name="clear"), CLEAR)
    assert (trainer.schedule.weighting, trainer.schedule.shift) == ("cosmap", 2.5)
    assert trainer.objective.student.guidance == trainer.objective._frozen[0].guidance == 2.0
    assert trainer.objective.features == ()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clear", ["data.resolution=40", "data.resize=crop"], None),
        ("clear", ["data.resize=buckets", "data.bucket_step=8"], None),
        (
            "linfusion_sd15",
            ["model.pretrained={flux}"],
            "objective.kind: expected 'flow_attention' or 'perflow' or 'flash' for a FluxPi",
        ),
        (
            "clear",
            ["model.pretrained={sd15}", "model.text_length=null"],
            "objective.kind: expected 'attention' or 'perfl",
        ),
        ("clear", ["objective.feature_interval=9"], "objective.feature_interval: 9 leaves no attention module"),
        ("clear", ["student.options={{}}"], "window_size is needed"),
        ("clear", ["student.options={{window: 3}}"], "student.options: nothing is loaded, so ['"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_key(folders, tmp_path, name, options, message):
    options = [option.format(**{f: folders / f for f in ("flux", "sd15")}) for option in options]
    wanted = small(folders, tmp_path / "run", *options, name=name)
    if message is None:
        Trainer(wanted, resolve(wanted.student.adapter))
        return
    with pytest.raises(ValueError) as caught:
        Trainer(wanted, resolve(wanted.student.adapter))
    assert message in str(caught.value) and not (tmp_path / "run").exists()


def test_sides_that_the_model_cannot_cut_into_tokens_are_refused_by_key(folders, tmp_path, monkeypatch):
    """16 pixels a token, as FLUX itself has; the small one has 4, which every multiple of 8 is one of."""
    monkeypatch.setattr(pipelines.Flux, "multiple", 16)
    sides = ["data.resolution=40", 'output.validation={prompts: ["a two"], height: 32, width: 56}']
    with pytest.raises(recipe.RecipeError) as caught:
        Trainer(small(folders, tmp_path, *sides, name="clear"), CLEAR)
    assert [line.partition(" for")[0] for line in caught.value.problems] == [
        "data.resolution: expected a multiple of 16",
        "output.validation.width: expected a multiple of 16",
    ]
    with pytest.raises(
        recipe.RecipeError, match=r"data\.bucket_step: expected a multiple of 16 for a FluxPipeline, got 8"
    ):
        Trainer(small(folders, tmp_path, "data.resize=buckets", "data.bucket_step=8", name="clear"), CLEAR)


def test_prodigy_and_fully_sharded_data_are_refused_together(folders, tmp_path, monkeypatch):
    from accelerate.utils import DistributedType

    trainer = Trainer(small(folders, tmp_path, name="clear"), CLEAR)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(recipe.RecipeError, match=r"training\.optimizer: expected adamw with FSDP"):
        Trainer(small(folders, tmp_path, name="clear"), CLEAR, accelerator=trainer.accelerator)


def test_a_missing_prodigy_is_told_before_anything_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    monkeypatch.setattr(pipelines, "load", None)
    with pytest.raises(ImportError, match=r"training\.optimizer: prodigyopt is not installed"):
        Trainer(small(folders, tmp_path, name="clear"), CLEAR)


def test_the_teacher_of_clear_keeps_its_weights_though_most_are_shared(folders, tmp_path):
    trainer = Trainer(small(folders, tmp_path, "training.mixed_precision=bf16", name="clear"), CLEAR)
    assert {p.dtype for p in trainer.models.model.parameters()} == {torch.bfloat16}
    own = {p.data_ptr() for p in trainer.trainable.values()}
    assert not own & {p.data_ptr() for p in trainer.models.model.parameters()}
    assert {p.dtype for p in trainer.trainable.values()} == {torch.float32}


def test_prepare_fills_the_caches_and_trains_nothing(folders, tmp_path, capsys, monkeypatch):
    options = [
        *SMALL,
        *SMALL_FLUX["clear"],
        f"model.pretrained={folders / 'flux'}",
        f"data.path={folders / 'pictures'}",
    ]
    options += [f"output.folder={tmp_path / 'run'}", "training.mixed_precision=no"]
    arguments = ["distill", "clear", *(part for option in options for part in ("--set", option))]
    assert main([*arguments, "--prepare"]) == 0
    assert f"prepared: {tmp_path / 'run' / 'cache'}" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["cache"]
    entries = list((tmp_path / "run" / "cache").rglob("*.safetensors"))
    assert len(entries) == 11 + 11
    assert {tuple(load_file(p)) for p in entries} == {
        ("encoder_hidden_states", "pooled_projections"),
        ("mean", "std"),
    }
    for name in ("encode_text", "encode_image"):
        monkeypatch.setattr(pipelines.Flux, name, None)  # the run needs neither any more
    reset_accelerator()
    assert main([*arguments, "--set", "training.steps=1"]) == 0
    reset_accelerator()
    monkeypatch.undo()
    reset_accelerator()
    folder, elsewhere = f"data.cache.folder={tmp_path / 'run' / 'cache'}", f"output.folder={tmp_path / 'other'}"
    changes = [part for option in (folder, elsewhere, "model.text_length=16") for part in ("--set", option)]
    assert main([*arguments, *changes, "--prepare"]) == 0
    entries = list((tmp_path / "run" / "cache").rglob("*.safetensors"))
    assert len(entries) == 11 + 11 + 11, "texts of another length, the same latents"
    reset_accelerator()
    assert main([*arguments, "--prepare", "--set", "data.cache={}", "--set", elsewhere]) == 1
    assert "data.cache: expected text: true, latents: true or both" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_embeddings_and_latents_train_the_same_student(folders, tmp_path, name):
    options = ["data.resize=crop", "data.caption_drop=0.5", "training.steps=3", "training.learning_rate=1e-4"]
    train(folders, tmp_path / "plain", *options, name=name)
    train(folders, tmp_path / "cached", *options, "data.cache={text: true, latents: true}", name=name)
    entries = list((tmp_path / "cached" / "cache").rglob("*.safetensors"))
    assert len(entries) == 11 + 11 + 1, "eleven pictures, eleven captions, the empty caption"
    plain, cached = final_weights(tmp_path / "plain"), final_weights(tmp_path / "cached")
    for key, value in plain.items():
        # Encoded one by one instead of in batches, so rounded differently; Adam makes that a share of its step of 1e-4.
        torch.testing.assert_close(cached[key], value, rtol=0, atol=2e-5)


def test_processes_fill_a_cache_together_whichever_looks_first(folders, tmp_path):
    """The second looks for what is missing when the first has written its share: between them nothing may be left."""
    shared = f"data.cache={{text: true, latents: true, folder: {tmp_path / 'cache'}}}"
    options = ["data.resize=crop", "data.caption_drop=0.5"]
    trainer = Trainer(small(folders, tmp_path, shared, *options), LinFusion, say=lambda _: None)
    arguments = trainer.recipe, trainer.models, trainer.source, trainer.folder
    for rank in range(2):
        process = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: None
        )
        text, latents = fill_caches(*arguments, process)
    assert len(list(text.folder.rglob("*.safetensors"))) == 11 + 1, "with the empty caption"
    assert len(list(latents.folder.rglob("*.safetensors"))) == 11


def test_second_run_uses_the_cache_of_the_first_and_another_model_does_not(folders, tmp_path, monkeypatch):
    shared = f"data.cache={{text: true, latents: true, folder: {tmp_path / 'cache'}}}"
    train(folders, tmp_path / "a", shared, "training.steps=1")
    count = len(list((tmp_path / "cache").rglob("*.safetensors")))
    trainer = Trainer(small(folders, tmp_path / "b", shared, "training.steps=1"), LinFusion)
    monkeypatch.setattr(trainer.models, "encode_text", None)
    monkeypatch.setattr(trainer.models, "encode_image", None)
    trainer.run()
    other = tmp_path / "other"
    pipe = DiffusionPipeline.from_pretrained(folders / "sd15")
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(0.1)
    pipe.save_pretrained(other)
    train(folders, tmp_path / "c", shared, "training.steps=1", f"model.pretrained={other}")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == count + 11, "new latents, the same captions"


# ------------------------------------------------------------------------------------------------- pictures and the log


def test_validation_pictures_are_written_and_change_nothing(folders, tmp_path):
    pictures = 'output.validation={prompts: ["a two", "a three"], every: 2, steps: 2, guidance: 3.0}'
    options = ["student.train=lora", "student.lora.dropout=0.5", "training.steps=3"]
    train(folders, tmp_path / "a", *options, pictures, "output.log_with=tensorboard")
    train(folders, tmp_path / "b", *options)
    train(folders, tmp_path / "c", *options, pictures)
    assert_same_weights(tmp_path / "b", tmp_path / "c")
    sheets = sorted((tmp_path / "c" / "validation").iterdir())
    assert [s.name for s in sheets] == ["step-00000002.png", "step-00000003.png"]
    first, second = (numpy.asarray(Image.open(s), dtype=float) for s in sheets)
    assert first.shape == (2 * 32, 2 * 32, 3)
    assert (first[:, :32] == second[:, :32]).all(), "the teacher, left, draws the same"
    assert (first[:, 32:] != second[:, 32:]).any(), "the student, right, has learnt"
    assert "teacher | student" in events(tmp_path / "a").Tags()["images"]


def events(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EventAccumulator(str(out / "logs" / "distill")).Reload()


def test_log_has_every_loss_and_goes_on_after_a_stop(folders, tmp_path):
    options = ["output.log_with=tensorboard", "output.log_every=1", "training.steps=4"]
    with pytest.raises(Interrupted):
        stop_after(3, folders, tmp_path, *options)
    train(folders, tmp_path, *options)
    log = events(tmp_path)
    for name in ("loss/loss", "loss/noise", "loss/prediction", "loss/feature", "learning_rate"):
        assert [event.step for event in log.Scalars(name)] == [1, 2, 3, 4], name
    total = [sum(w * log.Scalars(f"loss/{k}")[i].value for k, w in WEIGHTED.items()) for i in range(4)]
    numpy.testing.assert_allclose([event.value for event in log.Scalars("loss/loss")], total, rtol=1e-5)


WEIGHTED = {"noise": 1.0, "prediction": 0.5, "feature": 0.5}


def test_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(folders, tmp_path):
    options = ["training.steps=6", "output.checkpoint_every=1"]
    trainer = Trainer(small(folders, tmp_path, *options), LinFusion)
    encode, seen = trainer._encode, []

    def poisoned(batch):
        seen.append(batch)
        inputs = encode(batch)
        return inputs | {"latents": inputs["latents"] * float("nan")} if len(seen) == 3 else inputs

    trainer._encode = poisoned
    with pytest.raises(FloatingPointError, match="the loss is nan in step 3"):
        trainer.run()
    newest = checkpoint.latest(tmp_path)
    assert checkpoint.read_state(newest)["step"] == 2
    assert all(torch.isfinite(value).all() for value in load_file(newest / "trainable.safetensors").values())


# ------------------------------------------------------------------------------------------------------ command line


def command(folders, out, *overrides):
    settings = [*SMALL, f"model.pretrained={folders / 'sd15'}", f"data.path={folders / 'pictures'}"]
    settings += [f"output.folder={out}", "training.mixed_precision=no", *overrides]
    return ["distill", "linfusion_sd15", *(part for setting in settings for part in ("--set", setting))]


def test_command_trains_and_says_where_the_result_is(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "trains 40,496 of" in out and f"done: {tmp_path / 'run' / 'final'}" in out
    assert (tmp_path / "run" / "final" / WEIGHTS).is_file()
    assert recipe.load(tmp_path / "run" / "recipe.yaml") == small(folders, tmp_path / "run")


def test_dry_run_writes_nothing(folders, tmp_path, capsys):
    assert main([*command(folders, tmp_path / "run"), "--dry-run"]) == 0
    assert "11 pictures" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_recipes_are_listed_and_shown(folders, tmp_path, capsys):
    assert main(["distill", "--list"]) == 0
    assert all(name in capsys.readouterr().out for name in [*FAMILIES][:1])
    assert main([*command(folders, tmp_path), "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["steps"] == 3 and shown["objective"]["weights"] == WEIGHTED


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.step=3"], "training.step: unknown key; did you mean 'training.steps'"),
        (["student.adapter=linattn.adapters:LinFusio"], "linattn.adapters has no 'LinFusio'"),
        (["student.adapter=linattn.adapter:LinFusion"], "there is no module 'linattn.adapter'"),
        (["data.path=./absent"], "data.path: expected a folder of images that exists, got './absent'"),
        (["student.train=lora", "student.lora.targets=[to_x]"], "student.lora.targets: "),
        (["objective.features=[attn3]"], "no module whose name ends in attn3"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_status_one(folders, tmp_path, capsys, overrides, message):
    assert main(command(folders, tmp_path / "run", *overrides)) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(("name", "model"), [("linfusion_tiny_sd", "tiny_sd"), ("clear_tiny_flux", "tiny_flux")])
def test_canvases_written_by_the_example_train_the_bundled_model(tmp_path, capsys, monkeypatch, name, model):
    """The commands of docs/distillation.md, with three steps."""
    pytest.importorskip("sklearn", reason='the digits need the extra: pip install "linattn[train]"')
    if model not in bundled.names():
        pytest.skip(f"{model} is not bundled yet")
    root = Path(__file__).resolve().parents[1]
    commands = re.findall(
        rf"^    (python examples/write_canvases.py .*|linattn distill {name} .*)$",
        (root / "docs" / "distillation.md").read_text(),
        re.MULTILINE,
    )
    write, distill = (shlex.split(command) for command in commands)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(root / write[1]))["main"]([*write[2:], "--count", "20"])
    settings = ["training.steps=3", "training.warmup_steps=1", "training.batch_size=4"]
    assert main([*distill[1:], *(part for s in settings for part in ("--set", s))]) == 0
    assert (tmp_path / "run" / "final" / WEIGHTS).is_file()
    assert (tmp_path / "run" / "validation" / "step-00000003.png").is_file()


def test_command_that_was_stopped_says_how_to_go_on(folders, tmp_path, capsys, monkeypatch):
    def stopped(self):
        raise Interrupted(signal.SIGTERM, 2)

    monkeypatch.setattr(Trainer, "run", stopped)
    assert main(command(folders, tmp_path / "run")) == 128 + signal.SIGTERM
    assert "stopped after step 2; the same command goes on from there" in capsys.readouterr().err


def test_pipeline_of_another_kind_is_refused_by_name(folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline", "_diffusers_version": "0.42"}))
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline, FluxPipeline.*is a SanaPipeline"):
        Trainer(small(folders, tmp_path / "run", f"model.pretrained={other}"), LinFusion)
