"""What PeRFlow's students are used for: the examples, on tiny models of the real classes, and attention control."""

import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

pytest.importorskip("diffusers", reason='examples need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("transformers", reason='examples need the extra: pip install "linattn[diffusers]"')
pytest.importorskip("accelerate", reason='examples need the extra: pip install "linattn[diffusers]"')

import diffusers
from helpers.goldens import relative_error
from helpers.tiny_pipelines import IMAGE_SIZE, TEXT_DIM, UNETS, tiny_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from linattn import delta_weights
from linattn.adapters import LinearAttention, LinFusion
from linattn.prompt_to_prompt import PromptToPrompt, alignment
from linattn.schedulers import PeRFlowScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("controlnet", "refiner", "ip_adapter", "prompt_to_prompt", "multiview")
# What reordered float32 arithmetic may change in four steps of a tiny UNet, and what an effect must exceed.
ROUNDING = 1e-5
EFFECT = 100 * ROUNDING
PROMPT = "a seven, a two and a four"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def example(monkeypatch):
    """example("refiner"): the script's names, loaded as python loads it, beside its shared module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"perflow_{name}.py")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("applications")


@pytest.fixture(scope="module")
def model(folder):
    """A pipeline that somebody might have, to which a delta is added."""
    path = folder / "model"
    tiny_pipeline("sd15").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def delta(folder):
    """Delta weights as `linattn distill` leaves them: with the scheduler beside them."""
    generator = seeded(1)
    state = tiny_pipeline("sd15").unet.state_dict()
    delta_weights.save(
        {k: 0.02 * torch.randn(v.shape, generator=generator) for k, v in state.items()}, folder / "delta"
    )
    PeRFlowScheduler(prediction_type="diff_eps").save_pretrained(folder / "delta" / "scheduler")
    return folder / "delta"


@pytest.fixture
def student(delta):
    """The model with the delta, without any example: for the pictures that these must draw."""
    pipe = tiny_pipeline("sd15")
    delta_weights.merge(pipe.unet, delta_weights.load(delta))
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")
    return pipe


def picture(seed=0, side=IMAGE_SIZE):
    pixels = torch.randint(0, 256, (side // 4, side // 4, 3), generator=seeded(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def run(script, out, *options):
    script.main([*map(str, options), "--out", str(out)])
    return numpy.asarray(Image.open(out), dtype="float32")


def assert_drawn(pixels, image):
    expected = numpy.asarray(image, dtype="float32")
    assert pixels.shape == expected.shape and abs(pixels - expected).max() <= 1


def differs(a, b):
    return a.shape != b.shape or abs(a - b).max() > 2


def watched_timesteps(monkeypatch):
    """The timesteps of every step that is done."""
    told, step = [], PeRFlowScheduler.step

    def watched(self, output, timestep, sample, **kwargs):
        told.append(int(timestep))
        return step(self, output, timestep, sample, **kwargs)

    monkeypatch.setattr(PeRFlowScheduler, "step", watched)
    return told


def common_call(**more):
    return dict(prompt=PROMPT, num_inference_steps=4, guidance_scale=2.5, generator=seeded(), **more)


# ---------------------------------------------------------------------------------------------------- all the examples


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_settings_for_published_weights(name, example, capsys):
    with pytest.raises(SystemExit) as stopped:
        example(name).main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "hansyan/perflow-" in text and f"python examples/perflow_{name}.py" in text


# The table of docs/perflow.md, "Settings for the published weights".
SETTINGS = {
    "controlnet --preset depth": dict(prediction_type="diff_eps", steps=4, guidance=4.5, shorter=1024),
    "controlnet --preset openpose": dict(prediction_type="diff_eps", steps=4, guidance=4.5, delta_variant="v0-1"),
    "refiner --preset published": dict(prediction_type="diff_eps", steps=4, guidance=4.5, shorter=1024, strength=1.0),
    "ip_adapter --preset published": dict(
        prediction_type="ddim_eps", steps=6, guidance=1.5, ip_scale=0.6, variant="v0-fix", delta=None
    ),
    "multiview --preset published": dict(prediction_type="diff_eps", steps=4, guidance=1.0, size=256),
}


@pytest.mark.parametrize("call", SETTINGS)
def test_presets_are_the_settings_of_the_published_weights(call, example):
    name, *options = call.split()
    args = vars(example(name).parse([*options, "--image", "a.png", "--seed", "3", "--prompt", "mine"]))
    assert {key: args[key] for key in SETTINGS[call]} == SETTINGS[call]
    assert args["seed"] == 3 and args["prompt"] == "mine" and args["windows"] == 4


def test_options_win_over_presets_and_another_model_does_not_get_the_tiny_delta(example):
    parse = example("refiner").parse
    assert parse(["--preset", "published", "--steps", "8", "--delta", "mine"]).delta == "mine"
    assert parse(["--preset", "published", "--steps", "8"]).steps == 8
    assert parse([]).model == "tiny_sd" and parse(["--model", "mine"]).delta is None


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("controlnet", ["--preset", "depth"], "--image: which control picture?"),
        ("controlnet", ["--preset", "pose"], "--preset must be one of tiny, depth, openpose, got pose"),
        ("ip_adapter", [], "--ip-adapter and --weight-name with --model, or --preset published"),
        ("ip_adapter", ["--preset", "published"], "--image: which picture?"),
        ("multiview", ["--image", "a.png"], "--model, or --preset published"),
        ("prompt_to_prompt", ["--weight", "two"], "argument --weight: invalid weight value: 'two'"),
    ],
)
def test_what_is_missing_is_asked_for(name, options, message, example, capsys):
    with pytest.raises(SystemExit) as stopped:
        example(name).parse(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_student_of_unknown_type_is_refused(example, model, tmp_path):
    with pytest.raises(SystemExit, match="--prediction-type: what was the student trained with"):
        run(example("controlnet"), tmp_path / "a.png", "--model", model)


@pytest.mark.parametrize("name, size", [("controlnet", (144, 144)), ("refiner", (288, 288))])
def test_examples_run_as_they_are_on_the_bundled_student(name, size, example, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(example(name), tmp_path / "a.png").shape == (*size, 3)


def test_prompt_to_prompt_runs_as_a_command(tmp_path):
    command = [sys.executable, EXAMPLES / "perflow_prompt_to_prompt.py", "--out", tmp_path / "a.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'a.png'}, 288 x 144 pixels" in done.stdout


# ---------------------------------------------------------------------------------------------------------- ControlNet


@pytest.fixture(scope="module")
def controlnet(folder):
    """A ControlNet whose zero convolutions have been trained away from zero."""
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(tiny_pipeline("sd15").unet, conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=seeded(4)))
    net.save_pretrained(folder / "controlnet")
    return folder / "controlnet"


def with_controlnet(pipe, cls, controlnet):
    net = diffusers.ControlNetModel.from_pretrained(controlnet)
    made = getattr(diffusers, cls)(**{**pipe.components, "controlnet": net})
    made.set_progress_bar_config(disable=True)
    return made


def test_controlnet_example_draws_what_the_pipeline_draws_and_an_untrained_one_changes_nothing(
    example, model, delta, student, controlnet, tmp_path, monkeypatch
):
    script, options = example("controlnet"), ("--model", model, "--delta", delta, "--guidance", 2.5)
    told = watched_timesteps(monkeypatch)
    without = run(script, tmp_path / "a.png", *options)
    assert told == [1000, 750, 500, 250]
    assert_drawn(without, student(**common_call()).images[0])

    picture().save(tmp_path / "control.png")
    control = ("--controlnet", controlnet, "--image", tmp_path / "control.png")
    drawn = run(script, tmp_path / "a.png", *options, *control)
    pipe = with_controlnet(student, "StableDiffusionControlNetPipeline", controlnet)
    assert_drawn(drawn, pipe(image=picture(), **common_call()).images[0])
    assert differs(drawn, without)
    assert not differs(run(script, tmp_path / "a.png", *options, *control, "--controlnet-scale", 0), without)


def test_the_delta_is_merged_into_linear_attention_too(example, model, delta, tmp_path):
    linfusion = LinFusion.construct_for(tiny_pipeline("sd15"), load_pretrained=False)
    with torch.no_grad():
        for parameter in linfusion.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(6))
    linfusion.unmount().save_pretrained(tmp_path / "linfusion")
    options = ("--model", model, "--delta", delta, "--guidance", 2.5)
    drawn = run(example("controlnet"), tmp_path / "a.png", *options, "--linfusion", tmp_path / "linfusion")

    pipe = tiny_pipeline("sd15")
    LinFusion.construct_for(pipe, pretrained_model_name_or_path=tmp_path / "linfusion")
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")
    change = delta_weights.load(delta)
    without_projections = {k: v for k, v in change.items() if ".attn1." not in k}
    with delta_weights.merge(pipe.unet, without_projections, missing="skip"):
        assert differs(drawn, numpy.asarray(pipe(**common_call()).images[0], dtype="float32"))
    delta_weights.merge(pipe.unet, change, missing="skip")
    assert_drawn(drawn, pipe(**common_call()).images[0])


# ------------------------------------------------------------------------------------------------------------- refiner


def test_refiner_enlarges_a_picture_that_is_input_and_control(
    example, model, delta, student, controlnet, tmp_path, monkeypatch
):
    picture(3).crop((0, 0, 32, 24)).save(tmp_path / "small.png")
    options = ("--model", model, "--delta", delta, "--guidance", 2.5, "--controlnet", controlnet)
    told = watched_timesteps(monkeypatch)
    options = (*options, "--image", tmp_path / "small.png", "--scale", 1.7, "--strength", 1)
    drawn = run(example("refiner"), tmp_path / "a.png", *options)
    assert told == [1000, 750, 500, 250]

    # 54.4 x 40.8 in multiples of 8: two pixels for a latent, halved twice by the UNet.
    large = Image.open(tmp_path / "small.png").resize((56, 40), Image.Resampling.LANCZOS)
    pipe = with_controlnet(student, "StableDiffusionControlNetImg2ImgPipeline", controlnet)
    call = common_call(image=large, control_image=large, controlnet_conditioning_scale=1.0, strength=1.0)
    assert_drawn(drawn, pipe(**call).images[0])


@pytest.mark.parametrize("strength, expected", [(0.5, [500, 250]), (0.9, [750, 500, 250])])
def test_refiner_keeps_the_size_and_begins_at_the_start_of_a_window(
    strength, expected, example, model, delta, student, tmp_path, monkeypatch
):
    small = picture(3).crop((0, 0, 32, 24))
    small.save(tmp_path / "small.png")
    told = watched_timesteps(monkeypatch)
    options = ("--model", model, "--delta", delta, "--image", tmp_path / "small.png", "--scale", 1, "--guidance", 2.5)
    drawn = run(example("refiner"), tmp_path / "a.png", *options, "--strength", strength)
    assert drawn.shape == (24, 32, 3) and told == expected
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**student.components)
    assert_drawn(drawn, pipe(image=small, strength=strength, **common_call()).images[0])


def test_refiner_can_draw_its_own_picture_and_decode_in_tiles(example, model, delta, tmp_path, monkeypatch):
    tiles, decoded = [], diffusers.AutoencoderKL.tiled_decode

    def watched(self, z, **kwargs):
        tiles.append(tuple(z.shape[-2:]))
        return decoded(self, z, **kwargs)

    monkeypatch.setattr(diffusers.AutoencoderKL, "tiled_decode", watched)
    options = ("--model", model, "--delta", delta, "--shorter", 64)
    drawn = run(example("refiner"), tmp_path / "a.png", *options)
    assert drawn.shape == (64, 64, 3) and not tiles
    assert run(example("refiner"), tmp_path / "a.png", *options, "--tiled-vae").shape == (64, 64, 3)
    assert tiles == [(32, 32)]


# ---------------------------------------------------------------------------------------------------------- IP-Adapter


def image_encoder():
    torch.manual_seed(1)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=8,
            projection_dim=TEXT_DIM,
        )
    ).eval()


@functools.cache
def ip_adapter(folder, family="sd15"):
    """An IP-Adapter in the published layout: an image encoder, a projection, keys and values for cross-attention."""
    unet, tokens, dim = tiny_pipeline(family).unet, 4, UNETS[family]["cross_attention_dim"]
    path = folder / f"ip_{family}"
    image_encoder().save_pretrained(path / "models" / "image_encoder")
    tensors = {
        "image_proj.proj.weight": torch.randn(tokens * dim, TEXT_DIM, generator=seeded(1)),
        "image_proj.proj.bias": torch.zeros(tokens * dim),
        "image_proj.norm.weight": torch.ones(dim),
        "image_proj.norm.bias": torch.zeros(dim),
    }
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(cross):
        channels = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for j, slot in enumerate(("to_k_ip", "to_v_ip")):
            weight = 2 * torch.randn(channels, dim, generator=seeded(2 * i + j)) / dim**0.5
            tensors[f"ip_adapter.{2 * i + 1}.{slot}.weight"] = weight
    save_file(tensors, path / "models" / "ip-adapter.safetensors")
    return path


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_ip_adapter_example_draws_what_the_pipeline_draws_and_nothing_else_at_scale_zero(
    family, example, model, delta, student, folder, tmp_path
):
    adapter = ip_adapter(folder, family)
    if family == "sd15":
        pipe, options = student, ("--model", model, "--delta", delta)
    else:  # as published: the student itself, whose scheduler is another one
        pipe, options = tiny_pipeline("sdxl"), ("--model", tmp_path / "sdxl", "--prediction-type", "ddim_eps")
        pipe.save_pretrained(tmp_path / "sdxl")
        pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="ddim_eps")
    options = (*options, "--guidance", 2.5, "--ip-adapter", adapter, "--subfolder", "models")
    options = (*options, "--weight-name", "ip-adapter.safetensors", "--image", tmp_path / "prompt.png")
    script = example("ip_adapter")
    picture(5).save(tmp_path / "prompt.png")
    drawn = run(script, tmp_path / "a.png", *options)
    off = run(script, tmp_path / "a.png", *options, "--ip-scale", 0)
    assert_drawn(off, pipe(**common_call()).images[0])
    pipe.load_ip_adapter(str(adapter), subfolder="models", weight_name="ip-adapter.safetensors")
    pipe.set_ip_adapter_scale(0.6)
    assert_drawn(drawn, pipe(ip_adapter_image=picture(5), **common_call()).images[0])
    assert differs(drawn, off)
    picture(6).save(tmp_path / "prompt.png")
    assert differs(run(script, tmp_path / "a.png", *options), drawn)


# ---------------------------------------------------------------------------------------------------- prompt to prompt


EDITED = "a seven, an eight and a four"


def latents(pipe, *args, seed=0, **call):
    call = {"num_inference_steps": 4, "guidance_scale": 2.5, **call}
    return pipe(*args, generator=seeded(seed), output_type="latent", **call).images


@functools.cache
def attentive_unet():
    """Weights of a UNet whose cross-attention matters: as it is drawn, all words look alike to it."""
    unet = tiny_pipeline("sd15").unet
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name and parameter.ndim == 2:
                parameter.mul_(4)
    return unet.state_dict()


@pytest.fixture
def drawer(student):
    student.unet.load_state_dict(attentive_unet())
    return student


def spied_maps(monkeypatch):
    """For each cross-attention of each step: the maps before and after."""
    seen, edit = [], PromptToPrompt.edited_maps

    def watched(self, maps):
        new = edit(self, maps)
        seen.append((self._step, maps, new))
        return new

    monkeypatch.setattr(PromptToPrompt, "edited_maps", watched)
    return seen


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_equal_prompts_draw_equal_pictures_which_are_those_without_control(drawer, guidance):
    alone = latents(drawer, PROMPT, guidance_scale=guidance)
    source, edited = latents(PromptToPrompt(drawer, PROMPT, PROMPT), guidance_scale=guidance)
    assert torch.equal(source, edited)
    assert relative_error(source[None], alone) < ROUNDING


def test_sdxl_and_controlnet_are_controlled_too(student, controlnet):
    pipe = with_controlnet(student, "StableDiffusionControlNetPipeline", controlnet)
    xl = tiny_pipeline("sdxl")
    xl.scheduler = student.scheduler
    for drawer, more in ((pipe, {"image": picture()}), (xl, {"negative_prompt_2": "a nine"})):
        alone = latents(drawer, PROMPT, **more)
        source, edited = latents(PromptToPrompt(drawer, PROMPT, PROMPT), **more)
        assert torch.equal(source, edited) and relative_error(source[None], alone) < ROUNDING


def test_without_steps_each_prompt_draws_its_own_picture(drawer):
    alone = torch.cat([latents(drawer, prompt) for prompt in (PROMPT, EDITED)])
    together = latents(PromptToPrompt(drawer, PROMPT, EDITED, cross_steps=0, self_steps=0))
    assert relative_error(together, alone) < ROUNDING
    assert relative_error(alone[1:], alone[:1]) > EFFECT
    controlled = latents(PromptToPrompt(drawer, PROMPT, EDITED))
    assert relative_error(controlled[:1], alone[:1]) < ROUNDING  # the source is as it was
    assert relative_error(controlled[1:], alone[1:]) > EFFECT


def test_with_full_replacement_the_maps_of_the_edit_are_those_of_the_source(drawer, monkeypatch):
    seen = spied_maps(monkeypatch)
    latents(PromptToPrompt(drawer, PROMPT, EDITED, cross_steps=1, self_steps=0))
    assert {step for step, _, _ in seen} == {0, 1, 2, 3}
    for _, before, after in seen:
        assert torch.equal(after[1], before[0]) and torch.equal(after[0], before[0])
        assert not torch.equal(before[1], before[0])


@pytest.mark.parametrize("fraction, steps, expected", [(0.8, 4, 3), (0.4, 4, 1), (1, 4, 4), (0.5, 5, 2), (0, 4, 0)])
def test_maps_are_replaced_in_the_first_steps(drawer, monkeypatch, fraction, steps, expected):
    seen = spied_maps(monkeypatch)
    latents(PromptToPrompt(drawer, PROMPT, EDITED, cross_steps=fraction), num_inference_steps=steps)
    assert {step for step, before, after in seen if not torch.equal(before, after)} == set(range(expected))
    assert {step for step, *_ in seen} == set(range(steps))


def test_weights_scale_the_maps_of_a_word_in_every_step(drawer, monkeypatch):
    seen = spied_maps(monkeypatch)
    latents(PromptToPrompt(drawer, PROMPT, PROMPT, cross_steps=0.5, weights={"two": 3, "FOUR": 0}))
    two, four = 5, 8  # <start> a seven , a two and a four <end>
    for step, before, after in seen:
        expected = before.clone()
        if step < 2:
            expected[1] = before[0]  # replaced first, then weighted
        expected[1, ..., two] *= 3
        expected[1, ..., four] = 0
        assert torch.allclose(after, expected, rtol=ROUNDING, atol=0)


def test_added_words_keep_their_own_maps(drawer, monkeypatch):
    seen = spied_maps(monkeypatch)
    latents(PromptToPrompt(drawer, "a two and a four", "a two, a seven and a four", cross_steps=1))
    _, before, after = seen[0]
    # <start> a two | , a seven | and a four <end> ...
    assert torch.equal(after[1, ..., 3:6], before[1, ..., 3:6])
    assert torch.equal(after[1, ..., :3], before[0, ..., :3])
    assert torch.equal(after[1, ..., 6:], before[0, ..., 3:-3])


LENGTH = 8
ALIGNMENTS = {
    # words of the source, of the edit, and for each token of the edit where its maps come from
    "equal": ([[1], [2]], [[1], [2]], [{0: 1}, {1: 1}, {2: 1}, {3: 1}, {4: 1}, {5: 1}, {6: 1}, {7: 1}]),
    "swapped": ([[1], [2]], [[1], [3]], [{0: 1}, {1: 1}, {2: 1}, {3: 1}, {4: 1}, {5: 1}, {6: 1}, {7: 1}]),
    "one token for two": (
        [[1], [2, 3]],
        [[1], [4]],
        [{0: 1}, {1: 1}, {2: 1, 3: 1}, {4: 1}, {5: 1}, {6: 1}, {7: 1}, {7: 1}],
    ),
    "two for one": ([[1], [2]], [[1], [4, 5]], [{0: 1}, {1: 1}, {2: 0.5}, {2: 0.5}, {3: 1}, {4: 1}, {5: 1}, {6: 1}]),
    "added": ([[1], [2]], [[1], [3], [2]], [{0: 1}, {1: 1}, {}, {2: 1}, {3: 1}, {4: 1}, {5: 1}, {6: 1}]),
    "left out": ([[1], [3], [2]], [[1], [2]], [{0: 1}, {1: 1}, {3: 1}, {4: 1}, {5: 1}, {6: 1}, {7: 1}, {7: 1}]),
}


@pytest.mark.parametrize("source, edited, expected", ALIGNMENTS.values(), ids=ALIGNMENTS)
def test_tokens_are_aligned_word_by_word(source, edited, expected):
    matrix, counterpart = alignment(source, edited, LENGTH)
    found = [{i: value for i, value in enumerate(column) if value} for column in matrix.T.tolist()]
    assert found == expected
    assert counterpart.tolist() == [float(bool(entry)) for entry in expected]


@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
def test_self_attention_takes_the_queries_and_keys_of_the_source(drawer, linear):
    if linear:
        LinFusion.construct_for(drawer, load_pretrained=False)
    attn = drawer.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1")
    taken = {"q": [], "k": [], "v": []}
    edit = PromptToPrompt(drawer, PROMPT, [EDITED, "a nine"], cross_steps=0, self_steps=0.5, self_tokens=64)
    assert attn.to_q(torch.zeros(1, 64, 32)).shape[1] == 64  # 8 x 8 of the latents' 16 x 16
    with edit._mounted():
        hooks = [
            getattr(attn, f"to_{name}").register_forward_hook(lambda _m, _a, out, name=name: taken[name].append(out))
            for name in taken
        ]
        drawer(edit.prompts, generator=[seeded() for _ in range(3)], num_inference_steps=4, guidance_scale=2.5)
        for hook in hooks:
            hook.remove()
    for step, (q, k, v) in enumerate(zip(*taken.values(), strict=True)):
        assert len(q) == 6  # three without prompt, then three with
        for row in (4, 5):
            shared = torch.equal(q[row], q[3]) and torch.equal(k[row], k[3])
            assert shared == (step < 2) and not torch.equal(v[row], v[3])
        assert torch.equal(q[0], q[1]) == (step == 0)  # rows without prompt are left alone


def test_fine_layers_keep_their_own_self_attention(drawer):
    few = latents(PromptToPrompt(drawer, PROMPT, EDITED, cross_steps=0, self_steps=1, self_tokens=15))
    none = latents(PromptToPrompt(drawer, PROMPT, EDITED, cross_steps=0, self_steps=0))
    assert torch.equal(few, none)
    assert not torch.equal(latents(PromptToPrompt(drawer, PROMPT, EDITED, cross_steps=0, self_steps=1))[1], none[1])


def test_blending_changes_nothing_but_where_the_words_are_drawn(drawer, monkeypatch):
    fifth = 5  # <start> a seven , a TWO ..., <start> a seven , an EIGHT ...

    def drawn_at_the_sides(self, maps):
        side = round(maps.shape[2] ** 0.5)
        column = torch.arange(maps.shape[2]) % side / side
        maps = maps.clone()
        maps[0, ..., fifth], maps[1, ..., fifth] = (column < 0.25).to(maps), (column >= 0.75).to(maps)
        return maps

    monkeypatch.setattr(PromptToPrompt, "edited_maps", drawn_at_the_sides)
    steps = []
    source, edited = latents(
        PromptToPrompt(drawer, PROMPT, EDITED, self_steps=0, blend=["two", "eight"]),
        callback_on_step_end=lambda pipe, step, timestep, kwargs: steps.append(kwargs["latents"]) or kwargs,
    )
    same = (source == edited).all(0)
    # Of 16 columns, with smooth borders: the old word on the left, the new one on the right.
    assert same[:, 7:9].all() and not same[:, :4].any() and not same[:, 12:].any()
    assert len(steps) == 4 and torch.equal(steps[-1], torch.stack([source, edited]))


def test_the_pipeline_is_as_it_was_also_after_an_error(drawer):
    unet = drawer.unet
    before = dict(unet.attn_processors)
    edit = PromptToPrompt(drawer, PROMPT, EDITED)
    generator = seeded()
    edit(generator=generator, num_inference_steps=4, output_type="latent", negative_prompt="a nine")
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=seeded()))
    with pytest.raises(ValueError, match="at least the number of windows"):
        edit(num_inference_steps=2)
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(edited=[]), "edited must be a prompt or several"),
        (dict(cross_steps=1.5), "cross_steps must be a fraction .* got 1.5"),
        (dict(self_steps=-1), "self_steps must be a fraction .* got -1"),
        (dict(blend="two", blend_threshold=1), "blend_threshold must be between 0 and 1, got 1"),
        (dict(weights={"five": 2}), "weights: no prompt has the word 'five'"),
        (dict(blend="five"), "blend: no prompt has the word 'five'"),
        (dict(blend="two"), "must name a word of every prompt, got .*'two'.* the prompt 'a seven, an eight"),
        (dict(edited="a two " * 50), "a prompt may have .* tokens"),
    ],
)
def test_control_that_means_nothing_is_refused(student, options, message):
    with pytest.raises(ValueError, match=message):
        PromptToPrompt(student, PROMPT, **{"edited": EDITED, **options})


@pytest.mark.parametrize("call", [dict(prompt="a two"), dict(prompt_2="a two"), dict(num_images_per_prompt=2)])
def test_calls_that_say_other_prompts_are_refused(student, call):
    with pytest.raises(ValueError, match=next(iter(call))):
        PromptToPrompt(student, PROMPT, EDITED)(num_inference_steps=4, **call)


def test_models_without_plain_cross_attention_are_refused(student, folder):
    with pytest.raises(ValueError, match="a pipeline with a UNet, got SimpleNamespace"):
        PromptToPrompt(SimpleNamespace(tokenizer=student.tokenizer), PROMPT, EDITED)
    edit = PromptToPrompt(student, PROMPT, EDITED)
    student.load_ip_adapter(str(ip_adapter(folder)), subfolder="models", weight_name="ip-adapter.safetensors")
    with pytest.raises(ValueError, match=r"attn2 has a IPAdapterAttnProcessor2_0"):
        edit(num_inference_steps=4)


@pytest.mark.parametrize("linfusion", [(), ("--linfusion", "base")], ids=["softmax", "linear"])
def test_prompt_to_prompt_example_draws_what_the_class_draws(example, model, delta, student, tmp_path, linfusion):
    options = ("--model", model, "--delta", delta, "--guidance", 2.5, "--edit", EDITED, "--weight", "eight=2")
    drawn = run(example("prompt_to_prompt"), tmp_path / "a.png", *options, "--blend", "two", "eight", *linfusion)
    if linfusion:
        LinFusion.construct_for(student, load_pretrained=False)
    edit = PromptToPrompt(student, PROMPT, EDITED, weights={"eight": 2}, blend=["two", "eight"])
    call = common_call()
    del call["prompt"]
    images = edit(**call).images
    assert_drawn(drawn, numpy.concatenate([numpy.asarray(image) for image in images], axis=1))


# ---------------------------------------------------------------------------------------------------------- multiview

VIEWS = 3


@pytest.fixture(scope="module")
def multiview(folder):
    """A model laid out as Wonder3D's: a stock UNet's config with names of its own, and weights of blocks of its own."""
    script = SimpleNamespace(**run_beside_common("multiview"))
    pipe = tiny_pipeline("sd15", in_channels=8, class_embed_type="projection", projection_class_embeddings_input_dim=10)
    path, generator = folder / "multiview", seeded(7)
    for name in ("vae", "scheduler"):
        getattr(pipe, name).save_pretrained(path / name)
    image_encoder().save_pretrained(path / "image_encoder")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(path / "feature_extractor")

    config = {**pipe.unet.config, "num_views": VIEWS, "cd_attention_mid": True, "_class_name": "UNetMV2DConditionModel"}
    unet = script.MultiviewUNet.from_config(config)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "joint_mid" in name:  # trained: not zero any more
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(path / "unet")
    for key in ("down_block_types", "up_block_types"):
        config[key] = [name.replace("2D", "MV2D") if "Cross" in name else name for name in config[key]]
    config["mid_block_type"] = "UNetMidBlockMV2DCrossAttn"
    (path / "unet" / "config.json").write_text(json.dumps(config))
    picture(8).save(path / "object.png")
    return path


def run_beside_common(name):
    """For fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return runpy.run_path(str(EXAMPLES / f"perflow_{name}.py"))


def views_of(unet, x, **changed):
    """What the UNet says about rows of latents, all else equal."""
    call = dict(timestep=750, encoder_hidden_states=torch.ones(len(x), 1, TEXT_DIM))
    labels = torch.linspace(-1, 1, 10).expand(len(x), 10)
    with torch.no_grad():
        return unet(x, **{**call, **changed}, class_labels=labels).sample


def test_multiview_example_draws_every_view_in_both_domains(example, multiview, delta, tmp_path, monkeypatch):
    told = watched_timesteps(monkeypatch)
    options = ("--model", multiview, "--delta", delta, "--image", multiview / "object.png")
    drawn = run(example("multiview"), tmp_path / "a.png", *options)
    assert told == [1000, 750, 500, 250]
    assert drawn.shape == (IMAGE_SIZE, 2 * VIEWS * IMAGE_SIZE, 3)
    tiles = numpy.split(drawn, 2 * VIEWS, axis=1)
    assert all(differs(a, b) for i, a in enumerate(tiles) for b in tiles[:i])
    picture(9).save(tmp_path / "other.png")
    assert differs(run(example("multiview"), tmp_path / "a.png", *options, "--image", tmp_path / "other.png"), drawn)
    assert differs(run(example("multiview"), tmp_path / "a.png", *options, "--guidance", 2), drawn)


def test_the_weights_of_all_blocks_are_loaded(example, multiview):
    unet = example("multiview").load(SimpleNamespace(model=multiview, views=None)).unet
    saved = delta_weights._weights(unet)
    loaded = {k: v for file in (multiview / "unet").glob("*.safetensors") for k, v in load_file(file).items()}
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], value) for key, value in loaded.items())
    assert any("attn_joint_mid.to_q" in key for key in loaded)
    assert (unet.views, unet.domains) == (VIEWS, 2)


@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
def test_views_see_each_other_in_self_attention_alone(example, multiview, linear):
    unet = example("multiview").load(SimpleNamespace(model=multiview, views=None)).unet
    if linear:
        LinFusion.construct_for(unet, load_pretrained=False)
    # Two objects, three views, two domains: rows in the order domain, object, view.
    x = torch.randn(12, 8, 16, 16, generator=seeded(3))
    changed = x.clone()
    changed[4] += 1  # normals of the second view of the second object
    blocks = [module for module in unet.modules() if type(module).__name__ == "MultiviewBlock"]

    def reached():
        before, after = views_of(unet, x), views_of(unet, changed)
        return [i for i in range(12) if relative_error(after[i], before[i]) > ROUNDING]

    assert reached() == [3, 4, 5, 9, 10, 11]  # its object in both domains, and nothing of the other
    for block in blocks:
        block.domains = 1
    assert reached() == [3, 4, 5]
    for block in blocks:
        block.views = 1
    assert reached() == [4]


def test_without_views_and_domains_the_unet_is_the_stock_one(example):
    stock = tiny_pipeline("sd15").unet
    unet = example("multiview").MultiviewUNet.from_config(stock.config, views=1)
    unet.load_state_dict(stock.state_dict())
    x = torch.randn(3, 4, 16, 16, generator=seeded(3))
    call = dict(timestep=750, encoder_hidden_states=torch.ones(3, 1, TEXT_DIM))
    with torch.no_grad():
        assert relative_error(unet(x, **call).sample, stock(x, **call).sample) < ROUNDING


@pytest.mark.parametrize("policy", ["skip", "pad"])
def test_the_delta_leaves_what_the_base_model_does_not_have(example, multiview, delta, policy):
    script, argv = example("multiview"), ["--model", str(multiview), "--delta", str(delta), "--image", "a.png"]
    args = script.parse([*argv, "--extra-channels", policy])
    before = {k: v.clone() for k, v in script.load(args).unet.state_dict().items()}
    parts = script.load(args)
    merge = script.common.few_steps(parts, args, extra_channels=args.extra_channels)
    after, change = parts.unet.state_dict(), delta_weights.load(delta)
    own = {key for key in before if "joint_mid" in key or "class_embedding" in key}
    assert own and own == set(merge.untouched)
    for key, weight in before.items():
        if key == "conv_in.weight":
            assert torch.equal(after[key][:, 4:], weight[:, 4:])
            expected = weight[:, :4] + (change[key] if policy == "pad" else 0)
            assert torch.equal(after[key][:, :4], expected)
        else:
            assert torch.equal(after[key], weight if key in own else weight + change[key]), key
    assert merge.skipped == (["conv_in.weight"] if policy == "skip" else [])


def test_views_can_have_linear_attention(example, multiview, delta):
    script = example("multiview")
    argv = ["--model", str(multiview), "--delta", str(delta), "--image", "a.png", "--linfusion", "base"]
    args = script.parse(argv)
    parts = script.load(args)
    merge = script.common.few_steps(parts, args, extra_channels="skip")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert isinstance(parts.unet.get_submodule(name), LinearAttention) and f"{name}.to_q.weight" in merge.merged
    image = Image.open(multiview / "object.png")
    assert len(script.draw(parts, image, IMAGE_SIZE, 4, 1.0, seeded())) == 2 * VIEWS


def test_cameras_are_sines_and_cosines_of_where_they_are(example, multiview):
    script = example("multiview")
    unet = script.load(SimpleNamespace(model=multiview, views=6)).unet
    labels = script.class_labels(unet)
    assert labels.shape == (12, 10)
    third = torch.tensor([0.0, -0.1686, 1.6934, 0.0, 1.0])  # the third camera in colour
    assert torch.allclose(labels[8], torch.cat([third.sin(), third.cos()]))
    four = script.class_labels(script.load(SimpleNamespace(model=multiview, views=4)).unet)
    assert torch.allclose(four[1, 2].asin(), torch.tensor(torch.pi / 2))  # a quarter round
