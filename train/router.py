"""The router's auxiliary loss: on with a coefficient, off with 0, else as the model's own config says."""

from collections.abc import Callable
from typing import Any

from .hf_flags import ArgumentsError


def set_aux_loss(model: Any, coefficient: float | None, say: Callable[[str], None]) -> None:
    """Have the model return ``aux_loss`` (or not); the trainer adds it to the loss, times ``coefficient``.

    Raises ArgumentsError when the model's config has no such coefficient.
    """
    config = model.config
    if not hasattr(config, "router_aux_loss_coef"):
        if coefficient is not None:
            raise ArgumentsError(
                f"--router_aux_loss_coef: a {config.model_type} model computes no router loss (its config has no "
                "router_aux_loss_coef); leave the flag out"
            )
        return
    if coefficient is None:
        if getattr(config, "output_router_logits", False):
            say(
                f"router loss: added, times {config.router_aux_loss_coef:g}, as the model's config.json says; "
                "--router_aux_loss_coef 0 leaves it out"
            )
        return
    config.output_router_logits = coefficient > 0
    config.router_aux_loss_coef = coefficient
    if hasattr(model, "router_aux_loss_coef"):  # some models keep a copy of what the config said when they were built
        model.router_aux_loss_coef = coefficient
