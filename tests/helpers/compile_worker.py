"""Compiles the kernels for sm_90, as they are launched there, on a machine that needs no GPU;
writes what came out as JSON.

    python compile_worker.py FILE [rows|early|losses|experts]
                                                each: kernel, kind, world, line, split, warps,
                                                most (registers of a thread, as asked for), the PTX,
                                                layouts of what is pushed, registers and stack bytes
                                                of a thread, bytes of shared memory of a block. rows:
                                                the kernels of few rows on one GPU, in place of those
                                                between GPUs; early: both, and those of experts, to be
                                                launched so; losses: cross entropy; experts: rows that
                                                are exchanged
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardlib.ops.expert_ffn import tiles_of
from shardlib.ops.few_rows import tile_of
from shardlib.ops.nvlink_grids import grid_of_tokens, launches_of, row_grid
from shardlib.triton_kernels.all_reduce import one_shot_kernel, two_shot_kernel
from shardlib.triton_kernels.all_reduce_add_rms_norm import (
    all_reduce_add_rms_norm_kernel,
    row_spin,
    two_shot_add_rms_norm_kernel,
)
from shardlib.triton_kernels.cached_attention import cached_attention_kernel
from shardlib.triton_kernels.cross_entropy import WARPS, cross_entropy_kernel, label_sums_vjp_kernel
from shardlib.triton_kernels.decode_attention import decode_attention_kernel
from shardlib.triton_kernels.exchange import exchange_kernel, spin_lines
from shardlib.triton_kernels.expert_exchange import combine_rows_kernel, dispatch_rows_kernel, spin_parts
from shardlib.triton_kernels.expert_ffn import expert_down_kernel, expert_gate_up_kernel, rows_at_once
from shardlib.triton_kernels.follow import follow_kernel
from shardlib.triton_kernels.gate_up import gate_up_kernel
from shardlib.triton_kernels.lamport import spin
from shardlib.triton_kernels.limits import MOST_TOKENS
from shardlib.triton_kernels.lookup import lookup_kernel, note_kernel
from shardlib.triton_kernels.matmul_rows import one_row_kernel, rows_kernel, stream_kernel
from shardlib.triton_kernels.merge_two import merge_two_kernel
from shardlib.triton_kernels.reduce_scatter import reduce_scatter_kernel
from shardlib.triton_kernels.rms_norm import rms_norm_kernel
from shardlib.triton_kernels.rope_angles import rope_angles_kernel
from shardlib.triton_kernels.rope_into_cache import rope_into_cache_kernel
from shardlib.triton_kernels.route import route_kernel
from shardlib.triton_kernels.row_argmax import row_argmax_kernel
from shardlib.triton_kernels.split_argmax import split_argmax_kernel

KERNELS = {"one_shot": one_shot_kernel, "two_shot": two_shot_kernel, "reduce_scatter": reduce_scatter_kernel,
           "exchange": exchange_kernel, "norm": all_reduce_add_rms_norm_kernel,
           "two_shot_norm": two_shot_add_rms_norm_kernel, "split_argmax": split_argmax_kernel}
ROW_QUADS, SPLIT = 1024, 4
"""Quads of a row that is normed, which so many blocks share."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
EARLY: set[Any] = set()
"""Kernels on one GPU that have been compiled to start early."""
ALIGNED = [["tt.divisibility", 16]]


def launches() -> Iterator[dict[str, Any]]:
    """The launches with the most threads, which `ops/nvlink.py` makes for the largest tensors, and those with
    a line a warp. On a rank in the middle, where two shots between four spill most; there of every kind of
    words, which differ in how they are unpacked, and of two kinds of 16 bits one elsewhere."""
    for world in (2, 4, 8):
        kinds = ("fp32", "bf16", "fp16") if world == 4 else ("fp32", "bf16")
        sums, (small, widest) = launches_of(world)[0][-1], (launches_of(world)[1][at] for at in (0, -1))
        for kernel in ("one_shot", "two_shot", "reduce_scatter"):
            for kind in kinds:
                yield dict(kernel=kernel, kind=kind, world=world, line=0, warps=sums.warps,
                           most=sums.registers)
        for line, launch in ((32, small), (32, widest), (32 * widest.warps, widest)):
            yield dict(kernel="exchange", kind="any", world=world, line=line, warps=launch.warps,
                       most=launch.registers)
        for shots, kernel in enumerate(("norm", "two_shot_norm"), 1):
            grid = row_grid(8, ROW_QUADS // (1 if shots == 1 else world), SPLIT, world, shots)
            for kind in kinds:
                yield dict(kernel=kernel, kind=kind, world=world, line=0, warps=grid.warps,
                           most=grid.registers)


def compiled(kernel: str, kind: str, world: int, line: int, warps: int, most: int,
             early: bool = False) -> dict[str, Any]:
    function = KERNELS[kernel]
    types = {"x_ptr": "*i32", "out_ptr": "*i32", "residual_ptr": "*i32", "weight_ptr": "*i32",
             "normed_ptr": "*i32", "addresses_ptr": "*i64", "state_ptr": "*i32", "eps": "fp32"}
    values = {"RANK": world // 2, "W": world, "KIND": kind, "FLAT": False, "LINE": line, "BLOCK": 32 * warps,
              "LANES": 32 * warps, "SPLIT": SPLIT, "INTERPRET": False,
              **(spin_lines if kernel == "exchange" else spin)(world - 1), **row_spin(SPLIT)}
    if kernel == "split_argmax":
        types |= {"x_ptr": f"*{kind}", "out_ptr": "*i64"}
        values["LANES"] *= 8
    return dict(kernel=kernel, kind=kind, world=world, line=line, warps=warps, most=most,
                **assembled(function, types, values, warps, most, ("slot_bytes", "columns"), early))


def assembled(function: Any, types: dict[str, str], values: dict[str, Any], warps: int, most: int | None,
              aligned: tuple[str, ...], early: bool = False) -> dict[str, Any]:
    """aligned: which sizes are multiples of 16; all addresses are. Nothing of a kernel on one GPU that is to
    start early, where it cannot, or has been compiled so."""
    names = function.arg_names
    if early and function not in KERNELS.values():
        if "EARLY" not in names or function in EARLY:
            return {}
        EARLY.add(function)
    values = {"EARLY": early, **values} if "EARLY" in names else values
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in names}
    known = {(i,): ALIGNED for i, name in enumerate(names)
             if name not in values and (name.endswith("_ptr") or name in aligned)}
    source = ASTSource(function, signature,
                       constexprs={name: values[name] for name in names if name in values}, attrs=known)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                            options={"num_warps": warps, "maxnreg": most, "launch_pdl": early})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True,
                               check=True).stdout
    used, stack = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return dict(ptx=result.asm["ptx"], layouts=layouts(result.asm["ttgir"]), registers=used, stack=stack,
                shared=result.metadata.shared)


def early() -> Iterator[dict[str, Any]]:
    """All kernels that can start before the one before them has ended, as they are launched so."""
    for kernel, kind, warps in (("norm", "bf16", 4), ("two_shot_norm", "bf16", 4),
                                ("split_argmax", "bf16", 8), ("split_argmax", "fp32", 8)):
        yield compiled(kernel, kind, 4, 0, warps, 64, early=True)
    yield from (launch for launch in (*of_few_rows(early=True), *of_experts(early=True)) if "ptx" in launch)
    integers = {name: "*i64" for name in ("index_ptr", "seen_ptr", "chosen_ptr", "tokens_ptr", "ids_ptr",
                                          "position_ptr", "ends_ptr", "start_ptr")}
    types = integers | {"x_ptr": "*bf16", "out_ptr": "*bf16", "inv_ptr": "*fp32", "live_ptr": "*u8",
                        "found_ptr": "*i64", "counts_ptr": "*i32"}
    for name, function, values in (
            ("note", note_kernel, dict(BLOCK=128)), ("lookup", lookup_kernel, dict(LANES=1024)),
            ("follow", follow_kernel, dict(ROWS=32, ENDS=16)),
            ("row_argmax", row_argmax_kernel, dict(LANES=2048, SPLIT=True, MOST=64)),
            ("rope_angles", rope_angles_kernel, dict(HALF=64, LANES=64, INTERPRET=False))):
        kinds = types | {"rope_angles": {"out_ptr": "*fp32"}, "row_argmax": {"out_ptr": "*i64"}}.get(name, {})
        yield dict(kernel=name, **assembled(function, kinds, values, 4, None, ("width", "columns", "each"),
                                            early=True))


def of_few_rows(early: bool = False) -> Iterator[dict[str, Any]]:
    """The kernels on one GPU, in 16 bits, as `ops/few_rows.py` launches them."""
    bf16 = {name: "*bf16" for name in ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "normed_ptr",
                                       "w_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr", "keys_ptr",
                                       "values_ptr", "gate_ptr", "up_ptr")}
    types = bf16 | {"eps": "fp32", "lengths_ptr": "*i64", "start_ptr": "*i64", "angles_ptr": "*fp32",
                    "parts_ptr": "*fp32", "counts_ptr": "*i32"}
    for adds, width in ((False, 4096), (True, 8192)):
        yield dict(kernel="rms_norm", **assembled(rms_norm_kernel, types, dict(ADDS=adds, LANES=width),
                                                  width // 256, None, ("width",), early))
    yield dict(kernel="gate_up", **assembled(gate_up_kernel, types, dict(LIVE=False, LANES=1024), 4, None,
                                             ("width", "gate_stride", "up_stride"), early))
    for rows, lines, columns, gated in ((1, 4096, 1536, False), (1, 8192, 14336, True),
                                        (8, 4096, 1536, False), (8, 4096, 7168, True),
                                        (32, 8192, 8192, False)):
        tile = tile_of(rows, lines, columns, gated)
        values = dict(GATED=gated, WHOLE=True, SPLIT=tile.splits > 1, ROWS=max(8, rows), COLUMNS=tile.columns,
                      LINES=tile.lines, STAGES=tile.stages)
        kernel, function = (("stream", stream_kernel) if tile.blocks else ("one_row", one_row_kernel)
                            if rows == 1 else ("rows", rows_kernel))
        yield dict(kernel=kernel, split=tile.splits, **assembled(
            function, types, {k: v for k, v in values.items() if k in function.arg_names}, tile.warps,
            None, ("K",), early))
    values = dict(G=4, H=128, QUERIES=32, HEADS=8, LANES=64)
    merged = {f"{n}_ptr": "*fp32" for n in ("lse_a", "lse_b", "lse")}
    yield dict(kernel="merge_two", **assembled(
        merge_two_kernel, types | {f"{n}_ptr": "*bf16" for n in ("a", "b")} | merged,
        dict(H=128, HEADS=8, LANES=128), 2, None,
        tuple(n for n in merge_two_kernel.arg_names if "stride" in n), early))
    yield dict(kernel="rope_into_cache", **assembled(
        rope_into_cache_kernel, types | {"q_out_ptr": "*bf16", "k_out_ptr": "*bf16"}, values, 4, None,
        tuple(n for n in rope_into_cache_kernel.arg_names if "stride" in n), early))
    for group, splits in ((4, 1), (4, 4), (8, 64)):
        values = dict(G=group, H=128, HEAD=128, ROWS=16, BLOCK=64, SPLIT=splits > 1, STAGES=3, MOST=64)
        yield dict(kernel="attention", split=splits, **assembled(decode_attention_kernel, types, values, 4,
                                                                 None, ("stride_b", "stride_s", "stride_k"),
                                                                 early))
    strides = tuple(n for n in cached_attention_kernel.arg_names if "stride" in n)
    for group, splits, one in ((4, 1, True), (4, 4, True), (8, 1, True), (8, 64, True), (4, 4, False)):
        values = dict(G=group, H=128, HEAD=128, ROWS=16, NEW=16, ONE=one, BLOCK=64, SPLIT=splits > 1,
                      STAGES=3, MOST=64)
        yield dict(kernel="cached_attention", split=splits, **assembled(
            cached_attention_kernel, types, values, 4, None, strides, early))


def of_losses() -> Iterator[dict[str, Any]]:
    """Of logits of 16 bits, as many as fill rows of 16 bytes."""
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "labels_ptr": "*i64", "seen_ptr": "*i64",
             **{f"{name}_ptr": "*fp32" for name in ("loss", "top", "total", "label")}}
    for name, function, values in (
            ("cross_entropy", cross_entropy_kernel, dict(PIECE=False, THREADS=32 * WARPS, EACH=8)),
            ("label_sums", cross_entropy_kernel, dict(PIECE=True, THREADS=32 * WARPS, EACH=8)),
            ("label_sums_vjp", label_sums_vjp_kernel, dict(LANES=256 * WARPS))):
        yield dict(kernel=name, **assembled(function, types, dict(IGNORES=True, NOTES=True, **values), WARPS,
                                            None, ("V",)))


def of_experts(early: bool = False) -> Iterator[dict[str, Any]]:
    """The kernels of experts, of as many tokens as they take, as `ops/expert_ffn.py` launches them."""
    types = dict(x_ptr="*bf16", gate_ptr="*bf16", up_ptr="*bf16", h_ptr="*bf16", down_ptr="*bf16",
                 out_ptr="*bf16", chosen_ptr="*i64", weights_ptr="*fp32", parts_ptr="*fp32",
                 counts_ptr="*i32", logits_ptr="*bf16", experts_ptr="*i64", scale="fp32")
    yield dict(kernel="route", **assembled(route_kernel, types, dict(
        J=2, RENORMALISE=True, EXPERTS=8, CHOICES=2, ROWS=4), 1, None, (), early))
    for name, function, tile in zip(("expert_gate_up", "expert_down"),
                                    (expert_gate_up_kernel, expert_down_kernel), tiles_of(MOST_TOKENS, 3584)):
        values = dict(J=2, TOKENS=MOST_TOKENS, CHOICES=2, ROWS=rows_at_once(MOST_TOKENS), WHOLE=True, SUMS=16,
                      SPLITS=tile.splits, COLUMNS=tile.columns, LINES=tile.lines, STAGES=tile.stages,
                      column_stride=1)
        yield dict(kernel=name, **assembled(
            function, types, {k: v for k, v in values.items() if k in function.arg_names}, tile.warps, None,
            ("K", "N", "expert_stride", "line_stride"), early))


def of_exchanged_rows() -> Iterator[dict[str, Any]]:
    """Rows of experts between ranks, with as many choices as a token has in the models that have most."""
    types = {"x_ptr": "*bf16", "rows_ptr": "*bf16", "out_ptr": "*bf16", "chosen_ptr": "*i64",
             "place_ptr": "*i32", "weights_ptr": "*fp32", "addresses_ptr": "*i64", "state_ptr": "*i32"}
    for world, choices, function in ((4, 8, dispatch_rows_kernel), (4, 8, combine_rows_kernel),
                                     (8, 2, combine_rows_kernel)):
        grid = grid_of_tokens(4096, 512, world)
        values = {"RANK": world // 2, "W": world, "J": choices, "KIND": "bf16", "BLOCK": grid.threads,
                  "INTERPRET": False, **spin_parts(world - 1)}
        values = {name: value for name, value in values.items() if name in function.arg_names}
        yield dict(kernel=function.fn.__name__, world=world, warps=grid.warps, most=grid.registers,
                   **assembled(function, types, values, grid.warps, grid.registers, ("slot_bytes",)))


def layouts(ttgir: str) -> list[str]:
    """Which threads have which lane of a block, wherever something is pushed."""
    named = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    return sorted({named[name] for line in ttgir.splitlines() if "st.relaxed" in line
                   for name in re.findall(r"tensor<\w+, (#\w+)>", line)})


if __name__ == "__main__":
    made = ([compiled(**launch) for launch in launches()] if sys.argv[2:] == []
            else list({"rows": of_few_rows, "early": early, "losses": of_losses,
                       "experts": of_exchanged_rows}[sys.argv[2]]()))
    Path(sys.argv[1]).write_text(json.dumps(made))
