"""The authors' checkpoints of Inf-DiT become pipelines; pickles are read and not run; mistakes are named."""

import argparse
import ast
import collections
import contextlib
import copyreg
import os
import pickle
import re
import zipfile

import pytest
import torch
from helpers import goldens
from helpers.goldens import relative_error

pytest.importorskip("diffusers", reason='Inf-DiT needs the extra: pip install "linattn[diffusers]"')
pytest.importorskip("transformers", reason='Inf-DiT needs the extra: pip install "linattn[diffusers]"')

from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from linattn import cli
from linattn.adapters import InfDiTTransformer2DModel, InfDiTUpscalePipeline, convert_infdit_checkpoint
from linattn.adapters.infdit import _pickled, convert, official
from linattn.schedulers import EDMScheduler

pytestmark = pytest.mark.usefixtures("one_thread_in_module")

PUBLISHED = goldens.ROOT.parent / "spec" / "infdit_state_dict.txt"
SIZES = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "block_size": 4, "vector_dim": 24}
NAME = "mp_rank_00_model_states.pt"


def weights(**sizes):
    """A state dict of the authors' names, with everything in it that the network does not use."""
    torch.manual_seed(0)
    state = official.to_official_names(InfDiTTransformer2DModel(**SIZES | sizes))
    state = {key: torch.randn_like(value) for key, value in state.items()}
    state |= {
        "mixins.adaln_layer.k_layer_norm.0.weight": torch.ones(16),
        "mixins.adaln_layer.rope.freqs_cos": torch.ones(4, 4, 16),
        "transformer.position_embeddings.weight": torch.ones(4, 32),
        "image_encoder.model.logit_scale": torch.tensor(1.0),
    }
    return collections.OrderedDict(state)


def tower(width=64, layers=2, dim=24, mlp=96):
    """open_clip's image tower, under the checkpoint's names."""
    torch.manual_seed(1)
    shapes = {"class_embedding": (width,), "positional_embedding": (17, width), "proj": (width, dim)}
    shapes["conv1.weight"] = (width, 3, 8, 8)
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        linear = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
        linear |= {"mlp.c_fc.": (mlp, width), "mlp.c_proj.": (width, mlp)}
        for name, (out, given) in linear.items():
            shapes |= {f"{block}.{name}weight": (out, given), f"{block}.{name}bias": (out,)}
    return {f"image_encoder.model.visual.{key}": torch.randn(shape) * 0.2 for key, shape in shapes.items()}


def saved(folder, state, name=NAME, **options):
    """As DeepSpeed saves it: the state dict among other things, some of them objects."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {"module": state, "optimizer": None, "iteration": 7, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, folder / name, **options)
    return folder / name


def loaded_weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


# -------------------------------------------------------------------------------------------------- the whole way round


@pytest.mark.parametrize("form", ["deepspeed", "state dict", "before torch 1.6", "safetensors"])
def test_a_checkpoint_becomes_a_pipeline_with_its_weights(form, tmp_path):
    state = weights() | tower()
    if form == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file(state, source)
    elif form == "deepspeed":
        source = saved(tmp_path, state)
    else:
        source = tmp_path / "model.pt"
        torch.save(state, source, _use_new_zipfile_serialization=form == "state dict")
    report = convert_infdit_checkpoint(source, tmp_path / "out")

    pipe = InfDiTUpscalePipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert {key: pipe.transformer.config[key] for key in SIZES} == SIZES
    back = official.to_official_names(pipe.transformer)
    assert set(back) < set(state) and all(torch.equal(back[key], state[key]) for key in back)
    assert isinstance(pipe.image_encoder, CLIPVisionModelWithProjection)
    assert dict(pipe.scheduler.config)["sigma_max"] == 40
    assert (report.image_encoder, report.dtype, report.source) == ("checkpoint", torch.float32, source)
    assert sorted(report.unused) == [
        "image_encoder.model.logit_scale",
        "mixins.adaln_layer.k_layer_norm.0.weight",
        "mixins.adaln_layer.rope.freqs_cos",
        "transformer.position_embeddings.weight",
    ]
    assert f"{report.parameters:,} parameters, float32, hidden_size=32" in str(report)
    assert "image encoder: from the checkpoint" in str(report) and "4 keys of the file are not used" in str(report)
    large = pipe(torch.zeros(3, 4, 4), num_inference_steps=1, output_type="pt").images
    assert large.shape == (1, 3, 16, 16)


@goldens.needs_goldens
def test_the_image_encoder_is_the_tower_of_the_original():
    golden, _ = goldens.load("infdit", "clip_image_tower")
    state = {key[2:]: value.float() for key, value in golden.items() if key.startswith("w.")}
    encoder = convert.image_encoder_of(state, heads=2)
    with torch.no_grad():
        embedding = encoder(golden["pixels"].float()).image_embeds
    assert relative_error(embedding, golden["embedding_unnormalised"]) < 1e-5
    pipe = InfDiTUpscalePipeline(InfDiTTransformer2DModel(**SIZES), EDMScheduler(), encoder)
    lr = torch.rand(2, 3, 32, 48) * 2 - 1
    torch.testing.assert_close(pipe.encode_image(lr).norm(dim=1), torch.ones(2))


def published():
    if not PUBLISHED.exists():
        pytest.skip(f"no list of the published keys at {PUBLISHED}")
    shapes = {}
    for line in PUBLISHED.read_text().splitlines():
        if match := re.fullmatch(r"[PB] (\S+) (\(.*\))", line):
            shapes[match[1]] = ast.literal_eval(match[2])
    return {key: torch.empty(shape, device="meta", dtype=torch.bfloat16) for key, shape in shapes.items()}


def test_the_published_checkpoint_has_the_default_sizes_and_every_key_has_its_place():
    state = published()
    assert len(state) == 726
    with torch.device("meta"):
        default = InfDiTTransformer2DModel()
        sizes = convert.config_of(state)
        network = InfDiTTransformer2DModel(**sizes)
    assert sizes == {key: default.config[key] for key in sizes}
    own = official.to_own_names(network, state)
    assert set(own) == set(network.state_dict())
    assert sum(parameter.numel() for parameter in network.parameters()) == 753_762_928 - dead_weights(state)

    config, encoder = convert.tower_of(state)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.image_size, config.patch_size, config.projection_dim) == (224, 14, 768)
    assert (config.intermediate_size, config.hidden_act, config.layer_norm_eps) == (4096, "gelu", 1e-5)
    used = sum(key.startswith("image_encoder.model.visual.") for key in state)
    # Each fused projection of queries, keys and values is three of transformers'.
    assert len(encoder) == used + 2 * 2 * 24


def dead_weights(state):
    """Parameters that the authors' network has and never uses."""
    dead = [
        key for key in state if key.startswith(("mixins.adaln_layer.k_layer_norm", "transformer.position_embeddings"))
    ]
    return sum(state[key].numel() for key in dead)


def test_a_network_without_image_vector_is_saved_without_encoder(tmp_path):
    report = convert_infdit_checkpoint(saved(tmp_path, weights(vector_dim=0)), tmp_path / "out")
    assert report.config["vector_dim"] == 0 and report.image_encoder is None and "image encoder" not in str(report)
    assert InfDiTUpscalePipeline.from_pretrained(tmp_path / "out").image_encoder is None


def test_other_sizes_are_read_off_the_weights(tmp_path):
    sizes = {"hidden_size": 48, "num_layers": 3, "num_attention_heads": 3, "block_size": 8, "vector_dim": 5}
    sizes |= {"patch_size": 2, "lr_patch_size": 2, "sr_scale": 2, "in_channels": 5, "out_channels": 4}
    state = official.to_official_names(InfDiTTransformer2DModel(**sizes))
    assert convert.config_of(state) == sizes


@pytest.mark.parametrize("name", ["bf16", "bfloat16", torch.bfloat16, None])
def test_weights_are_saved_in_the_type_that_is_asked_for(name, tmp_path):
    report = convert_infdit_checkpoint(saved(tmp_path, weights() | tower()), tmp_path / "out", dtype=name)
    expected = torch.float32 if name is None else torch.bfloat16
    assert report.dtype == expected
    assert {tensor.dtype for tensor in loaded_weights(tmp_path / "out").values()} == {expected}
    encoder = load_file(tmp_path / "out" / "image_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in encoder.values()} == {expected}


def test_large_files_are_cut_into_several(tmp_path):
    source = saved(tmp_path, weights())
    convert_infdit_checkpoint(source, tmp_path / "out", max_shard_size="60KB")
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    pipe = InfDiTUpscalePipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipe.transformer.patch_embed.weight, weights()["mixins.patch_embed.proj.weight"])


def test_an_image_encoder_from_a_folder_takes_the_place_of_the_checkpoints(tmp_path):
    other = convert.image_encoder_of(tower(layers=1))
    other.save_pretrained(tmp_path / "clip")
    source = saved(tmp_path, weights() | tower())
    report = convert_infdit_checkpoint(source, tmp_path / "out", image_encoder=tmp_path / "clip")
    assert report.image_encoder == str(tmp_path / "clip") and f"from {tmp_path / 'clip'}" in str(report)
    assert InfDiTUpscalePipeline.from_pretrained(tmp_path / "out").image_encoder.config.num_hidden_layers == 1


def test_without_any_image_encoder_the_report_says_so(tmp_path):
    report = convert_infdit_checkpoint(saved(tmp_path, weights()), tmp_path / "out")
    assert report.image_encoder is None
    assert "image encoder: none: calls of the pipeline need image_embeds" in str(report)


def test_the_file_is_found_in_the_folder_that_training_writes(tmp_path):
    source = saved(tmp_path / "ckpt" / "5000", weights())
    assert convert_infdit_checkpoint(tmp_path / "ckpt", tmp_path / "out").source == source
    save_file(weights(), tmp_path / "other.safetensors")
    assert convert._find(tmp_path / "other.safetensors").name == "other.safetensors"


# ------------------------------------------------------------------------------------------------------ what is written


def test_what_is_there_is_not_overwritten(tmp_path):
    source = saved(tmp_path, weights())
    (tmp_path / "out").mkdir()
    convert_infdit_checkpoint(source, tmp_path / "out")  # an empty folder is none
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="out exists and is not an empty folder"):
        convert_infdit_checkpoint(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"{NAME} exists and is not an empty folder"):
        convert_infdit_checkpoint(source, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source = saved(tmp_path, weights())
    save = InfDiTUpscalePipeline.save_pretrained

    def fails(self, folder, **options):
        save(self, folder, **options)
        raise OSError("no space left")

    monkeypatch.setattr(InfDiTUpscalePipeline, "save_pretrained", fails)
    with pytest.raises(OSError, match="no space left"):
        convert_infdit_checkpoint(source, tmp_path / "models" / "out")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_folder_is_as_readable_as_others(tmp_path):
    convert_infdit_checkpoint(saved(tmp_path, weights()), tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# -------------------------------------------------------------------------------------------------- pickles are not run


class Payload:
    """Pickles to a call of os.mkdir, with all that an object can be given after it was made."""

    def __init__(self, folder, extras=False):
        self.folder, self.extras = str(folder), extras

    def __reduce__(self):
        call = (os.mkdir, (self.folder,))
        if self.extras:
            return (*call, ({"a": 1}, {"b": 2}), iter([1, 2]), iter([(3, 4)]))
        return call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_with_a_payload_is_read_and_the_payload_does_not_run(protocol, tmp_path):
    marker = tmp_path / "ran"
    state = weights()
    state._metadata = {"": Payload(marker)}
    source = saved(tmp_path, state)
    everywhere = {
        "module": state,
        "a": Payload(marker),
        "b": [Payload(marker, extras=True)],
        "c": {Payload(marker): {Payload(marker)}},
        "d": argparse.Namespace(x=Payload(marker)),
    }
    torch.save(everywhere, source, pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(source, weights_only=True)
    read = convert.read(source)
    assert list(read) == list(state) and all(torch.equal(read[key], state[key]) for key in state)
    convert_infdit_checkpoint(source, tmp_path / "out")
    assert not marker.exists()
    # It does run where nobody looks.
    with contextlib.suppress(FileExistsError):  # the second time
        torch.load(source, weights_only=False)
    assert marker.exists()


PROGRAMS = {
    "REDUCE": b"cos\nmkdir\n(V%s\ntR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(V%s\ntR.",
    "INST": b"(V%s\nios\nmkdir\n.",
    "OBJ": b"(cos\nmkdir\nV%s\no.",
    "getattr of an import": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVmkdir\ntR(V%s\ntR.",
    "eval": b"cbuiltins\neval\n(V__import__('os').mkdir('%s')\ntR.",
    "within a tensor": b"ctorch._utils\n_rebuild_parameter\n(cos\nmkdir\n(V%s\ntRtR.",
    "as a tensor's maker": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nctorch\nTensor\n(V%s\nt}tR.",
    "in a state": b"ccollections\nOrderedDict\n)R}Va\ncos\nmkdir\n(V%s\ntRsb.",
    "through a class": b"clogging\nFileHandler\n(V%s\ntR.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_no_opcode_runs_anything(program, tmp_path):
    marker = tmp_path / "ran"
    program = program % str(marker).encode()
    _pickled._run(program)
    assert not marker.exists()
    # It does run where nobody looks.
    with contextlib.suppress(TypeError, AttributeError):  # after the call: what it returns is no tensor
        pickle.loads(program)
    assert marker.exists()


def test_objects_that_this_process_has_registered_are_not_handed_out(tmp_path):
    """EXT opcodes name them by a number, and those that were used before are not looked up again."""
    program = b"\x80\x02\x82\x77(V%s\ntR." % str(tmp_path / "ran").encode()
    copyreg.add_extension("os", "mkdir", 0x77)
    try:
        pickle.loads(program)
        os.rmdir(tmp_path / "ran")
        with pytest.raises(pickle.UnpicklingError, match="EXT1"):
            _pickled._run(program)
    finally:
        copyreg.remove_extension("os", "mkdir", 0x77)
        copyreg.clear_extension_cache()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("target", ["ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n", "cx\ny\n"])
def test_a_file_cannot_change_how_the_next_one_is_read(target):
    """BUILD sets attributes of whatever it is given, also of classes."""
    program = target.encode() + b"(N}V__setstate__\nNsV_args\nNstb."
    before = {kind: dict(vars(kind)) for kind in (_pickled._Strided, _pickled._Dict, _pickled.Inert)}
    _pickled._run(program)
    assert {kind: dict(vars(kind)) for kind in before} == before


def test_an_old_pickle_with_a_payload_is_refused(tmp_path):
    source = tmp_path / "model.pt"
    marker = tmp_path / "ran"
    torch.save({"module": weights(), "a": Payload(marker)}, source, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"model.pt is neither .* nor an older one of tensors alone"):
        convert_infdit_checkpoint(source, tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_tensors_of_all_kinds_are_read_as_they_were(tmp_path):
    base = torch.arange(24.0).view(2, 3, 4)
    given = {
        "view": base.transpose(0, 2)[1:],
        "parameter": torch.nn.Parameter(base[0]),
        "number": torch.tensor(3.5, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 3),
        "whole": torch.arange(5, dtype=torch.int16),
        "truth": torch.tensor([True, False]),
        "double": base.double(),
    }
    torch.save(given, tmp_path / "x.pt")
    read = convert.read(tmp_path / "x.pt")
    for key, value in given.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value.detach()), key
    read["whole"].fill_(0)
    assert torch.equal(convert.read(tmp_path / "x.pt")["whole"], given["whole"])


# ------------------------------------------------------------------------------------------------------------- mistakes


def rewritten(source, target, change, **options):
    """A copy of an archive with other members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def damaged(change, **options):
    return lambda folder: rewritten(saved(folder, weights(), "good.pt"), folder / "x.pt", change, **options)


def short(name, content):
    return content[:-4] if "/data/" in name else content


def far(name, content):
    """The first tensor begins far behind its storage."""
    return content.replace(b"QK\x00(", b"QJ\xff\xff\xff\x0f(", 1) if name.endswith("data.pkl") else content


def text(folder):
    (folder / "x.pt").write_text("no weights")
    return folder / "x.pt"


def named(content):
    def write(folder):
        torch.save(content, folder / "x.pt")
        return folder / "x.pt"

    return write


def without(*keys, **more):
    state = weights()
    for key in keys:
        del state[key]
    return named(state | more)


FILES = {
    "text": (text, "neither a file of torch.save"),
    "truncated": (
        lambda folder: (
            (folder / "x.pt").write_bytes(saved(folder, weights(), "good.pt").read_bytes()[:-100]),
            folder / "x.pt",
        )[1],
        "x.pt",
    ),
    "short storage": (damaged(short), "is damaged: storage .* holds"),
    "beyond its storage": (damaged(far), "is damaged: .*out of bounds"),
    "no pickle": (damaged(lambda name, c: None if name.endswith("data.pkl") else c), "has 0 data.pkl"),
    "broken pickle": (
        damaged(lambda name, c: c[:50] if name.endswith("data.pkl") else c),
        r"x\.pt is damaged: UnpicklingError",
    ),
    "compressed": (damaged(lambda _, c: c, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "big-endian": (damaged(lambda name, c: b"big" if name.endswith("byteorder") else c), "another byte order"),
    "a list": (named([1, 2]), r"holds \[1, 2\], expected a dict of tensors"),
    "no tensors": (named({"a": 1, "b": "x"}), r"no tensors are: 'a' \(int\), 'b' \(str\)"),
    "another model": (named({"conv.weight": torch.ones(1)}), "lacks mixins.patch_embed.proj.weight, .*conv.weight"),
    "a missing key": (without("mixins.patch_embed.proj.bias"), "1 missing .mixins.patch_embed.proj.bias"),
    "an extra key": (without(extra=torch.ones(1)), r"1 unknown \(extra\)"),
    "a key of another shape": (
        without(**{"time_embed.mlp.0.bias": torch.ones(5)}),
        r"of another shape \(time_embed.linear_1.bias: \(5,\) instead of \(32,\)",
    ),
    "shapes that contradict": (
        without(**{"mixins.adaln_layer.lr_key_position_embedding": torch.ones(1, 35, 2, 16)}),
        r"shapes do not fit together: .*lr_key_position_embedding \(1, 35, 2, 16\)",
    ),
    "half a tower": (
        without(**{k: v for k, v in tower().items() if "ln_pre.bias" not in k and "blocks.1.attn.in" not in k}),
        r"does not fit; keys \d+ missing \(vision_model.encoder.layers.1.self_attn.k_proj.bias",
    ),
    "a tower with more": (
        without(**tower(), **{"image_encoder.model.visual.extra": torch.ones(1)}),
        r"1 unknown \(image_encoder.model.visual.extra\)",
    ),
    "a tower without": (
        without(**{"image_encoder.model.visual.proj": torch.ones(64, 24)}),
        "lacks image_encoder.model.visual.conv1.weight",
    ),
    "a tower of another width": (without(**tower(dim=20)), "gives vectors of 20, the network wants 24"),
    "no heads": (without(**tower(width=32)), "image_encoder_heads must divide .* 32, got 0"),
}


@pytest.mark.parametrize(("write", "message"), FILES.values(), ids=FILES)
def test_files_that_are_no_checkpoint_are_refused_with_the_reason(write, message, tmp_path):
    source = write(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert_infdit_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file"):
        convert_infdit_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")


def test_folders_without_the_one_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert_infdit_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither mp_rank_\*_model_states.pt nor another"):
        convert_infdit_checkpoint(tmp_path / "empty", tmp_path / "out")
    for step in "12":
        saved(tmp_path / "many" / step, {})
    with pytest.raises(ValueError, match=f"many holds several files of weights .1/{NAME}, 2/{NAME}.: pass the one"):
        convert_infdit_checkpoint(tmp_path / "many", tmp_path / "out")


def test_arguments_that_are_none_are_named(tmp_path):
    source = saved(tmp_path, weights())
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16 or None, got 'int8'"):
        convert_infdit_checkpoint(source, tmp_path / "out", dtype="int8")
    with pytest.raises(FileNotFoundError, match=r"image_encoder must be a folder, got .*nowhere"):
        convert_infdit_checkpoint(source, tmp_path / "out", image_encoder=tmp_path / "nowhere")
    convert.image_encoder_of(tower(dim=20)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip gives vectors of 20, the network wants 24"):
        convert_infdit_checkpoint(source, tmp_path / "out", image_encoder=tmp_path / "clip")
    source = saved(tmp_path, weights(vector_dim=0))
    with pytest.raises(ValueError, match="image_encoder is of no use: this network has vector_dim = 0"):
        convert_infdit_checkpoint(source, tmp_path / "out", image_encoder=tmp_path / "clip")


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_converts_and_prints_the_folder(tmp_path, capsys):
    source = saved(tmp_path / "ckpt", weights() | tower())
    convert.image_encoder_of(tower(layers=1)).save_pretrained(tmp_path / "clip")
    out = tmp_path / "out"
    arguments = ["--dtype", "bf16", "--image-encoder", str(tmp_path / "clip")]
    assert cli.main(["convert", "infdit", str(source.parent), str(out), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "bfloat16" in printed.err and f"image encoder: from {tmp_path / 'clip'}" in printed.err
    assert loaded_weights(out)["patch_embed.weight"].dtype == torch.bfloat16


def test_the_command_says_in_a_line_what_is_wrong(tmp_path, capsys):
    assert cli.main(["convert", "infdit", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"linattn convert: {tmp_path / 'nowhere'} does not exist\n"
    with pytest.raises(SystemExit):
        cli.main(["convert", "sdxl", "a", "b"])
    assert "invalid choice: 'sdxl'" in capsys.readouterr().err
