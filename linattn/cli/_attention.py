"""The attention that `linattn generate` draws with: its weights found, tried on the model's config, and mounted."""

from __future__ import annotations

from linattn._quiet import quiet_diffusers
from linattn.cli._models import Layout, Problem, Source, fetch, line, locate, read_config
from linattn.cli._record import Request


def find(request: Request, model: Source, layout: Layout, revision: str | None) -> Source | None:
    """Find the LinFusion weights and try them on a UNet without memory; None where there are none to load."""
    if request.attention == "stock":
        return None
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
            unet = UNet2DConditionModel.from_config(layout.unet)
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


def bundled_student(model: str) -> str | None:
    """The bundled LinFusion weights for a bundled model: their folder's name begins with the model's."""
    from linattn import bundled

    for name in bundled.names():
        config = bundled.path(name) / "config.json"
        if name.startswith(model) and config.is_file():
            found = read_config(Source("--weights", name, "bundled", config.parent), config.name)
            if found.get("_class_name") == "LinFusion":
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
