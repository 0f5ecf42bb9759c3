"""Forces plans over MobileNetV2's 17 blocks and compares the planner's choice with the best one found.

    python benchmarks/sweep_plans.py --threads 2 --dtype bfloat16

The constants of ``csrc/cpu/plan.cpp`` are set by hand against this table: what the chosen plan takes over the best one,
and how well the planner's cost ranks all that were tried.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import mnv2_fused
from mnv2_fused import backends, ops, testing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 9


def parts(size: int, counts: tuple[int, ...]) -> list[int]:
    """Sizes of the equal parts that cut ``size`` into so many."""
    return sorted({-(-size // count) for count in counts if count <= size}, reverse=True)


def candidates(spec: mnv2_fused.BlockSpec, shape: tuple[int, ...], dtype: torch.dtype) -> list[mnv2_fused.Plan]:
    """The planner's choice first, then every other plan that is not plainly worse."""
    chosen = mnv2_fused.plan(spec, shape, dtype=dtype)
    height, width = ((size - 1) // spec.stride + 1 for size in shape[2:])
    panels = -(-spec.hidden_channels // 16)
    found = {tuple(chosen.forced()): chosen}
    for rows, cols, group in itertools.product(
        parts(height, (1, 2, 4, 8)), parts(width, (1, 2, 4)), parts(panels, (1, 2, 3, 4, 6))
    ):
        for splits in range(1, min(torch.get_num_threads(), -(-panels // group)) + 1):
            forced = {"tile_rows": rows, "tile_cols": cols, "group": 16 * group, "splits": splits}
            plan = mnv2_fused.plan(spec, shape, dtype=dtype, **forced)
            if plan.cost < 1.5 * chosen.cost and plan.scratch_bytes < 4 * backends._C.l2_bytes():
                found.setdefault(tuple(plan.forced()), plan)
    return list(found.values())


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""

    def ranks(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).argsort().argsort().double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item() if len(a) > 2 else float("nan")


def sweep(spec: mnv2_fused.BlockSpec, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, float, float]:
    """A row of the table, and the seconds of the chosen plan and of the best."""
    weights = testing.random_weights(spec)
    packed = mnv2_fused.pack(weights, dtype)
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    plans = candidates(spec, shape, dtype)

    def call(plan: mnv2_fused.Plan):
        return ops.packed_inverted_residual(x, packed, spec.stride, spec.residual, plan.forced())

    for plan in plans:
        check = testing.block_agreement(call(plan), x, weights, spec)
        if not check.ok:
            raise SystemExit(f"wrong result of {plan}, so no speed: {check}")
    timings = testing.interleave({str(i): lambda p=p: call(p) for i, p in enumerate(plans)}, rounds=ROUNDS)
    seconds = [min(timings[str(i)].seconds) for i in range(len(plans))]
    best = min(range(len(plans)), key=seconds.__getitem__)

    def short(plan: mnv2_fused.Plan) -> str:
        return f"{plan.tile_rows}x{plan.tile_cols} g{plan.group} s{plan.splits}"

    rank = rank_correlation([p.cost for p in plans], seconds)
    row = (
        f"{short(plans[0]):>18} {seconds[0] * 1e6:8.0f} | {short(plans[best]):>18} {seconds[best] * 1e6:8.0f} | "
        f"{seconds[0] / seconds[best]:9.3f} | {len(plans):5} | {rank:5.2f}"
    )
    return row, seconds[0], seconds[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("block |        chosen plan       us |          best plan       us | over best | tried | rank correlation")
    chosen = best = 0.0
    with torch.inference_mode():
        for i, (spec, size) in enumerate(testing.mobilenet_v2_blocks(args.resolution)):
            row, of_chosen, of_best = sweep(spec, (args.batch, spec.in_channels, *size), DTYPES[args.dtype])
            print(f"{i + 1:5} | {row}")
            chosen, best = chosen + of_chosen, best + of_best
    print(f"all 17: chosen {chosen * 1e6:.0f} us, best {best * 1e6:.0f} us, {chosen / best:.3f}x")


if __name__ == "__main__":
    main()
