"""InfDiTUpscalePipeline: pictures enlarged by Inf-DiT, to any size, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from linattn.schedulers import EDMScheduler
from linattn.schedulers.edm import preconditioning

from . import images, streaming
from .model import InfDiTTransformer2DModel

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_ROUNDINGS = ("nearest", "truncate")
_STARTS = ("lr", "noise")


class InfDiTUpscalePipeline(DiffusionPipeline):
    r"""Enlarges pictures with Inf-DiT.

        pipe = InfDiTUpscalePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
        large = pipe(Image.open("small.png"), scale=4, generator=torch.Generator().manual_seed(0)).images[0]

    The picture is denoised in pixel space, from noise of level sigma_max around the bicubic enlargement, by 2 n - 1
    calls of the network for n steps (Heun; `EDMScheduler` has samplers that need fewer). Each call walks over the
    picture in strips that fit into `max_memory`, and each strip of the sample is updated as soon as it comes: beside
    what the network holds there are never more than three pictures of the output's size in memory, in float32.

    Args:
        transformer: the network.
        scheduler: an `EDMScheduler`.
        image_encoder: transformers' CLIPVisionModelWithProjection, whose vector of the small picture conditions the
            network. Not needed for networks with vector_dim = 0, or where calls are given image_embeds.

    Raises:
        TypeError: another scheduler, or a transformer that cannot walk in strips.

    Source: Yang et al. 2024, Inf-DiT (arXiv 2405.04312). docs/infdit.md.
    """

    model_cpu_offload_seq = "image_encoder->transformer"
    _optional_components = ["image_encoder"]  # noqa: RUF012 (diffusers' convention)
    _callback_tensor_inputs = ["sample"]  # noqa: RUF012

    def __init__(
        self,
        transformer: InfDiTTransformer2DModel,
        scheduler: EDMScheduler,
        image_encoder: nn.Module | None = None,
    ):
        super().__init__()
        if not isinstance(scheduler, EDMScheduler):
            raise TypeError(f"scheduler must be an EDMScheduler, got {type(scheduler).__name__}")
        if not hasattr(transformer, "strips"):
            raise TypeError(f"transformer must be an InfDiTTransformer2DModel, got {type(transformer).__name__}")
        self.register_modules(transformer=transformer, scheduler=scheduler, image_encoder=image_encoder)

    # ------------------------------------------------------------------------------------------------------------ call

    @torch.no_grad()
    def __call__(
        self,
        image,
        scale: float = 4.0,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        start: str = "lr",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image_embeds: Tensor | None = None,
        max_memory: int | str | None = "auto",
        schedule: str | streaming.Plan | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        rounding: str = "nearest",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
        progress: Callable[[int, int], None] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Enlarge one picture or several.

        Args:
            image: a PIL image, a numpy array (uint8, uint16 or floats in [0, 1]; (h, w), (h, w, c) or (n, h, w, c)), a
                tensor in [-1, 1] ((3, h, w) or (n, 3, h, w)), or a list of these; sizes may differ. Transparency is
                enlarged apart, by bicubic interpolation. 16-bit values are used in full; PIL gives 16-bit colour
                pictures as 8 bits, so pass those as arrays.
            scale: any number of at least 1. The network was trained for 4.
            height, width: of the output in pixels, instead of scale; one alone keeps the aspect ratio.
            num_inference_steps: n.
            sigmas: noise levels instead of n, falling.
            start: "lr": noise around the enlarged picture, as the authors do; "noise": noise alone, which can be
                sharper and may miss the colours.
            generator: on the CPU, where all noise is drawn in float32: a seed gives the same noise on every device,
                with every schedule. A list has one for each picture, and then a picture does not depend on the others.
            image_embeds: (n, vector_dim) instead of what image_encoder makes of the pictures.
            max_memory: bytes, or e.g. "4GiB", that sampling may take on the device beside the weights; "auto": most of
                what is free; None: no bound.
            schedule: "full", "layer_major" or "streaming", with the longest strips that max_memory allows, instead of
                the fastest of them; or a plan of `linattn.adapters.infdit.streaming`, whatever max_memory says.
            batch_size: how many pictures in a row, if their outputs are of one size, go through the network together.
            output_type: "pil": of the kind that came, 8 bits; "np": (h, w, 3) or with alpha (h, w, 4) in [0, 1]; "pt":
                (3, h, w) in [-1, 1], without alpha; "latent": the same as "pt", but not clamped. Arrays and tensors are
                stacked where they have one shape.
            rounding: to 8 bits: "nearest", or "truncate" as in the authors' code.
            callback_on_step_end: called after every call of the network with (pipeline, index, timestep, tensors);
                may return {"sample": other}, and raise to stop. The sample is (batch, 3, H, W), H and W padded to whole
                blocks, and is changed in place afterwards.
            callback_on_step_end_tensor_inputs: names of what tensors holds; there is "sample" only.
            progress: called with (done, total) as the work proceeds, in rows of blocks times calls of the network.
            return_dict: False returns a tuple.

        Raises:
            TypeError, ValueError: an argument that is not as above, before anything runs.
        """
        pictures = images.read(image)
        sizes = [images.output_size(picture.size, scale, height, width) for picture in pictures]
        for name, value, allowed in (
            ("start", start, _STARTS),
            ("output_type", output_type, _OUTPUT_TYPES),
            ("rounding", rounding, _ROUNDINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number, at least 1, got {batch_size!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            allowed = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs must be among {allowed}, got {sorted(unknown)}")
        generators = _generators(generator, len(pictures))
        embeds = self._checked_embeds(image_embeds, len(pictures))
        if schedule is not None:
            streaming.resolve(schedule)  # checks it
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps)
        else:
            self.scheduler.set_timesteps(sigmas=sigmas)

        block = self.transformer.block_pixels
        groups = _groups(sizes, batch_size)
        grids = [images.padded(sizes[group[0]], block) for group in groups]
        # What is free is asked when the pictures are there; a bound that is too low is reported before anything runs.
        plans = [
            None if max_memory == "auto" else self._plan(len(group), *grid, max_memory, schedule)
            for group, grid in zip(groups, grids, strict=True)
        ]
        done, total, results = 0, len(self.scheduler.calls) * sum(grid[0] // block for grid in grids), []
        with self.progress_bar(total=total) as bar:

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.update(count)
                if progress is not None:
                    progress(done, total)

            for group, plan in zip(groups, plans, strict=True):
                sample = self._sample(
                    [pictures[i] for i in group],
                    sizes[group[0]],
                    [generators[i] for i in group],
                    None if embeds is None else embeds[group],
                    start,
                    plan or (lambda *size: self._plan(*size, "auto", schedule)),
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    advance,
                )
                for i, one in zip(group, sample, strict=True):
                    results.append(_finished(one, pictures[i], sizes[i], output_type, rounding))
                del sample, one
        self.maybe_free_model_hooks()
        out = results if output_type == "pil" else images.stacked(results)
        return ImagePipelineOutput(images=out) if return_dict else (out,)

    @torch.no_grad()
    def encode_image(self, lr: Tensor) -> Tensor:
        """The vector (n, vector_dim) of pictures (n, 3, h, w) in [-1, 1], of length 1, in float32."""
        encoder = self.image_encoder
        if encoder is None:
            raise ValueError("this pipeline has no image_encoder: pass image_embeds")
        pixels = images.clip_pixels(lr.float(), encoder.config.image_size)
        vector = encoder(pixels.to(self._execution_device, encoder.dtype)).image_embeds.float()
        return nn.functional.normalize(vector, dim=-1)

    def _checked_embeds(self, image_embeds: Tensor | None, count: int) -> Tensor | None:
        vector_dim = self.transformer.config.vector_dim
        if image_embeds is None:
            if vector_dim and self.image_encoder is None:
                raise ValueError(
                    "this network is conditioned on an image vector: the pipeline needs an image_encoder "
                    f"(CLIPVisionModelWithProjection), or the call image_embeds ({count}, {vector_dim})"
                )
            return None
        wanted = (count, vector_dim)
        if not vector_dim or tuple(image_embeds.shape) != wanted:
            expected = f"must be {wanted}" if vector_dim else "must be None, since this network has vector_dim = 0"
            raise ValueError(f"image_embeds {expected}, got {tuple(image_embeds.shape)}")
        return image_embeds

    # -------------------------------------------------------------------------------------------------------- sampling

    def _plan(self, batch: int, height: int, width: int, max_memory, schedule) -> streaming.Plan:
        """How the network walks over pictures of this size, in what the sampler leaves of max_memory."""
        if isinstance(schedule, streaming.Plan):
            return schedule
        if max_memory in (None, "auto"):
            return streaming.plan(self.transformer, batch, height, width, max_memory, schedule=schedule)
        pictures = 3 if any(call.keep for call in self.scheduler.calls) else 2
        # In float32; and the low resolution twice, as it came and in the network's type.
        held = batch * 3 * height * width * 4 * (pictures + 2 / self.transformer.config.sr_scale**2)
        budget = streaming.memory_limit(max_memory, self._execution_device) - int(held)
        try:
            # A bound of 1 fits nothing, and says what would.
            return streaming.plan(self.transformer, batch, height, width, max(budget, 1), schedule=schedule)
        except ValueError as error:
            raise ValueError(f"{error}, beside {held / 2**20:,.0f} MiB for the sampler's pictures") from None

    def _sample(self, pictures, size, generators, embeds, start, plan, callback, callback_inputs, advance) -> Tensor:
        """Pictures whose output has one size, together: (n, 3, H, W) float32, H and W in whole blocks."""
        transformer, scheduler, device = self.transformer, self.scheduler, self._execution_device
        config, block = transformer.config, transformer.block_pixels
        seen = [images.views(picture.pixels, size, block, config.sr_scale) for picture in pictures]
        lr, lr_up = (torch.cat([getattr(view, name) for view in seen]).to(device) for name in ("lr", "lr_up"))
        if config.vector_dim and embeds is None:
            embeds = self.encode_image(torch.cat([view.lr_picture for view in seen]))
        del seen
        if embeds is not None:
            embeds = embeds.to(device, transformer.dtype)
        height, width = lr_up.shape[2:]

        x = torch.empty_like(lr_up)
        history = torch.empty_like(x) if any(call.keep for call in scheduler.calls) else None
        later = any(call.noise for call in scheduler.calls)
        for i, generator in enumerate(generators):
            for top in range(0, height, block):
                x[i, :, top : top + block] = _normal(generator, block, width)
            if later:
                # Noise of later steps has a generator of its own, started by one number: so what a picture takes from
                # a generator that others share does not depend on which of them go through the network together.
                generators[i] = torch.Generator().manual_seed(_seed(generator))
        x *= scheduler.init_noise_sigma
        if start == "lr":
            x += lr_up

        _move_in(transformer)
        if callable(plan):
            plan = plan(len(x), height, width)
        context = transformer.prepare_lr(lr, keep=plan.keep_lr)
        for index, call in enumerate(scheduler.calls):
            timestep = scheduler.timesteps[index]
            c_in = preconditioning(call.sigma, scheduler.config.sigma_data).c_in.item()

            def read(top: int, bottom: int, c_in: float = c_in) -> Tensor:
                seen = lr_up.new_empty(len(x), 6, bottom - top, width, dtype=transformer.dtype)
                torch.mul(x[:, :, top:bottom], c_in, out=seen[:, :3])
                torch.mul(lr_up[:, :, top:bottom], c_in, out=seen[:, 3:])
                return seen

            strips = transformer.strips(read, height, width, timestep, embeds, lr_context=context, schedule=plan)
            for top, bottom, output in strips:
                rows = x[:, :, top:bottom]
                kept = None if history is None else history[:, :, top:bottom]
                noise = None
                if call.noise:
                    noise = torch.empty_like(rows)
                    for one, generator in zip(noise, generators, strict=True):
                        for first in range(0, bottom - top, block):
                            one[:, first : first + block] = _normal(generator, block, width)
                denoised = scheduler.denoised(output, rows, call.sigma)
                after = call.update(rows, denoised, kept, noise)
                if call.keep:
                    kept.copy_(rows if call.keep == "sample" else denoised)
                rows.copy_(after)  # the network has read them, and reads them no more
                advance((bottom - top) // block)
            if callback is not None:
                tensors = {"sample": x} if "sample" in callback_inputs else {}
                returned = callback(self, index, timestep, tensors) or {}
                if returned.get("sample", x) is not x:
                    x.copy_(returned["sample"])
        return x


def _generators(generator, count: int) -> list[torch.Generator | None]:
    """One for each picture; a single one is drawn from in turn."""
    if generator is None or isinstance(generator, torch.Generator):
        found = [generator] * count
    else:
        found = list(generator)
        if len(found) != count:
            raise ValueError(f"generator must be one, or a list of one for each of {count} pictures, got {len(found)}")
    for one in found:
        if one is None:
            continue
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be torch.Generator, got {type(one).__name__}")
        if one.device.type != "cpu":
            raise ValueError(
                f"generator must be on the CPU, so that a seed means the same everywhere, got one on {one.device}"
            )
    return found


def _groups(sizes: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of pictures that go together: neighbours of one size, at most batch_size."""
    groups: list[list[int]] = []
    for i, size in enumerate(sizes):
        if groups and len(groups[-1]) < batch_size and sizes[groups[-1][0]] == size:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _normal(generator: torch.Generator | None, rows: int, width: int) -> Tensor:
    """Noise for a row of blocks of one picture, (3, rows, width), on the CPU in float32.

    All noise is drawn in such rows, from the top: the same numbers whatever the strips, and no more memory than that.
    """
    return torch.randn(3, rows, width, generator=generator)


def _seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**63 - 1, (1,), generator=generator))


def _move_in(model: nn.Module) -> None:
    """With enable_model_cpu_offload a model comes to the device when it is called; this one is asked for strips."""
    hook = getattr(model, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(model)


def _finished(sample: Tensor, picture: images.Picture, size: tuple[int, int], output_type: str, rounding: str):
    """(3, H, W) cropped to the size and as the user wants it."""
    pixels = sample[:, : size[0], : size[1]]
    if output_type == "latent":
        return pixels.clone()
    if output_type == "pt":
        return pixels.clamp(-1, 1)
    alpha = images.enlarged_alpha(picture, size)
    if output_type == "np":
        return images.to_numpy(pixels, alpha)
    return images.to_pil(pixels, alpha, picture, rounding)
