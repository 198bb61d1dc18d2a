"""Pairwise attention on GPUs by the Triton kernels of `device.py`, as custom operators that autograd and tracers know.

One operator does all of the forward: for each layer of γ the moments that its BatchNorm asks for, then attention. One
does all of the backward: from the looking pixels, layer by layer back through the statistics, then once from the pixels
that are looked at; gradients meet in float32 and are rounded once. γ goes to the kernels as one packed vector. Running
averages move outside, from the statistics that the operator gives.
Legend: B batch, R relation width, D δ's width, C value channels, G weight groups, N = B · P output pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.kernels.gpu import launch, normalization
from san.ops.kernels.gpu.launch import Bordered, as_map, block, floats, is_last, laid_out, like_value, mode, programs
from san.ops.kernels.gpu.plan import Plan
from san.ops.kernels.native.operators import unobserved
from san.ops.kernels.pairwise.reference import PairwiseCall
from san.ops.mapping import Mapping
from san.ops.relations import POSITION_WIDTHS

__all__ = ["run", "supports"]

# What the kernels know.
_RELATIONS = ("subtraction", "summation", "hadamard", "concatenation", "dot")


@dataclass(frozen=True)
class _Plan(Plan):
    """Sizes and constants of a call on query.

    `widths` are D and what each layer gives; NORM is false where γ is the identity.
    """

    value: Tensor
    relation: str
    position: str
    widths: list[int]
    norm: bool

    @property
    def groups(self) -> int:
        return self.widths[-1]

    @property
    def share(self) -> int:
        return self.value.shape[1] // self.groups

    @property
    def relation_channels(self) -> int:
        return self.map.shape[1]

    def tile(self, *, backward: bool = False, total: int | None = None) -> dict[str, int]:
        """Pixels of a program, of `total` or all that look, and its warps: as many as compile without spilling
        registers, see gpu_compile.py.

        Rows of products are channels and lie in a warp 16 at a time, so more warps than rows serve only what is not a
        product.
        """
        total = self.total if total is None else total
        width = max(self.relation_channels, *self.widths[1:])
        warps = 2 if width <= 16 else 4 if width <= 64 else 8
        if not backward:
            return {"LANES": launch.lanes(total, 16), "num_warps": warps}
        lanes = 8 if width > 64 and launch.sums_of_eight() else 16
        return {"LANES": launch.lanes(total, lanes), "num_warps": 4 if width <= 16 else 8}

    def shared_layers(self, layers: int) -> list[tuple[int, int]]:
        """First and last of the layers whose gradients one kernel's registers hold; wide ones have a kernel each."""
        wide = max(self.widths) > 32
        return [(n, n) for n in range(1, layers + 1)] if wide else [(1, layers)]

    def parameters(self, layers: int) -> int:
        """Numbers in the packed parameters of the first layers."""
        pairs = zip(self.widths, self.widths[1 : 1 + layers], strict=False)
        return sum(2 * taken + given * (taken + 1) for taken, given in pairs)

    def constants(self, layers: int, *, value: bool, backward: bool = False) -> dict[str, Any]:
        """Constants of a kernel that sees the first layers of γ."""
        # Layers that there are not are as wide as the last, or as δ.
        given = self.widths[1 : 1 + layers] or self.widths[:1]
        given = [*given, *given[-1:] * 2][:3]
        found: dict[str, Any] = {
            "RELATION": self.relation,
            "POSITION": self.position,
            "R": self.relation_channels,
            "O1": given[0],
            "O2": given[1],
            "LAYERS": layers,
            "LAST": is_last(self.value),
            "MODE": mode(self.map, backward=backward, exact=not self.norm),
            "BLOCK_R": block(self.relation_channels),
            "BLOCK_1": block(given[0]),
            "BLOCK_2": block(given[1]),
            **launch.geometry(self.footprint, *self.map.shape[2:]),
        }
        if value:
            found |= {"SHARE": self.share, "G": self.groups, "O3": given[2], "BLOCK_3": block(given[2])}
            found["NORM"] = self.norm
        return found


def _pack(gamma: Tensor, start: int, tensors: Sequence[Tensor]) -> None:
    """Copy tensors into γ's packed parameters, from `start` on."""
    for x in tensors:
        gamma[start : start + x.numel()].copy_(x.detach().flatten())
        start += x.numel()


def _observe(
    plan: _Plan, query: Tensor, key: Tensor, position: Tensor, gamma: Tensor, layers: int, group: str
) -> Tensor:
    """Statistics [3, D] of z_layers, from what every program finds."""
    from san.ops.kernels.pairwise.device import observe

    tile, total = plan.tile(), plan.total
    lanes = tile["LANES"]
    count = programs(total, lanes)
    parts = torch.zeros((count, 2, plan.widths[layers]), dtype=torch.float32, device=query.device)
    if count:
        arguments = (query, key, position, gamma, parts, *plan.sizes)
        launch.start(observe, (count,), *arguments, **plan.constants(layers, value=False), **tile)
    return normalization.merged(parts, total, lanes, group, samples=plan.footprint.places)


@torch.library.custom_op("san::triton_pairwise", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    parameters: list[Tensor],
    averages: list[Tensor],
    eps: list[float],
    batch: list[bool],
    group: str,
    relation: str,
    kind: str,
    geometry: list[int],
    widths: list[int],
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y, its normaliser [N, G], γ packed, and every BatchNorm's statistics [3, D].

    `parameters` are weight and bias of each layer's BatchNorm and Linear, `averages` the running
    averages of layers that use them.
    """
    last = is_last(value)
    query, key, value = laid_out(query, last), laid_out(key, last), laid_out(value, last)
    plan = _Plan(query, geometry, value, relation, kind, widths, norm)
    gamma, statistics, fixed = floats(query, plan.parameters(len(widths) - 1)), [], iter(averages)
    for layer in range(len(widths) - 1):
        start, (weight, bias, *linear) = plan.parameters(layer), parameters[4 * layer : 4 * layer + 4]
        affine = gamma[start : start + 2 * widths[layer]]
        if norm:
            found = _observe(plan, query, key, position, gamma, layer, group) if batch[layer] else None
            known = () if batch[layer] else (next(fixed), next(fixed))
            statistics.append(normalization.fold(found, known, weight, bias, eps[layer], affine))
        else:
            affine.zero_()
        _pack(gamma, start + 2 * widths[layer], linear)
    output, normalizer = _attend(plan, query, key, value, position, gamma)
    return output, normalizer, gamma, statistics


def _attend(
    plan: _Plan, query: Tensor, key: Tensor, value: Tensor, position: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    from san.ops.kernels.pairwise.device import attend

    output, normalizer = like_value(value, plan.size), floats(query, plan.total, plan.groups)
    tile = plan.tile()
    if plan.total:
        constants = plan.constants(len(plan.widths) - 1, value=True)
        grid = (programs(plan.total, tile["LANES"]),)
        tensors = (query, key, value, position, gamma, output, normalizer)
        launch.start(attend, grid, *tensors, *plan.sizes, **constants, **tile, BLOCK_S=launch.members(plan.share))
    return output, normalizer


@_forward.register_fake
def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    query, _, value, _, _, _, _, _, _, relation, kind, geometry, widths, norm = inputs
    plan = _Plan(query, geometry, value, relation, kind, widths, norm)
    statistics = [query.new_empty((3, width), dtype=torch.float64) for width in widths[:-1] if norm]
    normalizer, gamma = floats(query, plan.total, plan.groups), floats(query, plan.parameters(len(widths) - 1))
    return like_value(value, plan.size), normalizer, gamma, statistics


@torch.library.custom_op("san::triton_pairwise_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    output: Tensor,
    normalizer: Tensor,
    gamma: Tensor,
    statistics: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    norm_weights: list[Tensor],
    eps: list[float],
    batch: list[bool],
    group: str,
    relation: str,
    kind: str,
    geometry: list[int],
    widths: list[int],
    norm: bool,
    of_mapping: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and position, and of the packed parameters with BatchNorm's own first.

    Without `of_mapping` those of the parameters are not computed where nothing else needs them, and not to be used.
    """
    last = is_last(value)
    query, key, value = laid_out(query, last), laid_out(key, last), laid_out(value, last)
    gradient, output = laid_out(gradient, last), laid_out(output, last)
    plan = _Plan(query, geometry, value, relation, kind, widths, norm)
    walk = _Walk(plan, query, key, value, position, gamma, of_mapping=of_mapping or any(batch))
    walk.attend(gradient, output, normalizer)
    slopes = _through_statistics(walk, statistics, norm_weights, eps, batch, group)
    of_key, of_value, of_seen = walk.from_keys(gradient, normalizer, slopes)
    of_query = as_map(walk.of_query, plan.size, query, plan.footprint.stride)
    of_looking = as_map(walk.of_looking.sum(0, keepdim=True), plan.size, position, plan.footprint.stride)
    return of_query, of_key, of_value, of_looking + of_seen, walk.sums.float()


def _through_statistics(
    walk: _Walk,
    statistics: list[Tensor],
    weights: list[Tensor],
    eps: list[float],
    batch: list[bool],
    group: str,
) -> Tensor | None:
    """Turn `walk.sums`' gradients of scale and shift into BatchNorm's own, the last layer first, whose statistics reach
    the layers before; give every slope and intercept, None where no statistics are the batch's."""
    found: list[Tensor] = []
    at, widths = walk.plan.parameters, walk.plan.widths
    for layer in reversed(range(len(statistics))):
        start, width = at(layer), widths[layer]
        of_affine = walk.sums[start : start + 2 * width].view(2, width)
        options: Any = {"batch": batch[layer], "group": group}
        back = normalization.back(statistics[layer], weights[layer], eps[layer], of_affine, **options)
        if batch[layer]:
            walk.observed(layer, back.slopes)
        of_affine.copy_(back.parameters)
        found.insert(0, back.slopes.flatten())
    return torch.cat(found) if any(batch) and found else None


class _Walk:
    """The passes of one backward, and the gradients that they add up: of query [B, P, R], of position at the looking
    pixels [B, P, 2], in float32, and of the packed parameters, in float64."""

    def __init__(
        self,
        plan: _Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        gamma: Tensor,
        *,
        of_mapping: bool,
    ) -> None:
        self.plan, self.maps, self.position, self.gamma = plan, (query, key, value), position, gamma
        self.of_mapping = of_mapping
        pixels = plan.size[0] * plan.size[1]
        self.of_query = floats(query, len(query), pixels, plan.relation_channels)
        self.of_looking = torch.zeros((len(query), pixels, 2), dtype=torch.float32, device=query.device)
        self.sums = torch.zeros(plan.parameters(len(plan.widths) - 1), dtype=torch.float64, device=query.device)
        self.delta = floats(query, plan.total, plan.groups)

    def attend(self, gradient: Tensor, output: Tensor, normalizer: Tensor) -> None:
        """From y, with statistics held fixed."""
        tensors = (output, gradient, normalizer, self.delta)
        self._from_queries(len(self.plan.widths) - 1, self.gamma, tensors, attends=True)
        # Softmax does not see what γ's last bias adds to all places, so what rounding leaves of its gradient is noise.
        self.sums[-self.plan.groups :].zero_()

    def observed(self, layers: int, slope: Tensor) -> None:
        """From slope · z_layers + intercept at every sample."""
        nothing = (self.maps[2], self.maps[2], self.gamma, self.delta)
        self._from_queries(layers, slope, nothing, attends=False)

    def _from_queries(self, layers: int, slopes: Tensor, tensors: Any, *, attends: bool) -> None:
        from san.ops.kernels.pairwise.device import attend_backward_query

        plan, width = self.plan, self.plan.widths[0]
        tile = plan.tile(backward=True)
        count = programs(plan.total, tile["LANES"])
        sums = floats(self.gamma, count, 2 * width)
        if not count:
            return
        constants = plan.constants(layers, value=True, backward=True) | {"NORM": plan.norm or not attends}
        output, gradient, normalizer, delta = tensors
        launch.start(
            attend_backward_query,
            (count,),
            *(*self.maps, self.position, self.gamma, slopes, output, gradient, normalizer, delta),
            *(self.of_query, self.of_looking, sums, *plan.sizes),
            **constants,
            **tile,
            ATTEND=attends,
        )
        if layers and plan.norm and self.of_mapping:
            self.sums[: 2 * width] += sums.sum(0, dtype=torch.float64)
            self._of_mapping(layers, slopes, (gradient, normalizer, delta), constants | {"ATTEND": attends})

    def _of_mapping(self, layers: int, slopes: Tensor, tensors: Any, constants: Any) -> None:
        """Gradients of the first layers' parameters, but for the very first scale and shift."""
        from san.ops.kernels.pairwise.device import attend_backward_mapping

        plan, size, start = self.plan, self.plan.parameters(layers), 2 * self.plan.widths[0]
        tile = plan.tile(backward=True)
        count, tiles = launch.shares(programs(plan.total, tile["LANES"]), 1)
        sums = floats(self.gamma, count, size)
        for first, last in plan.shared_layers(layers):
            launch.start(
                attend_backward_mapping,
                (count,),
                *(*self.maps, self.position, self.gamma, slopes, *tensors, sums),
                *(*plan.sizes, tiles),
                **constants,
                FROM=first,
                TO=last,
                SIZE=size,
                **tile,
            )
        self.sums[start:size] += sums[:, start:].sum(0, dtype=torch.float64)

    def from_keys(self, gradient: Tensor, normalizer: Tensor, slopes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of key, value and position."""
        from san.ops.kernels.pairwise.device import attend_backward_key

        plan, (query, key, value) = self.plan, self.maps
        border = Bordered(plan.footprint, *query.shape[2:])
        pixels = border.tall * border.wide
        of_key, of_value, of_seen = (
            floats(query, len(query), pixels, channels) for channels in (key.shape[1], value.shape[1], 2)
        )
        if plan.position == "none":
            of_seen.zero_()
        if plan.total:
            total = len(query) * pixels
            tile = plan.tile(backward=True, total=total)
            launch.start(
                attend_backward_key,
                (programs(total, tile["LANES"]),),
                *(*self.maps, self.position, self.gamma, self.gamma if slopes is None else slopes),
                *(gradient, normalizer, self.delta, of_key, of_value, of_seen, total, *plan.sizes[1:]),
                *(border.tall, border.wide, border.origin),
                **plan.constants(len(plan.widths) - 1, value=True, backward=True),
                SLOPES=slopes is not None,
                **tile,
                BLOCK_S=launch.members(plan.share),
            )
        of_position = border.back(of_seen.sum(0, keepdim=True), self.position)
        return border.back(of_key, key), border.back(of_value, value), of_position


@_backward.register_fake
def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    gamma, query, key, value, position = inputs[3], *inputs[5:9]
    last = torch.channels_last if is_last(value) else torch.contiguous_format
    maps = [torch.empty_like(x, memory_format=last) for x in (query, key, value)]
    return *maps, torch.empty_like(position), torch.empty_like(gamma)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, position, parameters, averages, *ctx.options = inputs
    ctx.averages = len(averages)
    y, normalizer, gamma, statistics = output
    ctx.mark_non_differentiable(normalizer, gamma, *statistics)
    ctx.count = len(statistics)
    ctx.shapes = [x.shape for x in parameters]
    ctx.save_for_backward(y, normalizer, gamma, *statistics, query, key, value, position, *parameters[0::4])


def _gradients(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    y, normalizer, gamma, *rest = ctx.saved_tensors
    statistics, maps, weights = rest[: ctx.count], rest[ctx.count : ctx.count + 4], rest[ctx.count + 4 :]
    of_mapping = any(ctx.needs_input_grad[4])
    *of_maps, packed = _backward(gradient, y, normalizer, gamma, statistics, *maps, weights, *ctx.options, of_mapping)
    parts = packed.split([shape.numel() for shape in ctx.shapes])
    of_parameters = [part.view(shape) if of_mapping else None for part, shape in zip(parts, ctx.shapes, strict=True)]
    # Autograd takes empty lists, whatever of, for lists of tensors.
    nothing = [[] if option == [] else None for option in ctx.options]
    return *of_maps, of_parameters, [None] * ctx.averages, *nothing


_forward.register_autograd(_gradients, setup_context=_remember)


def supports(call: PairwiseCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    if call.relation not in _RELATIONS:
        return f"triton knows the relations {', '.join(_RELATIONS)}, but not {call.relation!r}"
    widths = _widths(call)
    return (
        launch.refusal(call)
        or launch.width_refusal(call.key.shape[1], widths[1:], call.value.shape[1])
        or launch.memory_refusal(call, max(call.key.shape[1], *widths[1:]))
        or _group_refusal(call)
    )


def _group_refusal(call: PairwiseCall) -> str | None:
    layers = call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    if len({normalization.group_name(layer.norm) for layer in layers if layer.norm.uses_batch}) > 1:
        return "triton shares the statistics of all of γ's BatchNorms with the same processes, but these differ"
    return None


def _widths(call: PairwiseCall) -> list[int]:
    """D and what each layer of γ gives."""
    own = {"concatenation": 2 * call.key.shape[1], "dot": 1}.get(call.relation, call.key.shape[1])
    taken = own + (POSITION_WIDTHS[call.position.kind] if call.position else 0)
    if not isinstance(call.mapping, Mapping):
        return [taken, taken]
    return [taken, *(layer.weight.shape[0] for layer in call.mapping.layers)]


def _position_map(call: PairwiseCall) -> Tensor:
    """Position of every pixel [1, 2, H, W] in float32; zeros where there is none."""
    from san.ops.kernels.pairwise.device import position_map

    (height, width), position = call.query.shape[2:], call.position
    if position is None:
        return call.query.new_zeros(1, 2, height, width, dtype=torch.float32)
    wanted = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (position.weight, position.bias)
    )
    if wanted or type(call.query) is not Tensor or not unobserved():
        return position.map(height, width).float().contiguous()
    output = floats(call.query, 1, 2, height, width)
    if pixels := height * width:
        weight, bias = (x if x is None else x.contiguous() for x in (position.weight, position.bias))
        launch.start(position_map, (programs(pixels, 256),), weight, bias, output, height, width, BLOCK=256)
    return output


def run(call: PairwiseCall) -> Tensor:
    """Pairwise attention; see `reference.py`."""
    layers = call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    widths, norms = _widths(call), [layer.norm for layer in layers]
    parameters = [x for layer in layers for x in normalization.parameters(layer)]
    query = call.query
    if not layers:
        identity = torch.eye(widths[0], device=query.device)
        nothing = identity.new_zeros(widths[0])
        parameters = [nothing, nothing, identity, nothing]
    position = _position_map(call)
    averages = [x for norm in norms for x in normalization.averages(norm)]
    y, _, _, statistics = _forward(
        *(query, call.key, call.value, position, parameters, averages),
        [norm.eps for norm in norms],
        [norm.uses_batch for norm in norms],
        next((name for name in map(normalization.group_name, norms) if name), ""),
        *(call.relation, call.position.kind if call.position else "none", call.footprint.numbers(), widths),
        bool(layers),
    )
    for norm, found in zip(norms, statistics, strict=True):
        normalization.move_running(norm, found.detach())
    return y


if launch.installed():
    dispatch.register("pairwise_attention", "triton", supports=supports, run=run, pays=launch.pays)
