"""The attention that `linattn generate` draws with: its weights found, tried on the model's config, and mounted."""

from __future__ import annotations

from pathlib import Path

from linattn._quiet import quiet_diffusers
from linattn.cli._models import Layout, Problem, Source, fetch, line, locate, raise_if_memory, read_config
from linattn.cli._record import Request


def settle(request: Request, layout: Layout) -> None:
    """Choose the attention where none was asked for; raise where the model has no place for it."""
    own = "linfusion" if layout.has_unet else "clear"
    if request.attention is None:
        request.attention = own
    if request.attention not in (own, "stock"):
        raise Problem(
            f"--attention {request.attention} is for {_FOR[request.attention]}, this is a {layout.class_name}: use "
            f"--attention {own} or stock"
        )
    if request.attention != "clear":
        for name in ("window_size", "down_factor"):
            if getattr(request, name) is not None:
                raise Problem(f"--{name.replace('_', '-')} goes with --attention clear, not with {request.attention}")
    if request.stages is None:
        request.base_attention = None
    elif request.attention == "stock" or request.image is not None:
        if request.base_attention is not None:
            why = "--image, which is the picture before the stages" if request.image else "--attention stock"
            raise Problem(f"--base-attention {request.base_attention} has no meaning with {why}")
    elif request.base_attention is None:
        request.base_attention = "stock" if request.attention == "clear" else "same"


_FOR = {"linfusion": "Stable Diffusion 1.x, 2.x and XL", "clear": "FLUX and Stable Diffusion 3"}


def find(request: Request, model: Source, layout: Layout, revision: str | None) -> Source | None:
    """Find the weights of the attention and try them on a model without memory; None where there are none to load."""
    if request.attention == "stock":
        return None
    if request.attention == "clear":
        return _find_clear(request, model, layout, revision)
    return _find_linfusion(request, model, layout, revision)


def mount(pipe, request: Request, source: Source | None):
    """The adapter on a pipeline; None for stock attention."""
    from linattn import adapters

    if request.attention == "stock":
        return None
    options = {"load_pretrained": source is not None}
    if source is not None:
        options["pretrained_model_name_or_path"] = str(source.path)
    if request.attention == "clear":
        adapter = adapters.CLEAR
        options |= {"window_size": request.window_size, "down_factor": request.down_factor}
        if source is not None and source.weight_name is not None:
            options["weight_name"] = source.weight_name
    else:
        adapter = adapters.LinFusion
    try:
        with quiet_diffusers():
            return adapter.construct_for(pipe, **options)
    except Exception as error:  # what is wrong with the files of a folder comes out as any type
        raise_if_memory(error)
        raise Problem(f"--weights: cannot use {request.weights}: {type(error).__name__}: {line(error)}") from error


def name(request: Request) -> str:
    """How a summary calls it."""
    if request.attention == "stock":
        return "stock attention"
    weights = request.weights + (", undistilled" if request.weights == "base" else "")
    if request.attention == "linfusion":
        return f"linfusion attention (weights: {weights})"
    pooled = f", pooled by {request.down_factor}" if request.down_factor > 1 else ""
    return f"clear attention of radius {request.window_size}{pooled} (weights: {weights})"


# -------------------------------------------------------------------------------------------------------- LinFusion


def _find_linfusion(request: Request, model: Source, layout: Layout, revision: str | None) -> Source | None:
    """Find the LinFusion weights and try them on a UNet without memory; None where there are none to load."""
    import torch
    from diffusers import UNet2DConditionModel

    from linattn.adapters import LinFusion

    if request.weights is None:
        if model.kind == "bundled":
            request.weights = bundled_student(model.name) or "base"
        else:
            request.weights = "published"
    with torch.device("meta"), quiet_diffusers():
        try:
            unet = UNet2DConditionModel.from_config(layout.denoiser)
            if request.weights == "base":
                LinFusion.get_default_config(unet)  # raises where there is nothing to replace
                return None
        except (ValueError, TypeError, RuntimeError) as error:
            raise Problem(f"--model: the UNet of {model.name} cannot be built: {line(error)}") from error
    if request.weights == "published":
        request.weights = _published(model, unet)
    source = locate("--weights", request.weights)
    if source.kind == "hub":
        source.path = fetch(source, revision, ["config.json", "*.safetensors"])
    request.weights = source.name
    if not (source.path / "config.json").is_file():
        raise Problem(f"--weights: {source.name} holds no LinFusion weights, it has no config.json")
    config = read_config(source, "config.json")
    if not isinstance(config.get("modules_list"), list):
        raise Problem(
            f"--weights: {source.name} holds a {config.get('_class_name', 'model')} and no LinFusion weights "
            "(config.json has no modules_list)"
        )
    if not any(source.path.glob("*.safetensors")):
        raise Problem(f"--weights: {source.name} has no .safetensors file (pickled weights are not read)")
    try:
        with torch.device("meta"), quiet_diffusers():
            LinFusion.from_config(config).mount_to(unet)
    except (ValueError, TypeError, KeyError) as error:
        raise Problem(f"--weights: {source.name} does not go with {model.name}: {line(error)}") from error
    return source


def bundled_student(model: str, kind: str = "LinFusion", **wanted) -> str | None:
    """The bundled weights of this class for a bundled model: their folder's name begins with the model's.

    Args:
        wanted: entries of their config that must be these; None: any.
    """
    from linattn import bundled

    for name in bundled.names():
        config = bundled.path(name) / "config.json"
        if name.startswith(model) and config.is_file():
            found = read_config(Source("--weights", name, "bundled", config.parent), config.name)
            fits = all(value is None or found.get(key) == value for key, value in wanted.items())
            if found.get("_class_name") == kind and fits:
                return name
    return None


def _published(model: Source, unet) -> str:
    from linattn.adapters import LinFusion
    from linattn.adapters.linfusion import KNOWN_REPOSITORIES, PUBLISHED

    family = KNOWN_REPOSITORIES.get(model.name) or LinFusion.architecture(unet)
    if family is None:
        try:
            LinFusion.construct_for(unet=unet, pipe_name_path=model.name)
        except ValueError as error:
            raise Problem(f"{line(error)}. Here: --weights NAME|FOLDER or --weights base") from error
    return PUBLISHED[family]


# ------------------------------------------------------------------------------------------------------------ CLEAR


def _find_clear(request: Request, model: Source, layout: Layout, revision: str | None) -> Source | None:
    import diffusers
    import torch

    from linattn.adapters import CLEAR
    from linattn.adapters import _clear_files as files

    for option in ("window_size", "down_factor"):
        value = getattr(request, option)
        if value is not None and value < 1:
            raise Problem(f"--{option.replace('_', '-')}: expected 1 or more, got {value}")
    if request.weights is None:
        wanted = {"window_size": request.window_size, "down_factor": request.down_factor}
        request.weights = bundled_student(model.name, "CLEAR", **wanted) if model.kind == "bundled" else "published"
    if request.weights is None:
        raise Problem(f"no bundled CLEAR for {model.name} has that window: --weights NAME|FOLDER|FILE, or base")
    with torch.device("meta"), quiet_diffusers():
        try:
            transformer = getattr(diffusers, layout.kind.model).from_config(layout.denoiser)
        except (ValueError, TypeError, RuntimeError) as error:
            raise Problem(f"--model: the transformer of {model.name} cannot be built: {line(error)}") from error
    if request.weights == "base":
        if request.window_size is None:
            raise Problem("--weights base needs --window-size, the radius of the window in tokens of 16 pixels")
        request.down_factor = request.down_factor or 1
        return None
    if request.weights == "published":
        request.weights = _published_clear(request, layout)
    source = _locate_clear(request, revision)
    try:
        path = source.path if source.weight_name is None else source.path / source.weight_name
        path, config = files.find(path if path.is_file() else source.path, None)
        shapes = files.shapes_in(path)
        request.window_size, request.down_factor = files.settle(
            path, shapes, config, request.window_size, request.down_factor
        )
        with torch.device("meta"), quiet_diffusers():
            if config is None:
                clear = CLEAR.construct_for(
                    transformer, request.window_size, request.down_factor, load_pretrained=False
                )
            else:
                clear = CLEAR.from_config(config).mount_to(transformer)
        files.check(path, shapes, {key: tuple(value.shape) for key, value in clear.state_dict().items()}, set())
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise Problem(f"--weights: {source.name} does not go with {model.name}: {line(error)}") from error
    return source


def _published_clear(request: Request, layout: Layout) -> str:
    from linattn.adapters._clear_files import PUBLISHED_REPOSITORY

    size = [layout.denoiser.get(key) for key in ("num_layers", "num_single_layers", "num_attention_heads")]
    if layout.class_name != "FluxPipeline" or size != [19, 38, 24]:
        raise Problem(
            f"no CLEAR weights are published for this {layout.class_name} (for FLUX.1-dev and schnell only): "
            "--weights NAME|FOLDER|FILE, or --attention stock"
        )
    if request.window_size is None:
        raise Problem(
            f"{_published_names()} are published for FLUX: choose by --window-size and --down-factor, or give other "
            "--weights, or --attention stock"
        )
    return PUBLISHED_REPOSITORY


def _published_names() -> str:
    from linattn.adapters._clear_files import PUBLISHED

    return ", ".join(name.removesuffix(".safetensors") for name in PUBLISHED)


def _locate_clear(request: Request, revision: str | None) -> Source:
    """Where the weights are: a file, what `save_pretrained` wrote, or the one of several that the window names."""
    from linattn.adapters._clear_files import SAVED_NAME

    text = request.weights
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise Problem(f"--weights: expected a .safetensors file (nothing else is read), got {text!r}")
        request.weights = str(path.absolute())
        return Source("--weights", request.weights, "file", path.absolute())
    source = locate("--weights", text)
    named = None
    if request.window_size is not None:
        pooled = f"_down_{request.down_factor}" if (request.down_factor or 1) > 1 else ""
        named = f"clear_local_{request.window_size}{pooled}.safetensors"
    if source.kind == "hub":
        source.path = fetch(source, revision, ["config.json", SAVED_NAME, *([named] if named else [])])
    request.weights = source.name
    there = sorted(file.name for file in source.path.glob("*.safetensors"))
    if SAVED_NAME in there:
        source.weight_name = SAVED_NAME
    elif named in there:
        source.weight_name = named
    elif len(there) == 1 and source.kind != "hub":
        source.weight_name = there[0]
    else:
        what = f"no {named}" if named else "more than one pattern, or none that is known by its name"
        found = f"; there are {', '.join(there)}" if there else ""
        raise Problem(
            f"--weights: {source.name} has {what}: choose by --window-size and --down-factor, or name a file{found}"
        )
    return source
