"""How a pipeline is called with a student that was trained to draw in a few steps (Flash Diffusion)."""

from __future__ import annotations

import inspect


def few_step_arguments(pipeline, steps: int, *, grid_steps: int = 32) -> dict[str, object]:
    """Keyword arguments of a pipeline's call that make it visit the noise levels which the student was trained on.

        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)        # or FlowMatchLCMScheduler
        pipe("a fox", **few_step_arguments(pipe, 4), guidance_scale=1.0)

    Training begins at every (K // n)-th level of a grid of K. Those are

        diffusion       t_m = round(T (K - j) / K) - 1,  j = m (K // n)        timesteps=[999, 749, 499, 249]
        flow matching   (K - j) / K, which the scheduler shifts                sigmas=[1.0, 0.75, 0.5, 0.25]

    Left to themselves LCMScheduler takes 999, 759, 499, 259, and a flow's scheduler shifts its lowest level twice.

    Args:
        pipeline: with the scheduler that is to sample.
        steps: n, from 1 to K.
        grid_steps: K of the training (`objective.phases.grid_steps` of its recipe).

    Returns:
        num_inference_steps, and timesteps or sigmas.

    Raises:
        ValueError: steps out of range; a pipeline whose call takes no such list.
    """
    if not 1 <= steps <= grid_steps:
        raise ValueError(f"steps must be from 1 to grid_steps ({grid_steps}), got {steps}")
    levels = [1 - m * (grid_steps // steps) / grid_steps for m in range(steps)]
    scheduler = pipeline.scheduler
    is_flow = hasattr(scheduler, "scale_noise") and scheduler.config.get("use_flow_sigmas", True)
    name = "sigmas" if is_flow else "timesteps"
    if name not in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(f"expected a pipeline whose call takes {name}, got a {type(pipeline).__name__}")
    total = scheduler.config.num_train_timesteps
    values = levels if is_flow else [round(total * level) - 1 for level in levels]
    return {"num_inference_steps": steps, name: values}
