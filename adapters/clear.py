"""CLEAR: the attention of FLUX and Stable Diffusion 3 over a window of neighbours, all text, and pooled keys.

    image query (y, x) sees: all text, (y', x') with (y - y')^2 + (x - x')^2 < window_size^2, all pooled keys
    text query sees:         all text, all image, no pooled keys

Pooled keys, one for each down_factor x down_factor image tokens, exist where down_factor > 1: weighted sums of keys and
values after norm and rotation, by a learned weight of each layer. The function and its gradient stand in
docs/window_attention.md; the adapter holds no attention math, it only mounts modules that call the op.

    clear = CLEAR.construct_for(
        pipeline, pretrained_model_name_or_path="Huage001/CLEAR", weight_name="clear_local_16_down_4.safetensors"
    )
    ...
    clear.unmount()

Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (arXiv 2412.16112).
Checkpoints of its authors load as they are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from . import _clear_files as files
from ._grid import Grid
from ._mount import (
    Mount,
    base_layer,
    find_transformer,
    is_merged,
    is_offloaded,
    layer_at,
    refuse_fused,
    some,
    subtract_fused,
    weight_dtype,
    weights_present,
    wrappers,
)
from ._window_modules import (
    SLOTS,
    WindowAttnProcessor,
    _WindowAttention,
    copied_layer,
    is_ip_adapter,
    is_stock,
    window_module,
)

# Attention of a transformer that is CLEAR's; an IP-Adapter brings more, in its image projection.
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
# Sequence length at which FLUX was trained (64 x 64 image and 512 text tokens), the base of the logarithm in CLEAR's
# proportional attention; text tokens of SD3 (77 of CLIP, 256 of T5) for the same number there.
_FLUX_TRAINING_LENGTH = 64 * 64 + 512
_SD3_TEXT = 77 + 256


class _Layers(nn.Module):
    """The weights for one attention, under the names they have in it: to_q, to_k, to_v, to_out.0, processor."""

    def __init__(self, dim: int, to_out: bool, down_factor: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (_zero_linear(dim) for _ in range(3))
        if to_out:
            self.to_out = nn.ModuleList([_zero_linear(dim)])
        self.processor = WindowAttnProcessor(down_factor)


class CLEAR(ModelMixin, ConfigMixin):
    """Window attention for a FLUX or SD3 transformer: built, mounted, unmounted, loaded and saved as one model.

    Its own parameters have the names that they have in the transformer, which are the published ones:
    `transformer_blocks.0.attn.to_q.weight`, ..., `single_transformer_blocks.0.attn.processor.spatial_weight`.

    Args:
        window_size: the radius of the window in tokens; strict, so that 1 is the token itself.
        down_factor: f, one pooled key for f x f tokens; 1: none.
        modules_list: one entry per attention, `{"module_name": qualified name in the transformer, "dim": channels,
            "to_out": whether it has an output projection}`.
        base: class of the transformer these weights are for; None: not said.

    Attributes:
        config: these arguments.
    """

    # By keyword only: diffusers takes what is passed by position for a default, and from_config then leaves it out.
    @register_to_config
    def __init__(self, *, window_size: int, down_factor: int, modules_list: list[dict], base: str | None = None):
        super().__init__()
        _at_least_one("window_size", window_size)
        _at_least_one("down_factor", down_factor)
        for index, entry in enumerate(modules_list):
            if set(entry) != {"module_name", "dim", "to_out"}:
                raise ValueError(
                    f"modules_list[{index}] must have the keys ['dim', 'module_name', 'to_out'], got {sorted(entry)}"
                )
            _add(self, entry["module_name"], _Layers(entry["dim"], entry["to_out"], down_factor))
        self._mount: Mount | None = None
        self._grid = Grid()
        self._hook = None
        self._theta: float | None = None
        self._high_resolution = (1.0, False)

    # ---- what it holds

    @property
    def modules_dict(self) -> dict[str, nn.Module]:
        """Name in the transformer -> the mounted attention module; while not mounted, the layers for it."""
        if self._mount is not None:
            return dict(self._mount.replacements)
        return {entry["module_name"]: self.get_submodule(entry["module_name"]) for entry in self.config.modules_list}

    @property
    def mounted(self) -> bool:
        return self._mount is not None

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Published key -> parameter. These, and no others, are what distillation trains.

        Raises:
            ValueError: some of the transformer's own layers stay in use because they are quantised.
        """
        self._refuse_incomplete()
        return dict(self.named_parameters())

    def published_state_dict(self) -> dict[str, torch.Tensor]:
        """Published key -> tensor: what `save_pretrained` writes. A LoRA on top is not in it.

        Raises:
            ValueError: a LoRA is fused into the weights, they are offloaded, or the transformer's own stay in use.
        """
        self._refuse_incomplete()
        if is_offloaded(self):
            raise ValueError("the weights are offloaded by accelerate and not in the modules: unmount() first")
        for name, module in self.modules_dict.items():
            for slot in SLOTS:
                layer = layer_at(module, slot)
                if layer is not None and any(map(is_merged, wrappers(layer))):
                    raise ValueError(f"a LoRA is fused into {name}.{slot}: unfuse_lora() first")
        return self.state_dict()

    # ---- making one

    @classmethod
    def construct_for(
        cls,
        pipeline_or_transformer,
        window_size: int | None = None,
        down_factor: int | None = None,
        *,
        layers: Iterable[str | int] | None = None,
        load_pretrained: bool = True,
        pretrained_model_name_or_path=None,
        weight_name: str | None = None,
        **load_options,
    ) -> CLEAR:
        """Build (or load) the CLEAR that fits a transformer, and mount it.

        Args:
            pipeline_or_transformer: a FLUX or SD3 pipeline, or its transformer.
            window_size, down_factor: as in the class. What is loaded knows its own: these are needed where nothing
                says them, and must not contradict. Where nothing is loaded, window_size is needed, and down_factor is
                1 unless it is given.
            layers: attentions to mount on, by name ("transformer_blocks.0.attn") or by number in the order of
                `named_modules`; None: all. Weights for others that a published file holds are left out.
            load_pretrained: False loads nothing: the layers are copies of the transformer's own, the pooling a mean.
                That is where distillation starts. Layers that cannot be copied (quantised) stay in use as they are.
            pretrained_model_name_or_path: a file, a folder, or a name on the hub: weights in the published layout, or
                what `save_pretrained` wrote.
            weight_name: the file, in a folder or on the hub, where there is a choice: "clear_local_16.safetensors".
            load_options: as for `from_pretrained`.

        Raises:
            ValueError: no weights are named, or they do not fit, or something is missing, unknown or contradictory; the
                message names it. Nothing has been changed.
            RuntimeError: a CLEAR is mounted on this transformer already.
        """
        model = find_transformer(pipeline_or_transformer)
        entries = describe(model, layers)
        _refuse_mounted(model)
        if pretrained_model_name_or_path is not None:
            options = {"torch_dtype": weight_dtype(model), **load_options}
            clear = cls._load(
                pretrained_model_name_or_path,
                window_size,
                down_factor,
                weight_name,
                entries=entries,
                every=describe(model),
                base=_base(model),
                **options,
            )
            return clear._frozen_like(model).mount_to(model)
        if load_pretrained:
            raise ValueError(
                "pretrained_model_name_or_path= is needed: nothing says which weights to load. Published for "
                f"FLUX.1-dev (and FLUX.1-schnell) in {files.PUBLISHED_REPOSITORY!r} are, as weight_name=, "
                f"{', '.join(files.PUBLISHED)}. Or pass load_pretrained=False to start from the transformer's own "
                "weights (then distill)"
            )
        if load_options or weight_name is not None:
            raise TypeError(f"nothing is loaded, so {sorted({*load_options, 'weight_name'})} have no meaning")
        if window_size is None:
            raise ValueError("window_size is needed where nothing is loaded: the radius of the window, in tokens")
        down_factor = 1 if down_factor is None else down_factor
        with torch.device("meta"):
            clear = cls(window_size=window_size, down_factor=down_factor, modules_list=entries, base=_base(model))
        clear._copy_base_layers(model)
        return clear._frozen_like(model).mount_to(model)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        window_size: int | None = None,
        down_factor: int | None = None,
        weight_name: str | None = None,
        **load_options,
    ) -> CLEAR:
        """Load weights without mounting them: safetensors only, strict.

        Args:
            pretrained_model_name_or_path, window_size, down_factor, weight_name: as in `construct_for`.
            load_options: torch_dtype; subfolder, revision, cache_dir, token, local_files_only, as for the hub.

        Raises:
            ValueError: keys are missing, unknown or misshapen, or window_size is said by nothing or by two that differ.
            OSError: there is no such file.
        """
        return cls._load(pretrained_model_name_or_path, window_size, down_factor, weight_name, **load_options)

    @classmethod
    def _load(
        cls, path, window_size, down_factor, weight_name, *, entries=None, every=(), base=None, torch_dtype=None, **hub
    ) -> CLEAR:
        file, config = files.find(path, weight_name, **hub)
        shapes = files.shapes_in(file)
        if config is not None:
            saved = [dict(entry) for entry in config["modules_list"]]
            entries = saved if entries is None else _of_both(entries, saved, every, path)
            base = config.get("base") or base
        window_size, down_factor = files.settle(file, shapes, config, window_size, down_factor)
        if entries is None:
            entries, base = files.entries_in(shapes)
        with torch.device("meta"):
            clear = cls(window_size=window_size, down_factor=down_factor, modules_list=entries, base=base)
        expected = {key: tuple(value.shape) for key, value in clear.state_dict().items()}
        chosen = {entry["module_name"] for entry in entries}
        others = {entry["module_name"] for entry in every} - chosen
        wanted = files.check(file, shapes, expected, others)
        clear.load_state_dict(files.read(file, wanted, torch_dtype), assign=True)
        return clear.eval()

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write `config.json` and one safetensors file with the published keys: diffusers' `save_pretrained`.

        Raises:
            ValueError: as for `published_state_dict`.
        """
        self.published_state_dict()
        super().save_pretrained(save_directory, **{"max_shard_size": "1TB", **kwargs})

    def _copy_base_layers(self, model: nn.Module) -> None:
        """Copies of the transformer's own layers; where there can be none, the model's own will serve."""
        for name, own in self.modules_dict.items():
            attention = model.get_submodule(name)
            own.processor = WindowAttnProcessor(self.config.down_factor)
            for slot in SLOTS:
                layer = layer_at(attention, slot)
                if layer is None:
                    continue
                with weights_present(base_layer(layer)):
                    copy = copied_layer(layer)
                if copy is not None:
                    subtract_fused(layer, copy)
                    parent, _, child = slot.rpartition(".")
                    setattr(own.get_submodule(parent), child, copy)
                else:
                    del own._modules[slot.partition(".")[0]]

    def _frozen_like(self, model: nn.Module) -> CLEAR:
        """A transformer that is frozen stays so: whoever trains a LoRA on it trains nothing else."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self.requires_grad_(False)
        return self

    # ---- mounting

    def mount_to(self, pipeline_or_transformer) -> CLEAR:
        """Put window attention in place of the transformer's, after moving it to its device and dtype.

        Plugins keep working: LoRA layers stay with the transformer, fused or not, in both directions; an IP-Adapter's
        part is added to the attention, whether it is loaded before or after; layers are offloaded and stored as those
        they replace. Any other attention processor is set aside, with a warning that names it.

        Raises:
            ValueError: an attention is missing in the transformer or does not fit; nothing has been changed.
            RuntimeError: mounted already.
        """
        if self.mounted:
            raise RuntimeError("this CLEAR is mounted already: unmount() it first")
        model = find_transformer(pipeline_or_transformer)
        _refuse_mounted(model)
        self._check_fit(model)
        self._check_high_resolution(_base(model), *self._high_resolution)
        size, factor = self.config.window_size, self.config.down_factor
        replacements, processors = {}, {}
        for name, layers in self.modules_dict.items():
            original = model.get_submodule(name)
            processors[name] = original.processor
            kind = window_module(original)
            replacements[name] = kind.around(original, layers, size, factor, self._grid)
        refuse_fused({name: model.get_submodule(name) for name in replacements}, replacements, SLOTS, "mount")
        self.train(model.training)
        self._mount = Mount(model, replacements, SLOTS, extra=("processor",))
        self._processors = processors
        for name, module in replacements.items():
            if is_ip_adapter(processors[name]):
                module.set_processor(processors[name])
        _warn_of_processors(processors)
        read = self._grid.read_position_ids if isinstance(model, FluxTransformer2DModel) else self._grid.read_latents
        self._hook = model.register_forward_pre_hook(read, with_kwargs=True)
        if isinstance(model, FluxTransformer2DModel):
            self._theta = model.pos_embed.theta
        self._apply_high_resolution()
        return self

    def unmount(self) -> CLEAR:
        """Put the original modules back: the same objects, so that nothing of the mounting remains.

        Raises:
            RuntimeError: not mounted, or something else was put in the place of the mounted modules since.
            ValueError: something is fused into the weights that cannot be taken out of them again.
        """
        if self._mount is None:
            raise RuntimeError("this CLEAR is not mounted on a transformer")
        mount, model = self._mount, self._mount.model
        foreign = mount.foreign()
        if foreign:
            raise RuntimeError(
                f"the transformer no longer holds CLEAR's modules at {some(foreign)}; nothing was changed"
            )
        refuse_fused(mount.replacements, mount.originals, SLOTS, "unmount")
        adapters = {name: module.ip_adapter for name, module in mount.replacements.items()}
        for module in mount.replacements.values():
            module.ip_adapter = None
        mount.undo()
        for name, original in mount.originals.items():
            before = self._processors[name]
            if adapters[name] is not (before if is_ip_adapter(before) else None):
                original.set_processor(adapters[name] or _stock_processor(original))
        # fuse_qkv_projections keeps the processors it found, to put them back: ours must not go on the originals.
        kept = getattr(model, "original_attn_processors", None) or {}
        for name, original in mount.originals.items():
            if isinstance(kept.get(f"{name}.processor"), WindowAttnProcessor):
                kept[f"{name}.processor"] = original.processor
        self._hook.remove()
        if self._theta is not None:
            model.pos_embed.theta = self._theta
        self._mount = self._hook = self._theta = self._processors = None
        return self

    def _check_fit(self, model: nn.Module) -> None:
        found = {entry["module_name"]: entry for entry in describe(model)}
        base, own = self.config.base, _base(model)
        if base is not None and base != own:
            raise ValueError(f"these weights are for a {base}, this is a {own}")
        problems = []
        for entry in self.config.modules_list:
            name = entry["module_name"]
            if name not in found:
                problems.append(f"{name}: the transformer has no such attention")
            elif found[name] != dict(entry):
                problems.append(f"{name}: {found[name]} in the transformer, the weights are for {dict(entry)}")
        if problems:
            raise ValueError(f"CLEAR does not fit this {own} ({len(problems)} modules): {some(problems, '; ')}")

    def _refuse_incomplete(self) -> None:
        missing = [
            f"{entry['module_name']}.{slot}"
            for entry in self.config.modules_list
            for slot in SLOTS
            if (slot != "to_out.0" or entry["to_out"])
            and layer_at(self.get_submodule(entry["module_name"]), slot) is None
        ]
        if missing:
            raise ValueError(
                f"{some(missing)} are the transformer's own layers, in use as they are because their weights cannot be "
                "copied (quantised?): there are no weights of CLEAR's to train or save. Mount before quantising"
            )

    # ---- sizes

    def set_grid(self, height: int | None = None, width: int | None = None) -> None:
        """Say the size of the image in tokens (pixels / 16) ahead; without arguments: each call finds its own.

        Needed only where a whole FLUX transformer is compiled as one graph, which cannot read position ids.
        """
        if (height is None) != (width is None):
            raise ValueError(f"height and width belong together, got {height=}, {width=}")
        if height is None:
            return self._grid.fix(None)
        _at_least_one("height", height)
        _at_least_one("width", width)
        return self._grid.fix((height, width), self._mount.model.device if self.mounted else None)

    def set_high_resolution(self, ntk_factor: float = 1.0, proportional_attention: bool = False) -> None:
        """Settings for images larger than those the transformer was trained on; may be changed at any time.

        Args:
            ntk_factor: multiplies the base of the rotary frequencies (theta; FLUX only). CLEAR's example of
                2048 x 4096 uses 10.
            proportional_attention: scores are multiplied by sqrt(log_L(S)), S tokens in the sequence, L those of
                training (FLUX: 4608); with pooled keys by sqrt(log_L(10 S)), as CLEAR has it.

        Source: CLEAR's transformer (ntk_factor) and attention processors; Jin et al. (arXiv 2306.08645) for the scale.
        """
        if not (isinstance(ntk_factor, (int, float)) and math.isfinite(ntk_factor) and ntk_factor > 0):
            raise ValueError(f"ntk_factor must be a positive number, got {ntk_factor!r}")
        if not isinstance(proportional_attention, bool):
            raise TypeError(f"proportional_attention must be True or False, got {proportional_attention!r}")
        self._check_high_resolution(self._base_name(), ntk_factor, proportional_attention)
        self._high_resolution = (float(ntk_factor), proportional_attention)
        self._apply_high_resolution()

    @contextlib.contextmanager
    def high_resolution(self, ntk_factor: float = 1.0, proportional_attention: bool = False) -> Iterator[CLEAR]:
        """`set_high_resolution` inside, and afterwards what was set before."""
        before = self._high_resolution
        self.set_high_resolution(ntk_factor, proportional_attention)
        try:
            yield self
        finally:
            self.set_high_resolution(*before)

    def _base_name(self) -> str | None:
        return _base(self._mount.model) if self.mounted else self.config.base

    @staticmethod
    def _check_high_resolution(base: str | None, ntk_factor: float, proportional_attention: bool) -> None:
        if base == "SD3Transformer2DModel" and ntk_factor != 1:
            raise ValueError(
                f"ntk_factor is about rotary positions, which SD3 does not have: it must be 1, got {ntk_factor}"
            )

    def _apply_high_resolution(self) -> None:
        if not self.mounted:
            return
        model, (ntk_factor, proportional) = self._mount.model, self._high_resolution
        self._grid.training_length = _training_length(model) if proportional else None
        if self._theta is not None:
            model.pos_embed.theta = self._theta if ntk_factor == 1 else self._theta * ntk_factor


def describe(model: nn.Module, layers: Iterable[str | int] | None = None) -> list[dict]:
    """Entries of `modules_list` for the attentions of a transformer, in the order of `named_modules`.

    Args:
        layers: some of them, by name or number.

    Raises:
        ValueError: CLEAR is not for this transformer, or it has no such layer.
    """
    if not isinstance(model, (FluxTransformer2DModel, SD3Transformer2DModel)):
        raise ValueError(f"CLEAR is for FluxTransformer2DModel and SD3Transformer2DModel, got a {_base(model)}")
    entries = [
        {"module_name": name, "dim": module.query_dim, "to_out": not module.pre_only}
        for name, module in model.named_modules()
        if name.startswith(_BLOCKS) and window_module(module) is not None
    ]
    if layers is None:
        return entries
    if isinstance(layers, str):
        raise TypeError(f"layers must be names or numbers of attentions, several of them, got {layers!r}")
    names = [entry["module_name"] for entry in entries]
    chosen = set()
    for layer in layers:
        is_number = isinstance(layer, int) and not isinstance(layer, bool)
        if layer not in names and not (is_number and 0 <= layer < len(names)):
            raise ValueError(
                f"layers: this {_base(model)} has no attention {layer!r}; it has 0 to {len(names) - 1}: {some(names)}"
            )
        chosen.add(names[layer] if is_number else layer)
    if not chosen:
        raise ValueError("layers must name at least one attention, got none")
    return [entry for entry in entries if entry["module_name"] in chosen]


def _of_both(entries: list[dict], saved: list[dict], every: list[dict], path) -> list[dict]:
    """What was asked for, of what was saved."""
    by_name = {entry["module_name"]: entry for entry in saved}
    if len(entries) == len(every):  # no layers were chosen: all that was saved
        return saved
    absent = [entry["module_name"] for entry in entries if entry["module_name"] not in by_name]
    if absent:
        raise ValueError(f"layers: {path} has no weights for {some(absent)}, only for {some(by_name)}")
    return [by_name[entry["module_name"]] for entry in entries]


def _base(model: nn.Module) -> str:
    return next(
        (kind.__name__ for kind in (FluxTransformer2DModel, SD3Transformer2DModel) if isinstance(model, kind)),
        type(model).__name__,
    )


def _training_length(model: nn.Module) -> int:
    if isinstance(model, FluxTransformer2DModel):
        return _FLUX_TRAINING_LENGTH
    return (model.config.sample_size // model.config.patch_size) ** 2 + _SD3_TEXT


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    root.add_module(last, module)


def _zero_linear(dim: int) -> nn.Linear:
    """Weights to be loaded into; drawing the usual random ones takes a minute for a model like FLUX."""
    layer = nn.Linear(dim, dim, device="meta")
    layer.weight, layer.bias = nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim))
    return layer


def _stock_processor(attention: nn.Module):
    kind = getattr(attention, "_default_processor_cls", None)
    if kind is None:
        from diffusers.models.attention_processor import JointAttnProcessor2_0 as kind
    return kind()


def _refuse_mounted(model: nn.Module) -> None:
    name = next((name for name, module in model.named_modules() if isinstance(module, _WindowAttention)), None)
    if name is not None:
        raise RuntimeError(f"a CLEAR is mounted on this transformer already (at {name}): unmount() it first")


def _warn_of_processors(processors: dict[str, object]) -> None:
    import warnings

    foreign = {n: type(p).__name__ for n, p in processors.items() if not is_stock(p) and not is_ip_adapter(p)}
    if foreign:
        warnings.warn(
            f"CLEAR sets aside the attention processors {', '.join(sorted(set(foreign.values())))} of "
            f"{some(foreign)}: they do nothing until unmount()",
            stacklevel=3,
        )


def _at_least_one(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
