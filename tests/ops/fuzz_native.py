"""Random calls of every C++ kernel, for a library built with sanitizers: `make sanitize`.

Each call draws an operator, shape, geometry, γ, memory layout, number of threads and instruction set from its seed and
number alone. A finding of a sanitizer ends the process, so calls run in a child, and the parent names the one that did:
`--first N --count 1` repeats it. Some calls are compared with float64 formulas as well.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from san import ops
from san.errors import UserError
from san.models import SAN
from san.ops.cases import LAYOUTS, Case
from san.ops.kernels.native import library, operators
from san.ops.kernels.pointwise.native import Affine, Linear, products
from san.ops.kernels.pointwise_training.native import norm_products, stem

COMPARED = 50
PAIRWISE = ("subtraction", "summation", "hadamard", "concatenation", "dot")
MAPPINGS = ("L", "LRL", "LRL", "LRL", "LRLRL")
FORMS = ("pairwise", "patchwise", "scalar")


def size(rng: random.Random) -> int:
    return rng.randint(1, rng.choice((3, 8, 8, 17, 40)))


def attention_case(rng: random.Random) -> Case:
    """A case of any operator whose work suits a slow library."""
    while True:
        case = drawn_case(rng)
        pixels = case.batch * case.height * case.width / case.stride**2
        width = case.relation_channels if case.operator == "pairwise_attention" else case.groups
        if pixels * case.kernel_size**2 * (case.channels + 2 * case.relation_channels * width) < 5e5:
            return case


def drawn_case(rng: random.Random) -> Case:
    operator = rng.choice(("pairwise_attention", "pairwise_attention", "patchwise_attention", "aggregation"))
    relations = PAIRWISE if operator == "pairwise_attention" else ("concatenation", "concatenation", "star")
    groups = rng.randint(1, rng.choice((2, 5, 20)))
    case = Case(
        name="random",
        operator=operator,
        relation=rng.choice(relations),
        batch=rng.choice((0, 1, 1, 1, 2, 2, 3)),
        height=size(rng),
        width=size(rng),
        relation_channels=rng.randint(1, rng.choice((2, 6, 20))),
        channels=groups * rng.randint(1, rng.choice((2, 5, 20))),
        groups=groups,
        kernel_size=rng.choice((1, 3, 3, 3, 5, 5, 7, 9, 11)),
        stride=rng.choice((1, 1, 1, 2, 3)),
        dilation=rng.choice((1, 1, 2, 3)),
        border=rng.choice(("reflect", "zeros")),
        mapping=rng.choice(MAPPINGS),
        position=rng.choice(("relative", "absolute", "none")),
        training=rng.random() < 0.5,
    )
    return with_identity(case) if rng.random() < 0.1 else case


def with_identity(case: Case) -> Case:
    """Without γ, where that is a form of the operator: as many groups as δ is wide."""
    if case.operator == "patchwise_attention":
        return replace(case, relation="star", mapping=None)
    width = {"dot": 1, "concatenation": 2 * case.relation_channels}.get(case.relation, case.relation_channels)
    return replace(case, mapping=None, position="none", channels=width * max(case.channels // width, 1))


def rearranged(rng: random.Random, x: Tensor) -> Tensor:
    """x in any layout, most often its own."""
    return LAYOUTS[rng.choice(sorted(LAYOUTS))](x) if rng.random() < 0.6 else x


def attend(rng: random.Random, compared: bool) -> None:
    """One of the operators, half of the time with its backward."""
    case, seed = attention_case(rng), rng.randrange(1 << 30)
    problem = case.build(torch.float32, seed=seed)
    state, backward = rng.getstate(), rng.random() < 0.5
    wanted = list(problem.tensors.values()) if backward else []
    found = evaluated(problem, rng, "native", wanted)
    if compared:
        exact = case.build(torch.float64, seed=seed)
        rng.setstate(state)
        rng.random()
        wanted = list(exact.tensors.values()) if backward else []
        # Statistics of few samples, whose variance may be next to nothing, magnify rounding without bound.
        check(found, evaluated(exact, rng, "reference", wanted), 0.03 if case.training else 1e-3)


def evaluated(problem: Any, rng: random.Random, backend: str, wanted: list[Tensor]) -> list[Tensor]:
    arguments = [rearranged(rng, x) if isinstance(x, Tensor) else x for x in problem.arguments]
    with ops.use_backend(backend), torch.set_grad_enabled(bool(wanted)):
        y = getattr(ops, problem.operator)(*arguments, **problem.options)
    if not wanted:
        return [y]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, wanted, rearranged(rng, cotangent), allow_unused=True, materialize_grads=True)]


def check(found: list[Tensor], exact: list[Tensor], bound: float) -> None:
    """Norms, because a value next to ReLU's kink may fall to either side; terms that cancel leave the others' noise."""
    found, exact = ([x.detach().double() for x in each] for each in (found, exact))
    largest = max(float(x.norm()) for x in exact)
    for got, want in zip(found, exact, strict=True):
        error, norm = float((got - want).norm()), float(want.norm())
        assert error <= bound * norm + 1e-2 * bound * largest + 1e-5, f"the error is {error} of {norm}"


@dataclass(frozen=True)
class Surround:
    """Tensors of one call of the products that surround attention; `form` is plain, norm, trained or stem."""

    form: str
    pooled: bool
    passes: bool
    norm: ops.BatchNorm
    x: Tensor
    stem: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    residual: Tensor | None

    def double(self) -> Surround:
        """The same in float64."""
        return Surround(**{field.name: widened(getattr(self, field.name)) for field in fields(self)})


def widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().double().requires_grad_(x.requires_grad)
    if isinstance(x, ops.BatchNorm):
        return replace(x, **{name: widened(value) for name, value in vars(x).items() if isinstance(value, Tensor)})
    return [widened(each) for each in x] if isinstance(x, list) else x


def drawn_surround(rng: random.Random) -> Surround:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    form, pooled = rng.choice(("plain", "norm", "trained", "trained", "stem")), rng.random() < 0.4
    batch, height, width = rng.randint(1, 3), size(rng) + pooled, size(rng) + pooled
    channels, taken = rng.randint(1, rng.choice((4, 20, 70))), rng.randint(1, 4)
    given = [rng.randint(1, rng.choice((4, 20, 70))) for _ in range(1 if form == "stem" else rng.randint(1, 3))]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    after = (height // 2, width // 2) if pooled else (height, width)
    trained = rng.random() < 0.5
    variance = draw(channels).detach().square() + 0.5
    norm = (draw(channels), draw(channels), draw(channels).detach(), variance, None, 0.1, 1e-5, trained, False)
    image = draw(batch, taken if form == "stem" else channels, height, width)
    return Surround(
        form=form,
        pooled=pooled,
        passes=rng.random() < 0.5,
        norm=ops.BatchNorm(*norm),
        x=image.detach() if form == "stem" and trained else image,
        stem=draw(channels, taken),
        weights=[draw(o, channels) for o in given],
        biases=[draw(o) if form != "stem" and rng.random() < 0.7 else None for o in given],
        residual=draw(batch, given[0], *after) if form != "stem" and rng.random() < 0.5 else None,
    )


def native_surround(s: Surround) -> list[Tensor]:
    linears = [Linear(*pair) for pair in zip(s.weights, s.biases, strict=True)]
    if s.form == "stem":
        return [stem(s.x, s.stem, s.norm, s.weights[0], pooled=s.pooled)]
    if s.form == "trained":
        return list(norm_products(s.x, s.norm, linears, pooled=s.pooled, residual=s.residual, passes=s.passes))
    affine = Affine(*s.norm.scale_and_shift()) if s.form == "norm" else None
    return products(s.x, linears, norm=affine, pooled=s.pooled, residual=s.residual)


def exact_surround(s: Surround) -> list[Tensor]:
    y = torch.einsum("ck,bkhw->bchw", s.stem, s.x) if s.form == "stem" else s.x
    if s.form == "norm":
        y = replace(s.norm, uses_batch=False)(y).relu()
    elif s.form != "plain":
        y = s.norm(y).relu()
    y = functional.max_pool2d(y, 2) if s.pooled else y
    outputs = [functional.conv2d(y, w[:, :, None, None], b) for w, b in zip(s.weights, s.biases, strict=True)]
    outputs[0] = outputs[0] if s.residual is None else outputs[0] + s.residual
    return [*outputs, s.x] if s.form == "trained" and s.passes else outputs


def surround(rng: random.Random, compared: bool) -> None:
    """The products around attention; gradients of the forms that have them, in half of the calls."""
    s, state = drawn_surround(rng), rng.getstate()
    backward = s.form in ("trained", "stem") and rng.random() < 0.5
    found = with_gradients(native_surround, s, rng, backward)
    if compared:
        rng.setstate(state)
        backward = s.form in ("trained", "stem") and rng.random() < 0.5
        check(found, with_gradients(exact_surround, s.double(), rng, backward), 0.03 if s.norm.uses_batch else 1e-3)


def with_gradients(function: Any, s: Surround, rng: random.Random, backward: bool) -> list[Tensor]:
    with torch.set_grad_enabled(backward):
        y = function(s)
    if not backward:
        return y
    leaves = [s.x, s.residual, s.norm.weight, s.norm.bias, s.stem, *s.weights, *s.biases]
    leaves = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    cotangents = [rearranged(rng, torch.randn(each.shape, generator=generator).to(each.dtype)) for each in y]
    return [*y, *torch.autograd.grad(y, leaves, cotangents, allow_unused=True, materialize_grads=True)]


def drawn_network(rng: random.Random) -> tuple[SAN, Tensor]:
    """A network of up to two small stages, every tensor random, in training or evaluation, and images for it."""
    stages, form = rng.randint(1, 2), rng.choice(FORMS)
    share = rng.choice((1, 2, 4))
    options: dict[str, Any] = {} if form == "scalar" else {"share": share, "mapping": rng.choice(MAPPINGS)}
    if form == "pairwise":
        options |= {"relation": rng.choice(PAIRWISE), "position": rng.choice(("relative", "absolute", "none"))}
    if form == "patchwise":
        options["relation"] = rng.choice(("concatenation", "star"))
    with torch.random.fork_rng():
        torch.manual_seed(rng.randrange(1 << 30))
        network = SAN(
            [rng.randint(0, 2) for _ in range(stages)],
            [4 * share * rng.randint(1, 6) for _ in range(stages)],
            [rng.choice((1, 3, 3, 5, 7)) for _ in range(stages)],
            form,
            num_classes=3,
            in_chans=rng.randint(1, 4),
            pools=[rng.random() < 0.5 for _ in range(stages)],
            dilation=rng.choice((1, 1, 2)),
            border=rng.choice(("reflect", "zeros")),
            transformations=rng.choice(("different", "query=key")),
            relation_reduction=rng.choice((4, 16)),
            **options,
        )
        for x in network.state_dict().values():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if x.dim() == 1 else torch.randn_like(x) / x[0].numel() ** 0.5)
        network.train(rng.random() < 0.5)
        # BatchNorm in training needs more than one value, and maps may come down to one pixel.
        batch = rng.randint(2 if network.training else 1, 3)
        images = torch.randn(batch, network.in_chans, 3 + size(rng), 3 + size(rng))
    return network, images


def network(rng: random.Random, compared: bool) -> None:
    """A whole network in its fused form: with gradients, or without them twice, recorded and then repeated."""
    model, images = drawn_network(rng)
    backward = rng.random() < 0.5
    images = rearranged(rng, images).requires_grad_(backward)
    leaves = [images, *model.parameters()]
    with torch.set_grad_enabled(backward):
        found = [model(images)] if backward else [model(images), model(images)]
    if backward:
        found += torch.autograd.grad(found[0].sum(), leaves, allow_unused=True, materialize_grads=True)
    if compared and not model.training:
        with ops.use_backend("reference"):
            exact = copy.deepcopy(model).double()(images.detach().double())
        # Attention without softmax multiplies maps, block by block, beyond what float32 holds.
        if exact.isfinite().all() and exact.norm() < 1e15:
            check(found[:1], [exact], 1e-3)
        assert backward or torch.equal(*map(torch.nan_to_num, found)), "a repeated recording gives other bits"


def call(seed: int, number: int) -> bool:
    """Call `number` of `seed`; False where the operators refuse it in words, which is no finding."""
    rng = random.Random(f"{seed} {number}")
    loaded = library.load()
    assert loaded is not None
    sets = library._RUNS[library._best(loaded._binary)]
    loaded.instruction_set = rng.choice(sets)
    loaded._functions.clear()
    torch.set_num_threads(rng.choice((1, 1, 2, 3)))
    operators.GRAIN = 1  # small calls, too, on all of them
    try:
        rng.choice((attend, attend, attend, surround, network))(rng, number % COMPARED == 0)
    except UserError:
        return False
    return True


def run(seed: int, first: int, stop: int, seconds: float, done: Any) -> None:
    """Calls [first, stop), as many as the time allows; `done` tells the parent how far they are."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN, so that what is never written shows
    start, shown, refused = time.monotonic(), 0.0, 0
    for number in range(first, stop):
        done.value = number
        refused += not call(seed, number)
        passed = time.monotonic() - start
        if passed - shown > 10 or passed > seconds or number == stop - 1:
            shown = passed
            print(f"{number - first + 1} calls in {passed:.0f} s, {refused} refused", file=sys.stderr)
        if passed > seconds:
            break
    done.value += 1


def main() -> None:
    """Run the calls in a child and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    if library.load() is None:
        sys.exit("the native library does not load")
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", given.first)
    child = context.Process(target=run, args=(given.seed, given.first, given.first + given.count, given.seconds, done))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"call {done.value} failed: repeat it with --seed {given.seed} --first {done.value} --count 1")
    print(f"{done.value - given.first} calls without a finding", file=sys.stderr)


if __name__ == "__main__":
    main()
