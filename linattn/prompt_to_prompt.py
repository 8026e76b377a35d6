r"""Prompt-to-prompt: edit a picture by editing its prompt, with the attention of the one picture given to the other.

    edit = PromptToPrompt(pipe, "a cat on a bench", "a dog on a bench")
    source, edited = edit(num_inference_steps=4, guidance_scale=4.5, generator=torch.Generator().manual_seed(0)).images

All prompts are drawn in one batch, from the same noise. In a cross-attention layer, a pixel's attention to the words
says where each word is drawn,

    M = softmax(Q K^T / sqrt(d)),        output = M V,

and the edited picture is given maps of the source for the words that both prompts have, or that stand in each other's
place: for its token j

    M'_j = w_j (a_j (M_source A)_j + (1 - a_j) M_j)

with A the alignment of the tokens (`alignment`), a_j = 1 where token j has a counterpart and the step is among the
first ones (`cross_steps`), and w_j the weight of its word. V stays the edit's own, so the words change and the layout
does not. In self-attention the first steps (`self_steps`) take the source's Q and K, that is its map, for the edit's
own V. Rows of M' need not sum to 1.

What follows, and is tested: equal prompts draw equal pictures; without steps, weights and blend each picture is the one
that its prompt draws alone. It knows nothing of the scheduler; with few steps, fractions of the steps are coarse.

Needs a pipeline with a UNet of diffusers: Stable Diffusion 1.x, 2.x, XL and what shares their UNet; text to image, with
ControlNet too. Self-attention may be of any kind, LinFusion's too: only its queries and keys are exchanged.

Source: Hertz et al. 2022, Prompt-to-Prompt Image Editing with Cross Attention Control (arXiv 2208.01626), section 3.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["PromptToPrompt", "alignment"]


def alignment(source: Sequence[Sequence], edited: Sequence[Sequence], length: int) -> tuple[Tensor, Tensor]:
    """Which tokens of the source prompt stand for those of the edited one.

    Words that both have, in the same order, are matched one to one. Where words were replaced by others, the new ones
    share the maps of the old ones: one to one if they are as many tokens, evenly otherwise. Words that were added have
    no counterpart. The token before the words and those after them (end and padding) are matched in order.

    Args:
        source, edited: for each word its token ids.
        length: L, of both prompts with the token before, the token after, and padding.

    Returns:
        A (L, L): maps (..., L) of the source times A are maps for the edited prompt.
        counterpart (L,): 1 where a token of the edited prompt has one, 0 where it was added.

    Raises:
        ValueError: a prompt has more than L - 2 tokens.
    """
    matrix, counterpart = torch.zeros(length, length), torch.ones(length)
    starts = [_starts(words, length) for words in (source, edited)]
    keys = [[tuple(word) for word in words] for words in (source, edited)]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    for kind, first, last, new_first, new_last in matcher.get_opcodes():
        old = range(starts[0][first], starts[0][last])
        new = range(starts[1][new_first], starts[1][new_last])
        if kind == "insert":
            counterpart[new.start : new.stop] = 0
        elif len(old) == len(new):
            for i, j in zip(old, new, strict=True):
                matrix[i, j] = 1
        elif kind == "replace":
            matrix[old.start : old.stop, new.start : new.stop] = 1 / len(new)
    matrix[0, 0] = 1
    end, new_end = starts[0][-1], starts[1][-1]
    for j in range(new_end, length):
        matrix[min(end + j - new_end, length - 1), j] = 1
    return matrix, counterpart


def _starts(words: Sequence[Sequence], length: int) -> list[int]:
    """Where each word begins, and where the last one ends; the first token comes before the words."""
    starts = [1]
    for word in words:
        starts.append(starts[-1] + len(word))
    if starts[-1] > length - 1:
        raise ValueError(
            f"a prompt may have {length - 2} tokens, got {starts[-1] - 1}: what is cut off has no attention"
        )
    return starts


class PromptToPrompt:
    """Draws a prompt and edits of it. The pipeline is as it was after each call.

    Args:
        pipe: a pipeline with a UNet of diffusers.
        source: the prompt.
        edited: one or more others.
        cross_steps: fraction of the steps, the first ones, in which cross-attention takes the source's maps; rounded
            down. 1 keeps most of the layout, less leaves the new words more room.
        self_steps: the same for self-attention. More keeps more of the shapes.
        self_tokens: self-attention of layers with more tokens than this is left alone: they hold detail.
        weights: word of the edited prompts -> factor of its maps, in every step: above 1 more of it, below 1 less,
            below 0 the contrary.
        blend: a word, or several, of any of the prompts: outside of where these words are drawn, in the source or the
            edit, the edit is given the source's latents. Name what was replaced and what replaces it.
        blend_threshold: of their maps, relative to its largest value.

    Raises:
        ValueError: no edit, a fraction outside [0, 1], a threshold outside (0, 1), a word that is in no prompt, a
            prompt that is too long; no UNet, a compiled one, or one whose cross-attention is not the stock one (that of
            an IP-Adapter, say).
    """

    def __init__(
        self,
        pipe,
        source: str,
        edited: str | Sequence[str],
        *,
        cross_steps: float = 0.8,
        self_steps: float = 0.4,
        self_tokens: int = 1024,
        weights: Mapping[str, float] | None = None,
        blend: str | Sequence[str] | None = None,
        blend_threshold: float = 0.3,
    ):
        edited = [edited] if isinstance(edited, str) else list(edited)
        if not edited:
            raise ValueError("edited must be a prompt or several, got none")
        for name, value in (("cross_steps", cross_steps), ("self_steps", self_steps)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a fraction of the steps, between 0 and 1, got {value}")
        if not 0 < blend_threshold < 1:
            raise ValueError(f"blend_threshold must be between 0 and 1, got {blend_threshold}")
        self.pipe, self.prompts = pipe, [source, *edited]
        self.cross_steps, self.self_steps, self.self_tokens = cross_steps, self_steps, self_tokens
        self.blend_threshold = blend_threshold
        length = pipe.tokenizer.model_max_length
        words = [_words(pipe.tokenizer, prompt) for prompt in self.prompts]
        tokens = [[ids for _, ids in prompt] for prompt in words]
        aligned = [alignment(tokens[0], prompt, length) for prompt in tokens]
        # (n, L, L) and (n, L), the source itself among them.
        self._aligned = torch.stack([matrix for matrix, _ in aligned])
        self._counterpart = torch.stack([counterpart for _, counterpart in aligned])
        self._weights = torch.ones(len(words), length)
        for word, factor in (weights or {}).items():
            self._weights[1:][_positions(words[1:], word, length, "weights") > 0] = factor
        blend = [blend] if isinstance(blend, str) else blend
        self._blended = None
        if blend:
            self._blended = sum(_positions(words, word, length, "blend") for word in blend).clamp(max=1)
            missing = [prompt for prompt, row in zip(self.prompts, self._blended, strict=True) if not row.any()]
            if missing:
                raise ValueError(f"blend must name a word of every prompt, got {blend} and the prompt {missing[0]!r}")
        self._modules()  # says early what does not fit
        self._step, self._steps, self._latents, self._seen = -1, 0, None, []

    def __call__(self, *, generator: torch.Generator | None = None, **call):
        """What the pipeline's call returns for all prompts: pictures of the source and of each edit, in this order.

        Args:
            generator: where the noise of the source's picture comes from; the others get the same. It is not advanced.
            call: arguments of the pipeline's call but prompt. negative_prompt, and other strings, may be one for all.

        Raises:
            ValueError: prompt or several pictures for each prompt are asked for.
        """
        for name in ("prompt", "prompt_2", "prompt_embeds"):
            if call.get(name) is not None:
                raise ValueError(f"{name} must not be passed: the prompts are {self.prompts}")
        if call.get("num_images_per_prompt", 1) != 1:
            raise ValueError(f"num_images_per_prompt must be 1, got {call['num_images_per_prompt']}: call again")
        if generator is None:
            generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        call = {
            key: [value] * len(self.prompts) if isinstance(value, str) and "prompt" in key else value
            for key, value in call.items()
        }
        if self._blended is not None:
            call["callback_on_step_end"] = self._after_step(call.get("callback_on_step_end"))
            call["callback_on_step_end_tensor_inputs"] = list(
                {"latents", *call.get("callback_on_step_end_tensor_inputs", ())}
            )
        with self._mounted():
            return self.pipe(self.prompts, generator=[generator.clone_state() for _ in self.prompts], **call)

    # ------------------------------------------------------------------------------------------------ the attention

    def edited_maps(self, maps: Tensor) -> Tensor:
        """The maps that take the place of these in the present step.

        Args:
            maps: (n, heads, queries, L), of the source first and then of each edit; rows sum to 1.
        """
        if self._step < _count(self.cross_steps, self._steps):
            matrix = self._aligned.to(maps).unsqueeze(1)
            own = 1 - self._counterpart.to(maps)[:, None, None]
            taken = maps[:1] @ matrix * (1 - own) + maps * own
            # The source's own row of the alignment is the identity; take its maps as they are.
            maps = torch.cat([maps[:1], taken[1:]])
        return maps * self._weights.to(maps)[:, None, None]

    def _conditional(self, tensor: Tensor) -> Tensor:
        """The rows with prompts: all, or with guidance the second half."""
        return tensor[-len(self.prompts) :]

    def _note(self, maps: Tensor) -> None:
        """Remember where the words of `blend` are drawn: (n, 1, h, w) at the size of the latents."""
        height, width = self._latents
        found = _grid(maps.shape[2], height, width)
        if found is None or found == (height, width):  # the finest maps say more of texture than of place
            return
        where = (maps * self._blended.to(maps)[:, None, None]).sum(-1).mean(1).unflatten(-1, found).unsqueeze(1)
        self._seen.append(nn.functional.interpolate(where.float(), (height, width), mode="bilinear"))

    def _after_step(self, then):
        """A callback that gives the edits the source's latents outside of the words of `blend`."""

        def after_step(pipe, step, timestep, kwargs):
            if self._seen:
                where = nn.functional.max_pool2d(torch.stack(self._seen).mean(0), 3, stride=1, padding=1)
                inside = where > self.blend_threshold * where.amax((1, 2, 3), keepdim=True)
                latents = kwargs["latents"]
                kwargs["latents"] = torch.where(inside | inside[:1], latents, latents[:1])
            result = then(pipe, step, timestep, kwargs) if then else None
            return kwargs if result is None else result

        return after_step

    # ----------------------------------------------------------------------------------------------------- mounting

    def _modules(self) -> tuple[nn.Module, dict[str, nn.Module], dict[str, nn.Module]]:
        """The UNet, its cross-attentions and its self-attentions."""
        unet = getattr(self.pipe, "unet", None)
        if not isinstance(unet, nn.Module):
            raise ValueError(f"expected a pipeline with a UNet, got {type(self.pipe).__name__}")
        if hasattr(unet, "_orig_mod") or getattr(unet, "_compiled_call_impl", None) is not None:
            raise ValueError("expected a UNet that is not compiled: its steps differ from each other")
        cross = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
        own = {name: module for name, module in unet.named_modules() if name.endswith(".attn1")}
        if not cross:
            raise ValueError(f"{type(unet).__name__} has no cross-attention (modules named attn2)")
        for name, module in cross.items():
            reason = _why_not(module)
            if reason:
                raise ValueError(f"cross-attention must be the stock one, {name} {reason}")
        for name, module in own.items():
            if getattr(module, "fused_projections", False):
                raise ValueError(f"{name} has fused projections: unfuse_qkv_projections() first")
        return unet, cross, own

    @contextlib.contextmanager
    def _mounted(self):
        unet, cross, own = self._modules()
        before = {name: module.processor for name, module in cross.items()}
        hooks = [unet.register_forward_pre_hook(self._begin_step, with_kwargs=True)]
        self._step, self._latents, self._seen = -1, None, []
        try:
            for module in cross.values():
                module.set_processor(_CrossAttention(self))
            for module in own.values():
                hooks += [layer.register_forward_hook(self._as_source) for layer in (module.to_q, module.to_k)]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, module in cross.items():
                module.set_processor(before[name])
            self._seen = []

    def _begin_step(self, _unet, args, kwargs) -> None:
        sample = args[0] if args else kwargs["sample"]
        if len(sample) not in (len(self.prompts), 2 * len(self.prompts)):
            raise ValueError(
                f"expected the UNet to be called with {len(self.prompts)} prompts, or with as many unconditional rows "
                f"before them, got a batch of {len(sample)}"
            )
        self._step += 1
        # With strength < 1 a pipeline does fewer steps than the scheduler has timesteps.
        self._steps = getattr(self.pipe, "num_timesteps", None) or len(self.pipe.scheduler.timesteps)
        self._latents = tuple(sample.shape[-2:])

    def _as_source(self, _layer, _args, output: Tensor) -> Tensor | None:
        """Queries or keys (batch, tokens, channels) of the edits become those of the source."""
        if self._step >= _count(self.self_steps, self._steps) or output.shape[1] > self.self_tokens:
            return None
        edits = len(self.prompts) - 1
        source = self._conditional(output)[:1]
        return torch.cat([output[: len(output) - edits], source.expand(edits, -1, -1)])


class _CrossAttention:
    """Attention processor that computes its maps and has them edited. Of one call; holds no weights."""

    def __init__(self, control: PromptToPrompt):
        self.control = control

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, **_) -> Tensor:
        if attention_mask is not None:
            raise ValueError(f"prompt-to-prompt has no attention_mask, got one of shape {tuple(attention_mask.shape)}")
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.to_v(encoder_hidden_states)
        v = v.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        maps = attn.get_attention_scores(q, k).unflatten(0, (-1, attn.heads))  # (batch, heads, queries, L)
        control = self.control
        new = control.edited_maps(control._conditional(maps))
        if control._blended is not None:
            control._note(new)
        maps = torch.cat([maps[: len(maps) - len(new)], new])
        out = (maps @ v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


def _why_not(module: nn.Module) -> str | None:
    """Why the maps of this module cannot be edited; None if they can."""
    processor = type(getattr(module, "processor", None))
    if processor.__name__ not in ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"):
        return f"has a {processor.__name__}"
    uses = {
        "added_kv_proj_dim": module.added_kv_proj_dim is not None,
        "group_norm": module.group_norm is not None,
        "spatial_norm": module.spatial_norm is not None,
        "norm_cross": bool(module.norm_cross),
        "norm_q": module.norm_q is not None,
        "norm_k": module.norm_k is not None,
        "residual_connection": module.residual_connection,
        "rescale_output_factor": module.rescale_output_factor != 1.0,
    }
    found = [name for name, used in uses.items() if used]
    return f"uses {', '.join(found)}" if found else None


def _count(fraction: float, steps: int) -> int:
    return math.floor(fraction * steps + 1e-6)  # 0.29 of 100 steps are 29


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The size of a UNet's level with this many tokens: latents halved so many times, rounded up."""
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == tokens else None


def _words(tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, as white space and punctuation divide them, with their token ids."""
    found = []
    for part in prompt.split():
        pieces = tokenizer.tokenize(part)
        ids = tokenizer.convert_tokens_to_ids(pieces)
        word, begun = [], []
        for piece, token in zip(pieces, ids, strict=True):
            word.append(piece)
            begun.append(token)
            if piece.endswith("</w>"):
                found.append(("".join(word).replace("</w>", ""), begun))
                word, begun = [], []
        if begun:  # a token of textual inversion, or of a tokenizer that marks no ends
            found.append(("".join(word), begun))
    whole = tokenizer(prompt, add_special_tokens=False).input_ids
    if [token for _, ids in found for token in ids] != whole:
        raise ValueError(
            f"expected a tokenizer that reads a prompt word by word (CLIP's), got {type(tokenizer).__name__}"
        )
    return found


def _positions(prompts: list, word: str, length: int, argument: str) -> Tensor:
    """(n, L): 1 where a token belongs to this word."""
    found = torch.zeros(len(prompts), length)
    for row, words in zip(found, prompts, strict=True):
        starts = _starts([ids for _, ids in words], length)
        for (text, _), start, end in zip(words, starts, starts[1:], strict=False):
            if text.lower() == word.lower():
                row[start:end] = 1
    if not found.any():
        raise ValueError(f"{argument}: no prompt has the word {word!r}")
    return found
