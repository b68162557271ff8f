"""What ``solver.py`` does, in torch's operators on any device, for several weights of one shape at once.

The algorithm is that of ``gptq.py``, ``hess.py`` and ``descent.py``; theirs is the reasoning. Sums are in
another order, so that some codes differ. Arrays are [weights, in, rows]. Codes follow one after the other,
and each costs a few launches, however large they are: so rows, weights and trials of block scales are taken
at once, and what can wait until the end of a block does.

Block scales of nvfp4's rule are searched among 32, where the CPU's kernel proves that no other can win and
else looks at all 126: those that it looks at then were never seen to be better by more than rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from nemoquant.formats import FormatName, SolvedMethod, e2m1, e4m3
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.rounding import Codes, Floats
from nemoquant.solve.descent import SLACK
from nemoquant.solve.grids import Grid, grid
from nemoquant.solve.hess import REACH
from nemoquant.solve.lanes import PANEL
from nemoquant.solve.metric import Metric, triangular
from nemoquant.solve.solver import Candidate, Solved, better, decoded, encoded_plainly, nothing_observed

ELEMENTS = 40_000_000
"""Of weights on the device at once, a record's worth of bf16 (``layer.GROUP_BYTES``) and a weight more.

Each takes some 20 bytes there, and up to 6 in passing on the host.
"""

_BELOW, _WINDOW = 5, 32  # block scales that are tried below that of method max, and in all

# E2M1's values in ascending order, -0 included, and the largest float32 that rounds to each but the last: an
# odd code loses its midpoints to its even neighbours.
_ORDER = np.concatenate([np.arange(15, 7, -1), np.arange(8)]).astype(np.uint8)


def _edges() -> Floats:
    values = e2m1.VALUES[_ORDER]
    edges = (values[:-1] + values[1:]) / np.float32(2)
    odd_below = _ORDER[:-1] % 2 == 1
    edges[odd_below] = np.nextafter(edges[odd_below], np.float32(-np.inf))
    edges[7] = np.nextafter(np.float32(0), np.float32(-1))  # -0 stands for what is below 0
    return edges


class Task(NamedTuple):
    """One weight to solve, as :func:`nemoquant.solve.solver.solve` takes it."""

    weight: Floats
    scale: np.float32
    metric: Metric


class _Metrics(NamedTuple):
    """H / unit, float32 [weights, in, in]; L, the same; D, float64 [weights, in]."""

    units: torch.Tensor
    lower: torch.Tensor
    pivots: torch.Tensor


class _Numbers(NamedTuple):
    """A format's grid on the device.

    ``scales`` [weights, block scales]; ``global_scales`` [weights, 1]; ``edges``, ``codes`` and ``values`` of
    E2M1 in ascending order.
    """

    grid: Grid
    scales: torch.Tensor
    global_scales: torch.Tensor
    edges: torch.Tensor
    codes: torch.Tensor
    values: torch.Tensor

    def rounded(self, quotients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, uint8, and what they stand for without a scale."""
        if self.grid.four:
            at = torch.bucketize(quotients, self.edges, out_int32=True)
            return self.codes[at], self.values[at]
        near = quotients.clamp(-e4m3.MAX, e4m3.MAX).to(torch.float8_e4m3fn)
        return near.view(torch.uint8), near.float()

    def scales_of(self, codes: torch.Tensor) -> torch.Tensor:
        """The scales of codes [weights, ...]."""
        return self.scales.gather(1, codes.flatten(1).long()).view(codes.shape)


class _State(NamedTuple):
    """Weights while they are solved: [weights, in, rows], scale codes [weights, blocks, rows]."""

    weights: torch.Tensor
    values: torch.Tensor
    codes: torch.Tensor
    scale_codes: torch.Tensor
    errors: torch.Tensor


def solve_on(
    device: torch.device,
    format: FormatName,
    weight: Floats,
    scale: np.float32,
    metric: Metric,
    method: SolvedMethod,
    descent: int,
) -> Solved:
    """:func:`nemoquant.solve.solver.solve` on a device, with its promise and its refusals."""
    return solve_all_on(device, format, [Task(weight, scale, metric)], method, descent)[0]


def solve_all_on(
    device: torch.device,
    format: FormatName,
    tasks: Sequence[Task],
    method: SolvedMethod,
    descent: int,
    mapped: Callable[..., Iterable[Any]] = map,
) -> list[Solved]:
    """:func:`solve_on` for several weights of one shape at once.

    ``mapped``: like ``map``, for what the host does for each weight. Raises ValueError as
    :func:`nemoquant.solve.solver.solve`, and where shapes differ.
    """
    shapes = {task.weight.shape for task in tasks}
    if len(shapes) > 1:
        raise ValueError(
            f"tasks: got weights {sorted(shapes)}, expected a single shape; solve each by itself"
        )
    plain: list[Encoded] = list(
        mapped(lambda t: encoded_plainly(format, t.weight, t.scale, t.metric, method, descent), tasks)
    )
    seen = [k for k, task in enumerate(tasks) if not task.metric.empty]
    found: dict[int, Solved] = {}
    if seen:
        parts = _solve(device, format, [tasks[k] for k in seen], [plain[k] for k in seen], method, descent)

        def chosen(k: int, solved: Candidate, objective: float) -> Solved:
            return better(format, *tasks[k], solved, plain=Candidate(plain[k], objective), method=method)

        found = dict(zip(seen, mapped(chosen, seen, *zip(*parts, strict=True)), strict=True))
    return [found[k] if k in found else nothing_observed(format, plain[k]) for k in range(len(tasks))]


def _solve(
    device: torch.device,
    format: FormatName,
    tasks: Sequence[Task],
    plain: Sequence[Encoded],
    method: SolvedMethod,
    descent: int,
) -> list[tuple[Candidate, float]]:
    """Each weight's codes with their objective, and the objective of its plain codes."""
    metrics, numbers = _metrics(device, tasks), _numbers(device, format, tasks)
    out, width = tasks[0].weight.shape
    solved = [
        Encoded(np.empty_like(p.codes), None if p.block_scales is None else np.empty_like(p.block_scales))
        for p in plain
    ]
    objectives = np.zeros((2, len(tasks)))
    step = max(1, ELEMENTS // (len(tasks) * width))
    for start in range(0, out, step):
        rows = slice(start, start + step)
        weights = _turned([t.weight[rows] for t in tasks], device)
        values = _turned(
            (decoded(format, p, t.scale, rows) for p, t in zip(plain, tasks, strict=True)), device
        )
        objectives[1] += _objectives(metrics, weights - values)
        state = _State(
            weights,
            values,
            torch.empty(weights.shape, dtype=torch.uint8, device=device),
            _start_scales(plain, rows, weights.shape, numbers.grid.block, device),
            torch.empty_like(weights),
        )
        if method == "gptq":
            _gptq(state, metrics, numbers)
        else:
            _hess(state, metrics, numbers)
        for _ in range(descent):
            _sweep(state, metrics, numbers)
        objectives[0] += _objectives(metrics, state.errors)
        _copy_back(state, solved, rows, numbers.grid.four)
    return [
        (Candidate(encoded, float(reached)), float(before))
        for encoded, reached, before in zip(solved, *objectives, strict=True)
    ]


def _metrics(device: torch.device, tasks: Sequence[Task]) -> _Metrics:
    units, lower, pivots = [], [], []
    for task in tasks:
        matrix = torch.from_numpy(task.metric.matrix).to(device)
        units.append((matrix / task.metric.unit).float())
        one, diagonal = triangular(units[-1], matrix, task.metric.unit)
        lower.append(one)
        pivots.append(diagonal)
    return _Metrics(torch.stack(units), torch.stack(lower), torch.stack(pivots))


def _numbers(device: torch.device, format: FormatName, tasks: Sequence[Task]) -> _Numbers:
    grids = [grid(format, task.scale) for task in tasks]
    return _Numbers(
        grids[0],
        torch.from_numpy(np.stack([g.scales for g in grids])).to(device),
        torch.from_numpy(np.array([[task.scale] for task in tasks], np.float32)).to(device),
        torch.from_numpy(_edges()).to(device),
        torch.from_numpy(_ORDER).to(device),
        torch.from_numpy(e2m1.VALUES[_ORDER]).to(device),
    )


def _turned(parts: Iterable[Floats | Codes], device: torch.device) -> torch.Tensor:
    """Each [rows, in], as one [weights, in, rows] on the device."""
    return torch.stack([torch.tensor(part, device=device).T for part in parts]).contiguous()


def _start_scales(
    plain: Sequence[Encoded], rows: slice, shape: torch.Size, block: int, device: torch.device
) -> torch.Tensor:
    """The block scales of the format's own method, or zeros for the single scale of fp8."""
    found = [p.block_scales[rows] for p in plain if p.block_scales is not None]
    if found:
        return _turned(found, device)
    return torch.zeros((shape[0], -(-shape[1] // block), shape[2]), dtype=torch.uint8, device=device)


def _copy_back(state: _State, solved: Sequence[Encoded], rows: slice, four: bool) -> None:
    codes = _rows_of(state.codes)
    scale_codes = _rows_of(state.scale_codes)
    for k, encoded in enumerate(solved):
        encoded.codes[rows] = e2m1.pack(codes[k]) if four else codes[k]
        if encoded.block_scales is not None:
            encoded.block_scales[rows] = scale_codes[k]


def _rows_of(codes: torch.Tensor) -> Codes:
    """[weights, in, rows] as [weights, rows, in] on the host."""
    turned: Codes = codes.mT.contiguous().cpu().numpy()
    return turned


def _objectives(metrics: _Metrics, errors: torch.Tensor) -> Floats:
    """``sum_j D_j (L e)_j^2`` of each weight's errors; see ``solver._objective``."""
    width = errors.shape[1]
    total = torch.zeros(len(errors), dtype=torch.float64, device=errors.device)
    for start in range(0, width, PANEL):
        end = min(start + PANEL, width)
        missed = torch.bmm(metrics.lower[:, start:end, :end], errors[:, :end])
        total += (metrics.pivots[:, start:end] * missed.double().square_().sum(2)).sum(1)
    found: Floats = total.cpu().numpy()
    return found


# GPTQ.


def _gptq(state: _State, metrics: _Metrics, numbers: _Numbers) -> None:
    width, block, lower = state.weights.shape[1], numbers.grid.block, metrics.lower
    lanes = numbers.scales[:, :1].expand(-1, state.weights.shape[2])
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        targets = state.weights[:, start:stop].clone()
        if start:
            targets.baddbmm_(lower[:, start:stop, :start], state.errors[:, :start])
        for first in range(start, stop, block):
            last = min(first + block, stop)
            target, weight = targets[:, first - start : last - start], state.weights[:, first:last]
            within = lower[:, first:last, first:last]
            if first > start:
                target.baddbmm_(lower[:, first:last, start:first], state.errors[:, start:first])
            if numbers.scales.shape[1] > 1:
                # Errors that come about if every code meets its target: see gptq._updated.
                assumed = torch.linalg.solve_triangular(
                    within, weight - target, upper=False, unitriangular=True
                )
                chosen = _chosen_scales(weight - assumed, numbers)
                state.scale_codes[:, first // block] = chosen
                lanes = numbers.scales_of(chosen)
            for k in range(last - first):
                j, now = first + k, target[:, k]
                if k:
                    target[:, k : k + 1].baddbmm_(within[:, k : k + 1, :k], state.errors[:, first:j])
                state.codes[:, j], values = numbers.rounded(now / lanes)
                torch.mul(values, lanes, out=state.values[:, j])
                torch.sub(weight[:, k], state.values[:, j], out=state.errors[:, j])


def _chosen_scales(targets: torch.Tensor, numbers: _Numbers) -> torch.Tensor:
    """Codes [weights, rows] of a block's scale by the format's rule, for targets [weights, block, rows]."""
    largest = targets.abs().amax(1)
    if not numbers.grid.four:
        bits = (largest / 448).view(torch.int32)  # e8m0.ceil_code
        codes = (bits + 0x7FFFFF) >> 23
        return torch.where(bits <= 0x400000, 0, codes).clamp_(max=numbers.grid.last).to(torch.uint8)
    # In units of the global scale no square under- or overflows.
    magnitudes = (targets.abs() / numbers.global_scales[:, None])[:, None]
    rule = (largest / (6 * numbers.global_scales)).clamp(e4m3.SMALLEST, e4m3.MAX).to(torch.float8_e4m3fn)
    bottom = (rule.view(torch.uint8).int() - _BELOW).clamp_(
        numbers.grid.first, numbers.grid.last + 1 - _WINDOW
    )
    tried = bottom[:, None] + torch.arange(_WINDOW, device=targets.device)[:, None]
    scales = (numbers.scales_of(tried) / numbers.global_scales[:, None])[:, :, None]
    missed = numbers.rounded(magnitudes / scales)[1].mul_(scales).sub_(magnitudes).square_().sum(2)
    # The first of those that are equal is the smaller scale.
    chosen = bottom + missed.argmin(1)
    return torch.where(largest == 0, e4m3.ONE, chosen).to(torch.uint8)


# Block scales by the metric, and descent.


def _nearby(own: torch.Tensor, reach: int, grid: Grid) -> torch.Tensor:
    """Codes [weights, trials, rows] around a block's own, nearer ones first; of two, the larger."""
    steps = [(turn + 1) // 2 if turn % 2 else -(turn // 2) for turn in range(2 * reach + 1)]
    offsets = torch.tensor(steps, dtype=torch.int32, device=own.device)
    return (own.int()[:, None] + offsets[:, None]).clamp_(grid.first, grid.last)


def _picked(trials: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """``trials`` [weights, block, trials, rows] at ``best`` [weights, rows]: [weights, block, rows]."""
    index = best[:, None, None].expand(-1, trials.shape[1], -1, -1)
    return trials.gather(2, index).squeeze(2)


def _hess(state: _State, metrics: _Metrics, numbers: _Numbers) -> None:
    """Fill the state, whose block scales are those with the least squared error."""
    block = numbers.grid.block
    for first in range(0, state.weights.shape[1], block):
        part, at = slice(first, first + block), first // block
        weight = state.weights[:, part, None]
        tried = _nearby(state.scale_codes[:, at], REACH, numbers.grid)
        scales = numbers.scales_of(tried)[:, None]
        codes, values = numbers.rounded(weight / scales)
        values *= scales
        errors = weight - values
        products = torch.bmm(metrics.units[:, part, part], errors.flatten(2)).view(errors.shape)
        best = (errors * products).sum(1).argmin(1)
        state.codes[:, part], state.values[:, part] = _picked(codes, best), _picked(values, best)
        state.errors[:, part] = _picked(errors, best)
        state.scale_codes[:, at] = tried.gather(1, best[:, None]).squeeze(1).to(torch.uint8)


def _sweep(state: _State, metrics: _Metrics, numbers: _Numbers) -> None:
    """One sweep of coordinate descent over all inputs."""
    width, block, units = state.weights.shape[1], numbers.grid.block, metrics.units
    diagonals = units.diagonal(dim1=1, dim2=2)
    roots = diagonals.sqrt()
    sizes = torch.bmm(roots[:, None], state.errors.abs())
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        gradients = torch.bmm(units[:, start:stop], state.errors)
        moved = torch.empty_like(gradients)  # old - new values
        for first in range(start, stop, block):
            part, done = slice(first, min(first + block, stop)), first - start
            local = slice(done, part.stop - start)
            gradient = gradients[:, local]
            if done:
                gradient.baddbmm_(units[:, part, start:first], moved[:, :done])
            moved[:, local] = state.values[:, part]
            _descend(
                _State(
                    state.weights[:, part],
                    state.values[:, part],
                    state.codes[:, part],
                    state.scale_codes[:, first // block],
                    state.errors[:, part],
                ),
                gradient,
                units[:, part, part],
                roots[:, part],
                sizes,
                numbers,
            )
            moved[:, local] -= state.values[:, part]


def _descend(
    state: _State,
    gradient: torch.Tensor,
    metric: torch.Tensor,
    roots: torch.Tensor,
    sizes: torch.Tensor,
    numbers: _Numbers,
) -> None:
    """The trial of a block's scale with the largest fall of the objective.

    Args:
        state: of the block: [weights, block, rows], scale codes [weights, rows]; changed in place.
        gradient: [weights, block, rows], the block's part of H (w - q).
        metric, roots: the block's part of H / unit, and the roots of its diagonal [weights, block].
        sizes: [weights, 1, rows], sum |e_j| sqrt(H_jj) over all inputs.
    """
    tried = _nearby(state.scale_codes, numbers.grid.reach, numbers.grid)
    scales = numbers.scales_of(tried) if len(numbers.scales[0]) > 1 else numbers.scales[:, :1, None]
    old = state.values[:, :, None]
    shape = (*gradient.shape[:2], *tried.shape[1:])  # [weights, block, trials, rows]
    now = gradient[:, :, None].expand(shape).contiguous()
    new, changes = torch.empty_like(now), torch.empty_like(now)
    codes = torch.empty(shape, dtype=torch.uint8, device=now.device)
    diagonal = metric.diagonal(dim1=1, dim2=2)[:, :, None, None]
    inverse = 1 / diagonal
    flat, flat_changes = now.flatten(2), changes.flatten(2)
    for k in range(shape[1]):
        if k:
            flat[:, k : k + 1].baddbmm_(metric[:, k : k + 1, :k], flat_changes[:, :k])
        aims = torch.addcmul(old[:, k], now[:, k], inverse[:, k])
        codes[:, k], values = numbers.rounded(aims / scales)
        torch.mul(values, scales, out=new[:, k])
        torch.sub(old[:, k], new[:, k], out=changes[:, k])
    falls = -(changes * (2 * now + changes * diagonal)).sum(1)
    moves = (changes.abs() * roots[:, :, None, None]).sum(1)
    falls -= float(SLACK) * moves * sizes
    best = falls.argmax(1)
    kept = falls.gather(1, best[:, None]) > 0
    state.codes.copy_(torch.where(kept, _picked(codes, best), state.codes))
    state.values.copy_(torch.where(kept, _picked(new, best), state.values))
    torch.sub(state.weights, state.values, out=state.errors)
    picked = tried.gather(1, best[:, None]).squeeze(1).to(torch.uint8)
    state.scale_codes.copy_(torch.where(kept[:, 0], picked, state.scale_codes))
