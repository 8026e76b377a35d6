"""The student: the teacher's network with an adapter mounted, and exactly the wanted parameters trainable.

Teacher and student differ in the adapter's modules only. So by default they are two trees of modules over one set of
frozen weights: the student costs its adapter, not a second network.

`WholeModel` is a student that nobody teaches: all of a network, trained on data alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
        start = {"load_pretrained": False} if pretrained is None else {"pretrained_model_name_or_path": pretrained}
        try:
            self.adapter = adapter_class.construct_for(self.model, **start, **(options or {}))
        except TypeError as error:  # an option that it does not know
            raise ValueError(f"student.options: {error}") from error
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
        with torch.random.fork_rng(devices=[]):  # saving draws nothing from the run's random numbers
            plain = self.adapter.from_config(self.adapter.config)
        with torch.no_grad():
            for own, module in zip(plain.modules_dict.values(), self.modules.values(), strict=True):
                merged = merged_state_dict(module)  # with layers that are the model's own, if the adapter left such
                own.load_state_dict({key: merged[key].detach().cpu() for key in own.state_dict()})
        plain.save_pretrained(folder)
        if self.lora:
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft.utils import get_peft_model_state_dict

            layers = get_peft_model_state_dict(self.model, adapter_name=ADAPTER_NAME)
            # With its settings: without them a loader takes the rank for alpha.
            settings = self.model.peft_config[ADAPTER_NAME].to_dict()
            settings["target_modules"] = sorted(settings["target_modules"])
            models.save_lora(Path(folder) / "lora", convert_state_dict_to_diffusers(layers), settings)


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
