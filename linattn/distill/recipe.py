"""A distillation run as a YAML file: read, overridden, checked, and written back.

A recipe has six sections (`model`, `student`, `objective`, `data`, `training`, `output`); the classes below are its
schema, and their comments its documentation. Everything that is wrong with a recipe is said at once, before anything is
loaded: the dotted key, what was expected, the value that came, and for an unknown key the nearest one that exists.

YAML 1.1 has two traps for recipes, both taken care of: `1e-4` is text there (it needs a dot to be a number), and `no`
is false (as in `mixed_precision: no`).
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainValidator, Tag, ValidationError

from ..paths import expand, instead_of, tar_paths
from .filters import Filters
from .flash_sections import FlashObjective
from .schema import (
    Count,
    NotNegative,
    Number,
    Pixels,
    Positive,
    Probability,
    Section,
    Seed,
    Text,
    Texts,
    as_paths,
    as_tuple,
    import_path,
    number,
)
from .upscaling import EDMStepsObjective, Upscaling

SHIPPED = Path(__file__).resolve().parent / "recipes"


class RecipeError(ValueError):
    """What is wrong with a recipe: all of it, one line each.

    Attributes:
        problems: the lines, each beginning with the dotted key that it is about where it is about one.
    """

    def __init__(self, source: str, problems: Sequence[str]):
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{source}: {count}", *self.problems]))


# --- the schema ------------------------------------------------------------------------------------------------------


class Model(Section):
    """The teacher, which also gives the student all that is not attention; or, without an adapter, what is trained."""

    pretrained: Text | None = None  # name on the Hugging Face Hub, or folder, of a diffusers pipeline
    revision: Text | None = None
    variant: Text | None = None  # such as fp16
    # Tokens of a caption that T5 sees (FLUX, SD3); None: as its tokenizer says, at most 512 and 256.
    text_length: Annotated[int, Field(ge=1, le=512)] | None = None
    pipeline: Annotated[str, AfterValidator(import_path)] | None = None  # module:Class of one that diffusers lacks
    config: dict[str, Any] | None = None  # in place of pretrained: new weights, of a network of this configuration
    image_encoder: Text | None = None  # name or folder of the CLIP that a pipeline without one is given
    # module:Class that says what the model is shown, where not by its pipeline: docs/conditional_models.md
    kind: Annotated[str, AfterValidator(import_path)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)  # handed to that class

    def conflicts(self):
        if self.config is None:
            if self.pretrained is None:
                yield "pretrained", "required, and missing"
            return
        if self.pretrained is not None:
            yield "config", f"expected null beside model.pretrained: {self.pretrained}, got {self.config}"
        if self.pipeline is None:
            yield "pipeline", "expected module:Class beside model.config, got null"


class Lora(Section):
    """Low-rank training of the student's projections (`student.train: lora`)."""

    rank: Count = 16
    alpha: Positive | None = None  # None: as rank
    dropout: Annotated[float, BeforeValidator(number), Field(ge=0, lt=1)] = 0.0
    targets: Texts = ("to_q", "to_k", "to_v", "to_out.0")
    also_train: Texts = ("to_q_", "to_k_")  # children of the student's modules that are trained in full beside it

    def conflicts(self):
        if not self.targets:
            yield "targets", "expected at least one name of a projection, got []"


class Student(Section):
    """What takes the place of the teacher's attention, and which part of it is trained.

    Beside objective.kind: perflow or flash all of the network is trained, or low-rank updates in all of it.
    """

    adapter: Annotated[str, AfterValidator(import_path)] | None  # module:Class; None: the whole model is the student
    pretrained: Text | None = None  # weights of the adapter to begin with
    options: dict[str, Any] = Field(default_factory=dict)  # handed to the adapter
    train: Literal["full", "lora"] = "full"
    lora: Lora = Field(default_factory=Lora)


class AttentionWeights(Section):
    noise: NotNegative = 1.0  # against the target of the diffusion loss
    prediction: NotNegative = 0.5  # against the teacher's prediction
    feature: NotNegative = 0.5  # against the outputs of the teacher's attention

    def conflicts(self):
        if not (self.noise or self.prediction or self.feature):
            yield "", "expected at least one weight above 0, got 0 for all of noise, prediction, feature"


class AttentionObjective(Section):
    """Attention distillation: weights.noise * L_noise + weights.prediction * L_kd + weights.feature * L_feat."""

    kind: Literal["attention"] = "attention"
    weights: AttentionWeights = Field(default_factory=AttentionWeights)
    features: Texts = ("attn1",)  # last part of the names of the modules whose outputs are compared

    def conflicts(self):
        if self.weights.feature and not self.features:
            yield "features", "expected the name of a module, since weights.feature is not 0; got []"


class FlowAttentionObjective(Section):
    """Attention distillation of a model that is trained by flow matching (FLUX, SD3); L_noise is its own loss."""

    kind: Literal["flow_attention"] = "flow_attention"
    weights: AttentionWeights = Field(default_factory=AttentionWeights)
    feature_interval: Count = 4  # the attention of every how many blocks is compared; FLUX: of single blocks only
    guidance: NotNegative = 3.5  # that the model is told, if it was distilled to be told one (FLUX.1-dev)
    # How the noise level is drawn (logit_normal, mode) or its errors are weighted (sigma_sqrt, cosmap).
    weighting: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    logit_mean: Number = 0.0
    logit_std: Positive = 1.0
    mode_scale: Number = 1.29
    shift: Positive = 1.0  # of the noise levels; 1: uniform, above: more noise


class EDMObjective(Section):
    """Training on data alone, without a teacher, of a model that enlarges pictures (Inf-DiT)."""

    kind: Literal["edm"] = "edm"
    log_sigma_mean: Number = -1.0  # of the natural logarithm of the noise level, which is normal
    log_sigma_std: Positive = 1.4
    sigma_min: Positive = 0.001
    lr_dropout: Probability = 0.07  # chance that noise takes the place of the low resolution picture
    max_offset: Annotated[int, Field(ge=0)] = 896  # rows and columns of tokens that positions start at: 0 to this


class PeRFlowObjective(Section):
    """Piecewise reflow: the student learns that the teacher's path is straight in each window of time (PeRFlow)."""

    kind: Literal["perflow"] = "perflow"
    # What the student says: of diffusion ddim_eps, diff_eps or velocity; of flow matching velocity. docs/perflow.md
    prediction_type: Literal["ddim_eps", "diff_eps", "velocity"] = "ddim_eps"
    windows: Annotated[int, Field(ge=1, le=1000)] = 4
    window_shift: Positive = 1.0  # flow matching: as a scheduler's shift moves the noise levels, so the windows
    solver_steps: Count = 10  # of the teacher, per window
    # Classifier-free guidance of the teacher, which the student then has in it. None: the teacher is not guided, and
    # captions are dropped for both alike ("cfg-sync"), so that the student can be guided as the teacher can.
    teacher_guidance: Annotated[float, BeforeValidator(number), Field(ge=1)] | None = None
    guidance: NotNegative = 3.5  # that both are told, if the model was distilled to be told one (FLUX.1-dev)
    teacher: Literal["model", "student"] = "model"  # student: the student as it starts, with its adapter
    levels: Count = 1000  # of t
    begin_at_noise: bool = False  # the first window begins at pure noise, not at the noisiest level of the teacher
    legacy_grid: bool = False  # the original's solver, whose steps may miss a window's end
    distance: Literal["l2", "huber"] = "l2"
    huber_c: Positive = 1e-3
    reweighting: Literal["reciprocal"] | None = None  # errors count 1 / (2.3 max(1 - t, 0.1))


def _kind(value: object) -> object:
    return value.get("kind", "attention") if isinstance(value, dict) else getattr(value, "kind", "attention")


Objective = Annotated[
    Annotated[AttentionObjective, Tag("attention")]
    | Annotated[FlowAttentionObjective, Tag("flow_attention")]
    | Annotated[EDMObjective, Tag("edm")]
    | Annotated[EDMStepsObjective, Tag("edm_steps")]
    | Annotated[PeRFlowObjective, Tag("perflow")]
    | Annotated[FlashObjective, Tag("flash")],
    Discriminator(_kind),
]


class CacheSettings(Section):
    """What is computed once and kept on disk, instead of in every step."""

    text: bool = False
    latents: bool = False
    folder: Text | None = None  # None: <output.folder>/cache


class Data(Section):
    """Pictures with captions, and what is done to them."""

    kind: Literal["images", "webdataset", "datasets"]
    # images: a folder. webdataset: a folder of .tar files, a .tar, a glob, a range ({00..99}.tar), or a list of these.
    # datasets: a folder that Dataset.save_to_disk wrote.
    path: Annotated[str | tuple[str, ...], PlainValidator(as_paths)]
    split: Text | None = None  # of a datasets folder that holds several
    image_key: Text | None = None  # None: see linattn.distill.data, as for the caption
    caption_key: Text | None = None
    resolution: Pixels
    resize: Literal["squash", "crop", "buckets"] = "crop"
    random_crop: bool = False
    random_flip: bool = False
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    bucket_step: Pixels = 64
    max_aspect: Annotated[float, BeforeValidator(number), Field(ge=1)] = 2.0
    caption_drop: Probability = 0.0  # chance that a caption is replaced by the empty one
    workers: Annotated[int, Field(ge=0)] = 4
    filters: Filters = Field(default_factory=Filters)  # which samples are used
    cache: CacheSettings = Field(default_factory=CacheSettings)
    upscaling: Upscaling = Field(default_factory=Upscaling)  # in place of resize, crop and flip beside edm, edm_steps

    def conflicts(self):
        for key in ("random_crop", "random_flip"):
            if self.cache.latents and getattr(self, key):
                yield "cache.latents", f"expected false beside data.{key}: true (one latent cannot hold both), got true"
        if self.random_crop and self.resize == "squash":
            yield "random_crop", "expected false beside data.resize: squash (which crops nothing), got true"
        if self.split is not None and self.kind != "datasets":
            yield (
                "split",
                f"expected null beside data.kind: {self.kind} (only datasets have splits), got {self.split!r}",
            )
        if not isinstance(self.path, str) and self.kind != "webdataset":
            yield "path", f"expected one path beside data.kind: {self.kind}, got a list of {len(self.path)}"
        if self.resize == "buckets" and self.bucket_step > self.resolution:
            yield "bucket_step", f"expected at most data.resolution ({self.resolution}), got {self.bucket_step}"


class Prodigy(Section):
    """What `training.optimizer: prodigy` has beside AdamW; see the package prodigyopt."""

    beta3: Annotated[float, BeforeValidator(number), Field(ge=0, lt=1)] | None = (
        None  # None: the square root of the second beta
    )
    decouple: bool = True  # weight decay as in AdamW
    bias_correction: bool = True
    safeguard_warmup: bool = True
    d_coef: Positive = 1.0
    slice_p: Count = 1  # learn the step from every how many numbers: 11 saves almost two of its four moments


class Training(Section):
    """Optimisation. The learning rate schedules are those of `diffusers.optimization.get_scheduler`."""

    steps: Count  # of the optimizer
    batch_size: Count  # per process and micro step
    gradient_accumulation: Count = 1
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    learning_rate: Positive  # prodigy finds its own: 1.0
    prodigy: Prodigy = Field(default_factory=Prodigy)
    betas: Annotated[tuple[Number, Number], BeforeValidator(as_tuple)] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive | None = None
    lr_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate: NotNegative | None = None  # where polynomial ends; None: at 1e-7
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = "no"
    gradient_checkpointing: bool = False
    ema_decay: Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)] | None = None  # None: no average is kept
    seed: Seed = 0
    share_frozen: bool | None = None  # one copy of what teacher and student have in common; None: where possible

    def conflicts(self):
        for place, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                yield f"betas[{place}]", f"expected a number from 0 to below 1, got {beta}"
        if self.warmup_steps and self.lr_schedule == "constant":
            yield (
                "warmup_steps",
                "expected 0 beside training.lr_schedule: constant (which has no warm-up: 'constant_with_warmup' has), "
                f"got {self.warmup_steps}",
            )
        if self.final_learning_rate is not None:
            if self.lr_schedule != "polynomial":
                yield (
                    "final_learning_rate",
                    f"expected null beside training.lr_schedule: {self.lr_schedule} (polynomial ends where it is "
                    f"told), got {self.final_learning_rate}",
                )
            if self.final_learning_rate >= self.learning_rate:
                yield (
                    "final_learning_rate",
                    f"expected less than training.learning_rate ({self.learning_rate}), got {self.final_learning_rate}",
                )
        if self.warmup_steps > self.steps:
            yield "warmup_steps", f"expected at most training.steps ({self.steps}), got {self.warmup_steps}"


class Validation(Section):
    """Pictures that the student draws on the way."""

    prompts: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    images: Texts = ()  # files, in place of prompts beside objective.kind: edm, edm_steps: they are enlarged
    every: Count = 1000  # optimizer steps
    steps: Count = 25  # of the sampler
    teacher_steps: Count | None = None  # for the teacher's pictures; None: as steps
    guidance: NotNegative = 7.5
    height: Pixels | None = None  # None: what the model was made for
    width: Pixels | None = None
    seed: Seed = 0


class Output(Section):
    folder: Text
    checkpoint_every: Count = 1000
    keep_checkpoints: Count | None = 2  # None: all
    log_with: Literal["tensorboard"] | None = "tensorboard"
    log_every: Count = 10
    validation: Validation = Field(default_factory=Validation)


class Recipe(Section):
    """A whole run. Made by :func:`load`; the attributes are the sections, and theirs the keys of the YAML file."""

    model: Model
    student: Student
    objective: Objective = Field(default_factory=AttentionObjective)
    data: Data
    training: Training
    output: Output

    def conflicts(self):
        kind = self.objective.kind
        if kind in ("edm", "edm_steps"):
            without, why = dict(NOT_BESIDE_EDM), f"objective.kind: {kind}"
            if kind == "edm_steps":
                without = {key: value for key, value in without.items() if key not in BESIDE_A_TEACHER}
                without["model.config"] = None  # whose weights are new, and teach nothing
                yield from self._sharing_conflicts()
                shown, most = self.output.validation, self.objective.grid_steps
                if shown.images and shown.steps > most:
                    expected = f"expected at most objective.grid_steps ({most}) beside {why}"
                    yield "output.validation.steps", f"{expected}, got {shown.steps}"
            if self.data.kind == "images":
                without["data.image_key"] = None  # of a table of captions, which is not read
        else:
            without, why = dict(ONLY_BESIDE_EDM), f"objective.kind: {kind}"
            if kind in ("perflow", "flash"):
                del without["output.validation.images"]  # of models that are shown pictures
            if kind in ("perflow", "flash"):
                yield from self._step_conflicts()
            elif self.student.adapter is None:
                yield "student.adapter", f"expected module:Class beside {why}, got null"
        for key, expected in without.items():
            value: Any = self
            for part in key.split("."):
                value = getattr(value, part)
            if value != expected:
                yield key, f"expected {_show(expected)} beside {why}, got {_show(value)}"

    def _step_conflicts(self):
        """What does not go together in a run that distils steps."""
        student, wanted = self.student, self.objective
        if student.adapter is None:
            for key, expected in (("pretrained", None), ("options", {})):
                if (value := getattr(student, key)) != expected:
                    why = "beside student.adapter: null (there is nothing to put it into)"
                    yield f"student.{key}", f"expected {_show(expected)} {why}, got {_show(value)}"
            if wanted.teacher == "student":
                why = "beside student.adapter: null (the two are the same)"
                yield "objective.teacher", f"expected 'model' {why}, got 'student'"
        elif student.train == "lora":
            why = f"beside objective.kind: {wanted.kind}, student.adapter and student.train: lora"
            if student.pretrained is None:
                yield "student.pretrained", f"expected the adapter's weights {why} (the result has none), got null"
            if student.lora.also_train:
                yield (
                    "student.lora.also_train",
                    f"expected [] {why} (no LoRA holds them), got {_show(student.lora.also_train)}",
                )
        yield from self._sharing_conflicts()
        if wanted.kind == "flash":
            beside = [name for name in ("discriminator", "fake_score") if getattr(wanted, name) is not None]
            if beside and self.training.optimizer == "prodigy":
                why = f"beside objective.{beside[0]} (prodigy learns one step for all that is trained)"
                yield "training.optimizer", f"expected 'adamw' {why}, got 'prodigy'"
            if self.data.caption_drop:
                why = "beside objective.kind: flash (objective.drop says what the student does not see)"
                yield "data.caption_drop", f"expected 0.0 {why}, got {self.data.caption_drop}"

    def _sharing_conflicts(self):
        if self.student.train == "full" and self.training.share_frozen:
            why = f"beside objective.kind: {self.objective.kind} and student.train: full (nothing is frozen)"
            yield "training.share_frozen", f"expected false or null {why}, got true"

    @classmethod
    def parse(cls, content: object, source: str = "recipe") -> Recipe:
        """A recipe from nested dictionaries, as :func:`load` does it from a file.

        Raises:
            RecipeError: naming `source`, with a line for every problem.
        """
        if not isinstance(content, dict):
            keys = ", ".join(cls.model_fields)
            raise RecipeError(source, [f"expected a mapping with the keys {keys}; got {_show(content)}"])
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            lines = dict.fromkeys(line for detail in error.errors() for line in _explain(detail))
            raise RecipeError(source, list(lines)) from None

    def to_yaml(self) -> str:
        """The recipe with every default written out; :func:`load` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=110)

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Dotted key -> (value here, value in `other`), for every key at which two recipes differ."""

        def walk(a: object, b: object, key: str) -> Iterator[tuple[str, tuple[object, object]]]:
            if isinstance(a, dict) and isinstance(b, dict):
                for part in dict.fromkeys([*a, *b]):
                    yield from walk(a.get(part), b.get(part), f"{key}.{part}" if key else str(part))
            elif a != b:
                yield key, (a, b)

        return dict(walk(self.model_dump(), other.model_dump(), ""))

    def check_paths(self) -> None:
        """Raise if a local path of the recipe does not lead anywhere, before minutes are spent on loading a model.

        `data.path` must exist (a glob must match), and so must `output.validation.images`. `model.pretrained`,
        `model.image_encoder` and `student.pretrained` must exist where they can only be folders: a name on the Hub is
        `name` or `owner/name`. `output.folder` and `data.cache.folder` may be missing, but not be files.

        Raises:
            RecipeError: the key, the path, and the nearest one that exists.
        """
        problems = []
        paths = [self.data.path] if isinstance(self.data.path, str) else self.data.path
        for path in tar_paths(paths) if self.data.kind == "webdataset" else paths:
            if not (os.path.exists(expand(path)) or (glob.has_magic(path) and glob.glob(expand(path), recursive=True))):
                problems.append(f"data.path: expected {_PATHS[self.data.kind]}, got {path!r}; {instead_of(path)}")
        for path in self.output.validation.images:
            if not os.path.isfile(expand(path)):
                problems.append(f"output.validation.images: expected image files, got {path!r}; {instead_of(path)}")
        names = {
            "model.pretrained": self.model.pretrained,
            "model.image_encoder": self.model.image_encoder,
            "student.pretrained": self.student.pretrained,
        }
        for key, name in names.items():
            if name is not None and _only_local(name) and not os.path.exists(expand(name)):
                problems.append(f"{key}: expected a folder that exists, got {name!r}; {instead_of(name)}")
        for key, name in (("output.folder", self.output.folder), ("data.cache.folder", self.data.cache.folder)):
            if name is not None and os.path.exists(expand(name)) and not os.path.isdir(expand(name)):
                problems.append(f"{key}: expected a folder, got the file {name!r}")
        if problems:
            raise RecipeError("recipe", problems)


#: What means nothing where whole models learn to enlarge pictures, or only there; and what it has to be then.
NOT_BESIDE_EDM = {
    "model.text_length": None,
    "model.kind": None,
    "model.options": {},
    "student.adapter": None,
    "student.pretrained": None,
    "student.options": {},
    "student.train": "full",
    "data.caption_key": None,
    "data.resize": "crop",
    "data.random_crop": False,
    "data.random_flip": False,
    "data.interpolation": "bicubic",
    "data.caption_drop": 0.0,
    "data.cache.text": False,
    "data.cache.latents": False,
    "training.share_frozen": None,
    "output.validation.prompts": (),
    "output.validation.teacher_steps": None,
}
#: Of the former, what means something where a teacher enlarges pictures (`edm_steps`).
BESIDE_A_TEACHER = ("student.train", "training.share_frozen", "output.validation.teacher_steps")
ONLY_BESIDE_EDM = {
    "model.config": None,
    "model.image_encoder": None,
    "output.validation.images": (),
}

_PATHS = {
    "images": "a folder of images that exists",
    "webdataset": "tar files that exist",
    "datasets": "a folder written by save_to_disk that exists",
}


# --- reading ---------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """The recipes that come with linattn: name -> file."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe (see :func:`shipped`). Relative paths inside it are
            relative to the current directory, not to the file.
        overrides: `"training.steps=3"`: a dotted key, and a value in YAML that takes the place of the file's.

    Raises:
        RecipeError: the file does not exist, is not YAML, or does not fit the schema: every problem, one line each.
    """
    path = _find(path_or_name)
    content = _read(path)
    problems = []
    for override in overrides:
        problems += _override(content, override) if isinstance(content, dict) else []
    try:
        made = Recipe.parse(content, str(path))
    except RecipeError as error:
        raise RecipeError(str(path), [*problems, *error.problems]) from None
    if problems:
        raise RecipeError(str(path), problems)
    return made


def keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, type[Section], str]]:
    """Every key of the schema, once: (dotted key, a section that holds it, its name there)."""
    for name, field in section.model_fields.items():
        yield prefix + name, section, name
        seen = set()  # the members of a union share keys
        for member in _sections(field.annotation):
            for key in keys(member, f"{prefix}{name}."):
                if key[0] not in seen:
                    seen.add(key[0])
                    yield key


def _find(path_or_name: str | Path) -> Path:
    path = Path(expand(os.fspath(path_or_name)))
    if path.is_file():
        return path
    known = shipped()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    if path.is_dir():
        raise RecipeError(str(path_or_name), ["expected a YAML file, got a folder"])
    close = _close(path.stem, known)
    hint = f"; did you mean the shipped recipe {close!r}?" if close else f"; {instead_of(path_or_name)}"
    names = ", ".join(known) or "none"
    raise RecipeError(
        str(path_or_name), [f"expected a YAML file or the name of a shipped recipe ({names}); no such file{hint}"]
    )


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, but a key that stands twice in a mapping is an error instead of the last one winning."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice in this mapping", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> object:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only


def _read(path: Path) -> object:
    try:
        return _parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(str(path), [f"{where}not YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(str(path), [f"not YAML: {error}"]) from None
    except OSError as error:
        raise RecipeError(str(path), [f"cannot be read: {error.strerror}"]) from None


def _override(content: dict, override: str) -> list[str]:
    """Put one `key=value` into content; what is wrong with it."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        return [f"override {override!r}: expected key=value, as in training.steps=3"]
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [f"{key.strip()}: expected a value in YAML, got {text!r} ({getattr(error, 'problem', None) or error})"]
    for place, part in enumerate(parts[:-1]):
        if content.get(part) is None:
            content[part] = {}
        if not isinstance(content[part], dict):
            return [f"{key.strip()}: {'.'.join(parts[: place + 1])} holds a value ({_show(content[part])}), no keys"]
        content[part] = dict(content[part])  # YAML's anchors share one object between places
        content = content[part]
    content[parts[-1]] = value
    return []


# --- explaining ------------------------------------------------------------------------------------------------------


def _sections(annotation: object) -> list[type[Section]]:
    """The sections that a field may hold: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _show(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    value = list(value) if isinstance(value, tuple) else value
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _close(word: str, names: Sequence[str]) -> str | None:
    plain = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1)
    return plain[found[0]] if found else None


def _locate(location: tuple) -> tuple[list[str], type[Section] | None]:
    """pydantic's location as the parts of a dotted key, and the section that holds the last of them.

    The member of a union that was tried is a part of the location, but not of the key.
    """
    section: type[Section] | None = Recipe
    holder: type[Section] | None = Recipe
    parts: list[str] = []
    members: list[type[Section]] = []
    is_tag = False
    for part in location:
        if is_tag:
            section = next((member for member in members if member.model_fields["kind"].default == part), None)
            is_tag = False
            continue
        holder = section
        if isinstance(part, int) and parts and section is None:
            parts[-1] += f"[{part}]"
            continue
        parts.append(str(part))
        field = section.model_fields.get(part) if section else None
        members = _sections(field.annotation) if field else []
        is_tag = field is not None and any(isinstance(extra, Discriminator) for extra in field.metadata)
        section = members[0] if members else None
    return parts, holder


def _explain(detail: dict) -> list[str]:
    """pydantic's description of one error in the words of a recipe."""
    parts, holder = _locate(detail["loc"])
    key, value, kind = ".".join(parts), detail["input"], detail["type"]
    if kind == "conflicts":
        conflicts = detail["ctx"]["conflicts"]
        return [f"{'.'.join(filter(None, [key, inner]))}: {text}" for inner, text in conflicts]
    if kind in ("extra_forbidden", "invalid_key"):
        return [f"{key}: unknown key; {_suggest(parts, holder)}"]
    if detail["loc"][-1:] == ("[key]",):
        return [f"{'.'.join(_locate(detail['loc'][:-2])[0])}: expected text as keys, got {_show(value)}"]
    if kind == "missing" and not isinstance(detail["loc"][-1], int):
        return [f"{key}: required, and missing"]
    if kind in ("missing", "too_long", "too_short"):
        return [f"{key}: {_count(detail)}, got {_show(value)}"]
    if kind == "union_tag_invalid":
        return [f"{key}.kind: expected {detail['ctx']['expected_tags']}, got {_show(value['kind'])}"]
    expected = "expected a number" if kind.startswith(("greater_than", "less_than")) else "expected"
    message = _MESSAGES.get(kind) or detail["msg"].replace("Input should be", expected)
    if callable(message):
        message = message(value)
    return [f"{key}: {message}, got {_show(value)}"]


def _count(detail: dict) -> str:
    if detail["type"] == "missing":
        return "expected one more value"
    return detail["msg"].replace("Tuple should have", "expected")


_MESSAGES: dict[str, str | Callable[[object], str]] = {
    "string_type": lambda value: "expected text" + ("" if isinstance(value, (list, dict)) else " (put it in quotes)"),
    "string_too_short": "expected text that is not empty",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "dict_type": "expected a mapping of keys to values",
    "model_type": "expected a section with keys of its own",
}


def _suggest(parts: list[str], holder: type[Section] | None) -> str:
    """The nearest key beside an unknown one, and the same key in another section; else all that there are here."""
    if holder is None:
        return "no keys are expected here"
    prefix = "".join(f"{part}." for part in parts[:-1])
    elsewhere = next((section for key, section, _ in keys() if key == ".".join(parts)), None)
    if elsewhere is not None:
        return f"expected only beside {prefix}kind: {elsewhere.model_fields['kind'].default}"
    close = _close(parts[-1], list(holder.model_fields))
    candidates = [f"{prefix}{close}"] if close else []
    candidates += sorted((key for key, _, name in keys() if name == parts[-1]), key=lambda key: key.count("."))
    if candidates:
        return f"did you mean {' or '.join(map(repr, candidates))}?"
    return f"expected one of {', '.join(holder.model_fields)}"


def _only_local(name: str) -> bool:
    """Whether a name can be no repository of the Hub, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)
