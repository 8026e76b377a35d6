"""One training loop for all objectives, on Hugging Face Accelerate.

A recipe says what is trained, on what, and how; `Trainer(recipe, adapter_class).run()` does it. It runs in one process,
or as one of many started by `accelerate launch`, with DDP, FSDP or DeepSpeed as that was configured. What differs
between teaching attention and training a model on data is in tasks.py.

What a run computes is a function of the recipe alone: every random number belongs to the seed and to the running
number of its sample (noise.py, data), and a checkpoint holds everything else. So a run that was killed at any moment
and started again ends in the same weights, bit for bit, and a run on two processes sees the same samples with the same
noise as one process that accumulates twice as many micro steps.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .._version import __version__
from ..paths import expand
from . import checkpoint
from .data import Order
from .precompute import fill_caches
from .recipe import Recipe, RecipeError, load
from .student import Student, TunedModel, WholeModel
from .tasks import TASKS

TRAINABLE, AVERAGE = "trainable.safetensors", "ema.safetensors"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: What may differ between a run and its continuation: nothing that changes a number of it.
FREE_TO_CHANGE = ("training.steps", "output", "data.workers", "data.cache.folder")


class Interrupted(Exception):
    """A signal asked the run to stop. It has: at a whole step, with a checkpoint.

    Attributes:
        signal: its number.
        step: steps that are done.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by signal {number} after step {step}")
        self.signal, self.step = number, step


class Trainer:
    """A distillation run.

    Args:
        recipe: see `linattn.distill.recipe`.
        adapter_class: what `recipe.student.adapter` names (see `Student` for what it must offer), if it names one.
        pipeline_class: what `recipe.model.pipeline` names, if it names one.
        named: what other keys of the recipe name (`NAMED`), by key.
        accelerator: an Accelerator; None makes one from the recipe and the environment of `accelerate launch`.
        say: called with lines of text, on the main process.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapter_class: type | None = None,
        *,
        pipeline_class: type | None = None,
        named: Mapping[str, object] | None = None,
        accelerator=None,
        say: Callable[[str], None] = print,
    ):
        recipe.check_paths()
        self.recipe = recipe
        self.task = TASKS[recipe.objective.kind](
            recipe, adapter_class=adapter_class, pipeline_class=pipeline_class, named=named
        )
        self.folder = Path(expand(recipe.output.folder))
        self.accelerator = accelerator or _accelerator(recipe, self.folder)
        self._say = say
        self._refuse_what_sharding_cannot_do()
        self._resume_from = self._find_checkpoint()

        self.source = self.task.open_source()
        self.order = Order.of(self.source, recipe.data, recipe.training.batch_size, recipe.training.seed)
        self.models = self.task.load()
        self._refuse_what_the_model_cannot_do()
        self.student = self._make_student()
        self.objective, self.schedule = self.task.objective(self.models, self.student)
        self.trainable = self.student.trainable()
        #: What is trained beside the student, and thrown away when it is done.
        self.auxiliary = self.task.auxiliary(self.objective)

    # ---- putting it together -----------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self._say(text)

    @property
    def _sharded(self) -> bool:
        """Whether parameters live in pieces on several devices, in a form that is the launcher's business."""
        return self.accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM")

    def _refuse_what_sharding_cannot_do(self) -> None:
        problems = []
        if self._sharded and self.recipe.training.share_frozen:
            problems.append("training.share_frozen: expected false or null with FSDP or DeepSpeed, got true")
        if self._sharded and (beside := self.task.beside_the_student):
            problems.append(f"{beside}: expected none with FSDP or DeepSpeed")
        if self._sharded and self.recipe.training.ema_decay is not None:
            value = self.recipe.training.ema_decay
            problems.append(f"training.ema_decay: expected null with FSDP or DeepSpeed, got {value}")
        if self.accelerator.distributed_type.value == "FSDP" and self.recipe.training.optimizer == "prodigy":
            problems.append(
                "training.optimizer: expected adamw with FSDP (prodigy learns one step from all gradients, and each "
                "process would see its own pieces), got 'prodigy'"
            )
        if problems:
            raise RecipeError("recipe", problems)

    def _refuse_what_the_model_cannot_do(self) -> None:
        problems, models, data = [], self.models, self.recipe.data
        name = type(models.pipeline).__name__
        if self.recipe.objective.kind not in models.objectives:
            problems.append(
                f"objective.kind: expected {' or '.join(map(repr, models.objectives))} for a {name} "
                f"({self.recipe.model.pretrained!r}), got '{self.recipe.objective.kind}'"
            )
        else:
            problems += self.task.problems(models)
        validation = self.recipe.output.validation
        sides = {"data.resolution": data.resolution}
        if data.resize == "buckets":
            sides = {"data.bucket_step": data.bucket_step}
        if validation.prompts:
            sides |= {f"output.validation.{side}": getattr(validation, side) for side in ("height", "width")}
        for key, value in sides.items():
            if value is not None and value % models.multiple:
                problems.append(f"{key}: expected a multiple of {models.multiple} for a {name}, got {value}")
        if problems:
            raise RecipeError("recipe", problems)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None for a new run. Raises if the folder holds a run of another recipe."""
        newest = checkpoint.latest(self.folder)
        record = self.folder / "recipe.yaml"
        if newest is None:
            return None
        differences = self.recipe.differences(load(record))
        problems = [
            f"{key}: the run in output.folder has {before!r}, this recipe {now!r}; choose another output.folder, or "
            "continue with the same value"
            for key, (now, before) in differences.items()
            if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
        ]
        if problems:
            raise RecipeError(str(self.folder), problems)
        return newest

    def _make_student(self) -> Student | TunedModel | WholeModel:
        from accelerate.utils import set_seed

        set_seed(self.recipe.training.seed)  # what starts at random starts the same in every process and every run
        student = self.task.start(self.models, share=not self._sharded)
        # An adapter starts from the teacher's float32 weights; only then is what stays frozen narrowed.
        dtype = DTYPES[self.accelerator.mixed_precision]
        self.models.place(self.accelerator.device, dtype)
        student.place(self.accelerator.device, dtype)
        if self.recipe.training.gradient_checkpointing:
            student.model.enable_gradient_checkpointing()
        return student

    def plan(self) -> str:
        """What `run` would do, in a few lines."""
        training, world = self.recipe.training, self.accelerator.num_processes
        per_step = training.batch_size * training.gradient_accumulation * world
        lines = [
            *(f"{word:10} {text}" for word, text in self.task.summary(self.models, self.student)),
            f"data       {len(self.source):,} pictures, {self.recipe.data.kind} at {self.recipe.data.path}",
            f"steps      {training.steps:,} of {per_step} samples ({training.batch_size} x "
            f"{training.gradient_accumulation} micro steps x {world} processes), "
            f"{training.steps * per_step / len(self.source):.2f} epochs",
            f"device     {self.accelerator.device}, mixed precision: {self.accelerator.mixed_precision}",
            f"output     {self.folder}",
        ]
        if self._resume_from is not None:
            lines.append(f"continues  {self._resume_from.name}")
        return "\n".join(lines)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def prepare(self) -> Path:
        """Fill the caches that the recipe asks for, and train nothing; returns their folder.

        Raises:
            RecipeError: it asks for none.
        """
        wanted = self.recipe.data.cache
        if not (wanted.text or wanted.latents):
            raise RecipeError(
                "recipe", ["data.cache: expected text: true, latents: true or both, to prepare; got neither"]
            )
        self._fill_caches()
        return Path(expand(wanted.folder)) if wanted.folder else self.folder / "cache"

    def _fill_caches(self):
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        return fill_caches(self.recipe, self.models, self.source, self.folder, self.accelerator)

    def run(self) -> Path:
        """Train to the last step; returns the folder of the final weights, as users load them.

        Raises:
            Interrupted: SIGTERM or Ctrl-C came; a checkpoint was written.
            FloatingPointError: a loss is not finite; the message names the step, and the last checkpoint is untouched.
        """
        from accelerate.utils import set_seed

        training, output, accelerator = self.recipe.training, self.recipe.output, self.accelerator
        set_seed(training.seed, device_specific=True)  # for dropout; all else belongs to the samples
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_partial(self.folder)
            checkpoint.write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
        accelerator.wait_for_everyone()
        text_cache, latent_cache = self._fill_caches()

        objective, optimizer, schedule = self._prepare()
        self._average = self._make_average()
        state = checkpoint.read_state(self._resume_from) if self._resume_from else {"step": 0, "micro_batches": 0}
        first, rest = divmod(state["micro_batches"], accelerator.num_processes)
        if rest:
            raise RecipeError(
                str(self._resume_from),
                [
                    f"{state['micro_batches']} micro batches are done, which {accelerator.num_processes} processes "
                    "cannot share; continue with as many processes as before"
                ],
            )
        count = (training.steps - state["step"]) * training.gradient_accumulation
        batches = iter(
            self.task.batches(
                self.source,
                self.order,
                first=first,
                count=max(count, 0),
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                text_cache=text_cache,
                latent_cache=latent_cache,
            )
        )
        if self._resume_from:
            self._restore(self._resume_from, schedule, state)
            self.say(f"continuing after step {state['step']}")
        if output.log_with:
            accelerator.init_trackers("distill", init_kwargs={"tensorboard": {"purge_step": state["step"] + 1}})

        step, self._micro_batches = state["step"], state["micro_batches"]
        with _signals() as received, self._progress(step) as bar:
            while step < training.steps:
                losses = self._step(objective, optimizer, schedule, batches, step)
                step += 1
                self._micro_batches += training.gradient_accumulation * accelerator.num_processes
                bar.update()
                bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()})
                if output.log_with and (step % output.log_every == 0 or step == 1):
                    values = {f"loss/{name}": value for name, value in losses.items()}
                    accelerator.log(values | {"learning_rate": schedule.get_last_lr()[0]}, step=step)
                stop = self._agreed(received)
                if stop or step % output.checkpoint_every == 0 or step == training.steps:
                    self._save(step, schedule)
                if self.task.shown and (step % output.validation.every == 0 or step == training.steps):
                    self._validate(step)
                if stop and step < training.steps:
                    raise Interrupted(stop, step)
        final = self._export(self.folder / "final")
        accelerator.end_training()
        return final

    def _step(self, objective, optimizer, schedule, batches: Iterator[dict], step: int) -> dict[str, float]:
        """One optimizer step; the mean losses of its samples on all processes."""
        training, accelerator = self.recipe.training, self.accelerator
        self.task.begin(step)
        parts: list[dict[str, torch.Tensor]] = []
        for _ in range(training.gradient_accumulation):
            inputs = self._encode(next(batches))
            with accelerator.accumulate(objective):
                losses = objective(**inputs)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients and training.max_grad_norm is not None:
                    for parameters in self._groups():
                        accelerator.clip_grad_norm_(parameters, training.max_grad_norm)
                mean = losses["loss"].detach()
                if not torch.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss is {mean.item()} in step {step + 1} (losses: "
                        f"{ {name: value.item() for name, value in losses.items()} }); a lower learning rate, "
                        "training.max_grad_norm or mixed_precision: bf16 (or no) may help"
                    )
                optimizer.step()
                optimizer.zero_grad()
            parts.append({name: value.detach().float() for name, value in losses.items()})
        if not accelerator.optimizer_step_was_skipped:  # the loss scale of fp16 was too high: nothing has been learnt
            schedule.step()
            if self._average is not None:
                self._average.step(self.trainable.values())
        names = list(parts[0])
        means = torch.stack([torch.stack([part[name] for part in parts]).mean() for name in names])
        return dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))

    def _encode(self, batch: dict) -> dict:
        """A batch of the loader as the objective's arguments."""
        return self.task.encode(batch, self.models, self.schedule, self.accelerator.device)

    def _prepare(self):
        training = self.recipe.training
        rates = [training.learning_rate, *(part.learning_rate for part in self.auxiliary.values())]
        groups = [{"params": own, "lr": rate} for own, rate in zip(self._groups(), rates, strict=True)]
        optimizer = _optimizer(groups, training)
        # Stepped by us, once per optimizer step: Accelerate's wrapper would step it once per process.
        schedule = _schedule(optimizer, training)
        self.models.model.eval()
        self.objective.train()
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None:  # Accelerate reads it off a DataLoader, and ours is not prepared by it
            deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = training.batch_size
        objective, optimizer = self.accelerator.prepare(self.objective, optimizer)
        if self._sharded:
            self.trainable = self.student.trainable()  # the launcher has put pieces in the place of the parameters
        else:
            self.accelerator.register_save_state_pre_hook(self._save_trainable)
            self.accelerator.register_load_state_pre_hook(self._load_trainable)
        return objective, optimizer, schedule

    def _groups(self) -> list[list[nn.Parameter]]:
        """The parameters of the student, and of each that is trained beside it."""
        others = ([p for p in part.module.parameters() if p.requires_grad] for part in self.auxiliary.values())
        return [list(self.trainable.values()), *others]

    def _trained(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by the name that a checkpoint has for it."""
        trained = dict(self.trainable)
        for name, part in self.auxiliary.items():
            trained |= {f"{name}:{key}": p for key, p in part.module.named_parameters() if p.requires_grad}
        return trained

    def _make_average(self):
        from diffusers.training_utils import EMAModel

        decay = self.recipe.training.ema_decay
        if decay is None:
            return None
        return EMAModel(list(self.trainable.values()), decay=decay)

    def _agreed(self, received: list[int]) -> int:
        """The signal that came to any of the processes, 0 if none: all of them stop after the same step."""
        if self.accelerator.num_processes == 1:
            return received[0] if received else 0
        flag = torch.tensor([float(received[0] if received else 0)], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max().item())

    def _progress(self, done: int):
        from tqdm.auto import tqdm

        return tqdm(
            total=self.recipe.training.steps,
            initial=done,
            desc="distilling",
            unit="step",
            smoothing=0.05,
            disable=not self.accelerator.is_main_process,
            file=sys.stderr,
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, step: int, schedule) -> None:
        training, accelerator = self.recipe.training, self.accelerator
        target = checkpoint.path(self.folder, step)
        is_main, barrier = accelerator.is_main_process, accelerator.wait_for_everyone
        with checkpoint.whole(target, is_main=is_main, barrier=barrier) as folder:
            accelerator.save_state(str(folder))
            if is_main:
                if self._average is not None:
                    shadow = dict(zip(self.trainable, self._average.shadow_params, strict=True))
                    _save_tensors(folder / AVERAGE, shadow)
                if not self._sharded:
                    self.student.save(folder / self.student.saved_as, self.models)
                state = {
                    "step": step,
                    "micro_batches": self._micro_batches,
                    "samples": self._micro_batches * training.batch_size,
                    "lr_schedule": schedule.state_dict(),
                    "ema_steps": self._average.optimization_step if self._average is not None else 0,
                    "versions": {"linattn": __version__, "torch": torch.__version__},
                }
                checkpoint.write_state(folder, state)
        if is_main:
            checkpoint.keep_newest(self.folder, self.recipe.output.keep_checkpoints)

    def _restore(self, folder: Path, schedule, state: dict) -> None:
        random_state = folder / f"random_states_{self.accelerator.process_index}.pkl"
        if not random_state.is_file():
            self.say(f"{random_state.name} is not in {folder}: dropout will draw other numbers than it would have")
        self.accelerator.load_state(str(folder))
        schedule.load_state_dict(state["lr_schedule"])
        if self._average is not None:
            shadow = load_file(folder / AVERAGE)
            for (name, parameter), own in zip(self.trainable.items(), self._average.shadow_params, strict=True):
                own.copy_(shadow[name].to(parameter))
            self._average.optimization_step = state["ema_steps"]

    def _save_trainable(self, models, weights, folder) -> None:
        # In place of Accelerate's copy of the whole model, of which almost everything is frozen.
        weights.clear()
        if self.accelerator.is_main_process:
            _save_tensors(Path(folder) / TRAINABLE, self._trained())

    def _load_trainable(self, models, folder) -> None:
        models.clear()
        stored, trained = load_file(Path(folder) / TRAINABLE), self._trained()
        if stored.keys() != trained.keys():
            different = sorted(stored.keys() ^ trained.keys())
            raise ValueError(f"{folder} was written by another student: they differ in {', '.join(different[:3])} ...")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])

    def _export(self, target: Path) -> Path:
        """The result as users load it: of the moving average, if there is one."""
        accelerator = self.accelerator
        student = self._gathered() if self._sharded else self.student
        if accelerator.is_main_process:
            with checkpoint.whole(target) as folder, self._averaged():
                student.save(folder, self.models)
        accelerator.wait_for_everyone()
        return target

    def _gathered(self) -> Student | TunedModel | WholeModel | None:
        """On the main process a student with the weights that now lie in pieces on all of them."""
        (wrapped,) = self.accelerator._models
        state = self.accelerator.get_state_dict(wrapped)
        if not self.accelerator.is_main_process:
            return None
        student = self.student.blank() if hasattr(self.student, "blank") else self._make_student()
        names = list(self.trainable)
        with torch.no_grad():
            for name, parameter in student.trainable().items():
                parameter.copy_(next(value for key, value in state.items() if key.endswith(f"student.model.{name}")))
        assert list(student.trainable()) == names
        return student

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        if self._average is None:
            yield
            return
        parameters = list(self.trainable.values())
        self._average.store(parameters)
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            self._average.restore(parameters)

    # ---- validation --------------------------------------------------------------------------------------------------

    def _validate(self, step: int) -> None:
        """What the student is compared with (left) and its own pictures (right), into `validation/` and the log."""
        if self._sharded:
            return
        if self.accelerator.is_main_process:
            autocast = self.accelerator.autocast
            if not hasattr(self, "_compared"):
                self._compared = self.task.compared(self.models, autocast)
            self.student.model.eval()
            with self._averaged():
                drawn = self.task.pictures(self.models, self.student.model, autocast)
            self.objective.train()
            sheet = _sheet([list(pair) for pair in zip(self._compared, drawn, strict=True)])
            target = self.folder / "validation" / f"step-{step:08d}.png"
            target.parent.mkdir(exist_ok=True)
            sheet.save(target)
            if self.recipe.output.log_with:
                import numpy

                writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
                writer.add_image(self.task.columns, numpy.asarray(sheet), step, dataformats="HWC")
        self.accelerator.wait_for_everyone()


def _optimizer(groups: list[dict], training) -> torch.optim.Optimizer:
    """The optimizer of a recipe's `training` section.

    Args:
        groups: of parameters, with their learning rates.
    """
    common = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "eps": training.epsilon,
        "weight_decay": training.weight_decay,
    }
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    Prodigy = _prodigy()
    own = training.prodigy.model_dump()
    own["use_bias_correction"] = own.pop("bias_correction")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decouples
        return Prodigy(groups, **common, **own)


def _schedule(optimizer: torch.optim.Optimizer, training):
    """The learning rate schedule of a recipe's `training` section."""
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    steps = {"num_warmup_steps": training.warmup_steps, "num_training_steps": training.steps}
    if training.final_learning_rate is not None:
        return get_polynomial_decay_schedule_with_warmup(optimizer, **steps, lr_end=training.final_learning_rate)
    return get_scheduler(training.lr_schedule, optimizer=optimizer, **steps)


def _prodigy() -> type:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ImportError(
            "training.optimizer: prodigyopt is not installed: pip install 'linattn[train]', or set it to adamw"
        ) from None
    return Prodigy


def _accelerator(recipe: Recipe, folder: Path):
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    training = recipe.training
    if training.optimizer == "prodigy":
        _prodigy()  # told before a model is loaded
    if recipe.output.log_with == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise ImportError(
                "output.log_with: tensorboard is not installed: pip install 'linattn[train]', or set it to null"
            ) from None
    return Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation,
        mixed_precision=training.mixed_precision,
        log_with=recipe.output.log_with,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one does what it always does."""
    received: list[int] = []

    def note(number, _frame):
        received.append(number)
        signal.signal(number, before[number])

    try:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not in the main thread, where Python does not allow it: then signals do what they always do
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save_tensors(file: Path, tensors) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)


def _sheet(rows: list[list]):
    """Pictures side by side, in rows; those of a row have one size."""
    from PIL import Image

    width = max(sum(picture.width for picture in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(row[0].height for row in rows)))
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        top += row[0].height
    return sheet
