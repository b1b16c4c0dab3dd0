"""Hugging Face `kernels`: our layers for `kernelize`, from memory in place of the Hub."""

from dataclasses import dataclass

from torch import nn

from ..ops.deformable_attention import deformable_attention

__all__ = ["LAYERS", "Repository", "mapping", "register"]


class MultiScaleDeformableAttention(nn.Module):
    """Stands in for the class of this name in transformers (Deformable DETR, Grounding DINO, RT-DETR and others),
    whose forward `kernelize` replaces by this one: :func:`mmkernels.deformable_attention` of weights that went through
    their softmax.

    `value` ``[B, S, H, d]``, `sampling_locations` ``[B, Q, H, L, P, 2]``, `attention_weights` ``[B, Q, H, L, P]`` ->
    ``[B, Q, H d]``. The levels' sizes are read from `value_spatial_shapes_list`, so that no GPU is waited for.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        return deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights, softmax=False
        )


LAYERS = {layer.__name__: layer for layer in (MultiScaleDeformableAttention,)}


@dataclass(frozen=True)
class Repository:
    """What a kernel mapping of `kernels` holds a layer's name for: a repository with this one layer, in memory.

    Args:
        layer_name: one of :data:`LAYERS`.

    Raises:
        ValueError: there is no layer of that name; the message lists those that are.
    """

    layer_name: str

    def __post_init__(self) -> None:
        if self.layer_name not in LAYERS:
            raise ValueError(f"layer_name must be one of {sorted(LAYERS)}, got {self.layer_name!r}")

    def load(self) -> type[nn.Module]:
        return LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"`mmkernels`, layer `{self.layer_name}`"


def mapping() -> dict[str, dict[str, Repository]]:
    """All of :data:`LAYERS` for "cpu" and "cuda", as ``kernels.use_kernel_mapping`` takes them::

        from kernels import Mode, kernelize, use_kernel_mapping
        from mmkernels.integrations.kernels import mapping

        with use_kernel_mapping(mapping()):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")

    A class is only looked at where it has a layer's name. transformers gives it one itself where it accepts the
    installed version of `kernels`; where not (transformers 5.24 asks for 0.18), this does, and sets an attribute of the
    class that only ``kernelize`` reads::

        from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

        kernels.replace_kernel_forward_from_hub(MultiScaleDeformableAttention, "MultiScaleDeformableAttention")
    """
    return {name: {device: Repository(name) for device in ("cpu", "cuda")} for name in LAYERS}


def register() -> None:
    """Adds :func:`mapping` to what ``kernels.kernelize`` takes its layers from, beside or in place of the Hub's."""
    import kernels

    kernels.register_kernel_mapping(mapping())
