"""The student: the teacher's network with an adapter mounted, and exactly the wanted parameters trainable.

Teacher and student differ in the adapter's modules only. So by default they are two trees of modules over one set of
frozen weights: the student costs its adapter, not a second network.

`TunedModel` is a student all of which may learn something else than the teacher does: fewer steps. `WholeModel` is one
that nobody teaches: all of a network, trained on data alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import delta_weights

ADAPTER_NAME = "default"


def shared_copy(model: nn.Module) -> nn.Module:
    """A second tree of modules with the same parameters and buffers: what is put into one is not in the other."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Student:
    """Teacher's network with an adapter.

    Args:
        teacher: the network; left as it is, frozen.
        adapter_class: has `construct_for(model, *, load_pretrained=..., pretrained_model_name_or_path=..., **options)`,
            which mounts; `modules_dict` (name in the model -> mounted module), `config`, `save_pretrained`. May have
            `trainable_parameters()` (name -> parameter), if these are not all that its modules hold.
        pretrained: weights of the adapter to start from; None: what the adapter makes of the teacher's own.
        options: for `construct_for`.
        share: one copy of the frozen weights for both.

    Attributes:
        model: the network with the adapter mounted. Its trainable parameters are float32, whatever the rest is cast to.
    """

    #: Name of the folder in a checkpoint that holds the student as users load it.
    saved_as = "adapter"

    def __init__(
        self,
        teacher: nn.Module,
        adapter_class: type,
        *,
        pretrained: str | None = None,
        options: Mapping[str, object] | None = None,
        share: bool = True,
    ):
        teacher.requires_grad_(False)
        self.model = shared_copy(teacher) if share else copy.deepcopy(teacher)
        self.adapter = _mounted(self.model, adapter_class, pretrained, options)
        self.modules: dict[str, nn.Module] = dict(self.adapter.modules_dict)
        self.lora = False
        if self._names_its_own:
            self._separate(teacher)

    def train_fully(self) -> None:
        """Train every parameter of the adapter, or those that it names."""
        if self._names_its_own:
            self._only(self.adapter.trainable_parameters().values())
        else:
            self._only(p for module in self.modules.values() for p in module.parameters())

    @property
    def _names_its_own(self) -> bool:
        return hasattr(self.adapter, "trainable_parameters")

    def _separate(self, teacher: nn.Module) -> None:
        """Give the student copies of what it trains and an adapter has left in the teacher's hands as well."""
        shared = {id(p) for p in teacher.parameters()}
        wanted = {id(p) for p in self.adapter.trainable_parameters().values()} & shared
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in wanted:
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))

    def train_lora(
        self, *, rank: int, alpha: float, dropout: float, targets: Iterable[str], also_train: Iterable[str]
    ) -> None:
        """Train low-rank updates of `targets`, and the children `also_train` in full.

        Args:
            targets, also_train: names of children of the adapter's modules.

        Raises:
            ValueError: a module of the adapter has no such child.
        """
        from peft import LoraConfig

        targets, also_train = list(targets), list(also_train)
        for name, module in self.modules.items():
            children = dict(module.named_modules())
            for key, wanted in (("targets", targets), ("also_train", also_train)):
                absent = [child for child in wanted if child not in children]
                if absent:
                    raise ValueError(f"student.lora.{key}: {name} has no child {absent[0]!r}")
        self.model.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=[f"{name}.{target}" for name in self.modules for target in targets],
            ),
            ADAPTER_NAME,
        )
        self.lora = True
        low_rank = [p for name, p in self.model.named_parameters() if ".lora_" in name]
        in_full = [
            p for m in self.modules.values() for child in also_train for p in m.get_submodule(child).parameters()
        ]
        self._only([*low_rank, *in_full])

    def _only(self, parameters: Iterable[nn.Parameter]) -> None:
        self.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, of everything that is trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to the device: what is frozen in the given type, what is trained in float32."""
        nn.Module.to(self.model, device=device, dtype=dtype)
        self.widen()

    def widen(self) -> None:
        """The adapter's own parameters to float32: an optimizer's small steps are lost in 16 bits."""
        if self._names_its_own:  # the others in its modules may be the teacher's
            for parameter in (*self.adapter.trainable_parameters().values(), *self.trainable().values()):
                parameter.data = parameter.data.float()
        else:
            for module in self.modules.values():
                module.to(torch.float32)

    def save(self, folder: Path, models) -> None:
        """Write the adapter as users load it: `folder`/config.json and safetensors, any low-rank updates merged in.

        The updates by themselves go to `folder`/lora as well, for `load_lora_weights` on top of the same adapter.
        The student is not changed: un-merging would not give back the same bits.
        """
        _save_adapter(self.adapter, self.modules, folder)
        if self.lora:
            _save_lora(self.model, Path(folder) / "lora", models)


class TunedModel:
    """A copy of the teacher that learns to do with fewer steps: all of it, or low-rank updates of it.

    It is used like a `Student`, but for how it is made.

    Args:
        teacher: the network; left as it is, frozen.
        scheduler: that samples from the student; saved with it.
        adapter_class, pretrained, options: an adapter that is mounted first. All of the network is trained with it; or
            low-rank updates on top, and the adapter stays as it was loaded.
        low_rank: of `linattn.distill.recipe.Lora`: what is trained instead of all.
        share: one copy of the frozen weights for both, beside low_rank.

    Raises:
        ValueError: there is no layer of a name in low_rank.
    """

    saved_as = "student"

    def __init__(
        self,
        teacher: nn.Module,
        scheduler,
        *,
        adapter_class: type | None = None,
        pretrained: str | None = None,
        options: Mapping[str, object] | None = None,
        low_rank=None,
        share: bool = True,
    ):
        teacher.requires_grad_(False)
        self.scheduler = scheduler
        self.lora = low_rank is not None
        self._class = type(teacher)  # sharding puts a class of its own in its place
        self._mount = (adapter_class, pretrained, options)
        self._low_rank = low_rank
        # The weights as they were loaded: a teacher that is narrowed afterwards gets other tensors, and these stay.
        self._base: dict[str, Tensor] = {} if self.lora else dict(teacher.state_dict())
        self._dress(shared_copy(teacher) if self.lora and share else copy.deepcopy(teacher))

    def _dress(self, model: nn.Module) -> None:
        self.model = model
        self.adapter = _mounted(model, *self._mount) if self._mount[0] else None
        self.modules: dict[str, nn.Module] = dict(self.adapter.modules_dict) if self.adapter else {}
        if not self.lora:
            model.requires_grad_(True)
            return
        from peft import LoraConfig, inject_adapter_in_model

        wanted = self._low_rank
        targets = [name for target in wanted.targets for name in _named(model, target, "student.lora.targets")]
        in_full = [name for target in wanted.also_train for name in _named(model, target, "student.lora.also_train")]
        for module in (part for name in in_full for part in model.get_submodule(name).modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                # Its own: the model may have its weights in common with the teacher.
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        in_full = [p for name in in_full for p in model.get_submodule(name).parameters()]
        settings = {"r": wanted.rank, "lora_alpha": wanted.alpha or wanted.rank, "lora_dropout": wanted.dropout}
        model.requires_grad_(False)
        config = LoraConfig(target_modules=targets, **settings)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, ADAPTER_NAME)
        else:  # networks that diffusers has no LoRA for: PixArt's
            inject_adapter_in_model(config, model, ADAPTER_NAME)
            model.peft_config = {ADAPTER_NAME: config}
        for parameter in (*in_full, *(p for name, p in model.named_parameters() if ".lora_" in name)):
            parameter.requires_grad_(True)

    def as_it_is(self, teacher: nn.Module) -> nn.Module:
        """A frozen copy of the student with its adapter, to teach it.

        Args:
            teacher: that the student was made of; the copy is of its type, on its device.
        """
        model = copy.deepcopy(teacher)
        # Mounted anew, not copied: an adapter may hold on to the model that it was mounted on.
        _mounted(model, *self._mount)
        if not self.lora:  # else it is loaded, and its updates are nothing yet
            model.load_state_dict(self.model.state_dict())
        model = nn.Module.to(model, device=next(teacher.parameters()).device, dtype=next(teacher.parameters()).dtype)
        return model.requires_grad_(False).eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to the device: what is frozen in the given type, what is trained in float32."""
        nn.Module.to(self.model, device=device, dtype=dtype if self.lora else torch.float32)
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()

    def blank(self) -> TunedModel:
        """Another one of the same configuration on the CPU, whose weights mean nothing."""
        other = copy.copy(self)
        with torch.random.fork_rng(devices=[]):
            other._dress(self._class.from_config(self.model.config))
        return other

    def save(self, folder: Path, models) -> None:
        """Write the student as users load it, always with `folder`/scheduler.

        All of a network: a pipeline, and beside it delta_weights.safetensors, the difference to the teacher's weights.
        With an adapter: `folder`/adapter, as its class loads it, and the difference of what does not belong to it.
        Low-rank updates: pytorch_lora_weights.safetensors, for `load_lora_weights` (mount the adapter before).
        """
        folder = Path(folder)
        if self.lora:
            _save_lora(self.model, folder, models)
        elif self.adapter is None:
            models.save(folder, self.model, self.scheduler)
        else:
            _save_adapter(self.adapter, self.modules, folder / "adapter")
        self.scheduler.save_pretrained(folder / "scheduler")
        if not self.lora:
            tuned = {key: value for key, value in self.model.state_dict().items() if not self._is_of_adapter(key)}
            delta = delta_weights.extract({key: self._base[key] for key in tuned}, tuned)
            delta_weights.save(delta, folder)

    def _is_of_adapter(self, key: str) -> bool:
        """Whether the adapter's own file holds this weight."""
        if hasattr(self.adapter, "trainable_parameters"):
            return key in self.adapter.trainable_parameters()
        return any(key.startswith(f"{name}.") for name in self.modules)


def _named(model: nn.Module, ending: str, key: str) -> list[str]:
    """Names of the layers that are called so, or whose names end in it.

    Raises:
        ValueError: there is none; the message begins with `key`.
    """
    names = [name for name, _ in model.named_modules() if name == ending or name.endswith(f".{ending}")]
    if not names:
        raise ValueError(f"{key}: {type(model).__name__} has no layer whose name ends in {ending!r}")
    return names


def _mounted(
    model: nn.Module, adapter_class: type, pretrained: str | None, options: Mapping[str, object] | None
) -> object:
    """The adapter, mounted on the model."""
    start = {"load_pretrained": False} if pretrained is None else {"pretrained_model_name_or_path": pretrained}
    try:
        return adapter_class.construct_for(model, **start, **(options or {}))
    except TypeError as error:  # an option that it does not know
        raise ValueError(f"student.options: {error}") from error


def _save_adapter(adapter, modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Write an adapter with the weights of these modules, which are those that it has mounted."""
    with torch.random.fork_rng(devices=[]):  # saving draws nothing from the run's random numbers
        plain = adapter.from_config(adapter.config)
    with torch.no_grad():
        for own, module in zip(plain.modules_dict.values(), modules.values(), strict=True):
            merged = merged_state_dict(module)  # with layers that are the model's own, if the adapter left such
            own.load_state_dict({key: merged[key].detach().cpu() for key in own.state_dict()})
    plain.save_pretrained(folder)


def _save_lora(model: nn.Module, folder: Path, models) -> None:
    """Write the low-rank updates in the model."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    # With its settings: without them a loader takes the rank for alpha.
    settings = model.peft_config[ADAPTER_NAME].to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    models.save_lora(folder, layers, settings)  # peft's names: diffusers' older ones exist for attention alone


class WholeModel:
    """A network that is trained as it is, all of it.

    It is used like a `Student`, but for how it is made.

    Args:
        model: the network itself, not a copy.
    """

    saved_as = "pipeline"

    def __init__(self, model: nn.Module):
        self.model = model
        self._class = type(model)  # sharding puts a class of its own in its place
        self.modules: dict[str, nn.Module] = {}

    def train_fully(self) -> None:
        self.model.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model to the device, in float32 whatever the type: nothing of it is frozen."""
        nn.Module.to(self.model, device=device, dtype=torch.float32)

    def blank(self) -> WholeModel:
        """Another one of the same configuration on the CPU, whose weights mean nothing."""
        with torch.random.fork_rng(devices=[]):
            other = WholeModel(self._class.from_config(self.model.config))
        other.train_fully()
        return other

    def save(self, folder: Path, models) -> None:
        """Write a pipeline with this network in it."""
        models.save(folder, self.model)


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that the module would have without its peft wrappers, their updates added to the weights."""
    merged = {}
    for key, value in module.state_dict().items():
        if ".lora_" not in key:
            merged[key.replace(".base_layer.", ".")] = value
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "get_delta_weight"):
            for adapter in layer.active_adapters:
                key = f"{name}.weight"
                merged[key] = merged[key] + layer.get_delta_weight(adapter).to(merged[key].dtype)
    return merged
