from dataclasses import dataclass

from scoredist3d.config import option
from scoredist3d.losses import Loss
from scoredist3d.registry import register


@register("loss", "halo", summary="Mean opacity below a limit; reduces thin fog.")
class Halo(Loss):
    @dataclass
    class Config(Loss.Config):
        limit: float = option(0.2, "Larger opacities are ignored.", gt=0, le=1)

    def __call__(self, render, geometry, step, rng):
        return render.opacity.where(render.opacity < self.config.limit, 0.0).mean()
