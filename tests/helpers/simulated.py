"""Programs of the models on all ranks of a mesh, in this process;
and the meshes and layouts they are tried on."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from rank_by_rank import match
from torch import Tensor

from shardlib import Layout, Mesh, Params, lower, prove
from shardlib.api import shard_of
from shardlib.compiler.sizes import complete_sizes
from shardlib.models import causal, llama
from shardlib.models.causal import Sampling
from shardlib.models.families import family_of
from shardlib.models.layouts import named_layout
from shardlib.models.llama import Llama, LlamaConfig, RopeScaling
from shardlib.params import fill, init, leaf_values
from shardlib.placement import join
from shardlib.program import Program
from shardlib.reports.project import project
from shardlib.run.simulate import simulate

Shards = Sequence[Mapping[str, Tensor]]        # for each rank, path -> what it holds


@dataclass(frozen=True)
class Ran:
    """What a program gave: each result leaf put together, and what each rank holds of it.

    log: its collectives.
    """
    program: Program
    results: list[Tensor]
    held: list[list[Tensor]]
    log: list[tuple]


def tree(weights: Mapping[str, Any], config: LlamaConfig) -> Llama:
    """The Llama pytree of path -> leaf; without a head where it is tied."""
    whole = fill(Llama, "", lambda path: weights.get(path[1:]))
    return Llama(embed=whole.embed, layers=whole.layers, norm=whole.norm,
                 head=None if config.tied else whole.head)


def run(f: Any, layout: Layout, mesh: Mesh, args: Mapping[str, Any], sizes: Mapping[str, int],
        shards: Shards = (), **static: Any) -> Ran:
    """`f` on every rank.

    `args`: whole tensors and pytrees by name. `shards`: leaves that are placed already.
    """
    program = lower(f, layout, *(v if isinstance(v, Params) else None for v in args.values()), mesh=mesh,
                    **static)
    whole = {path: t for name, v in args.items()
             for path, t in (leaf_values(v, name) if isinstance(v, Params) else [(name, v)])}
    placed = [
        {path: shards[rank][path] if shards and path in shards[rank] else shard_of(whole[path], kind, mesh, c)
         for path, kind in program.arg_leaves()} for rank, c in enumerate(mesh.coordinates())]
    return execute(program, mesh, placed, sizes)


def execute(program: Program, mesh: Mesh, placed: Shards, sizes: Mapping[str, int],
            proven: bool = True) -> Ran:
    """An explicit program on every rank.

    Unless `proven` is false, it is proven, and what ran is what was proven.
    """
    log: list[tuple] = []
    outs = simulate(program, mesh, placed, sizes, log)
    if proven:
        check_proof(program, mesh, placed, sizes, log)
    held = [[out[str(i)] for out in outs] for i in range(len(outs[0]))]
    results = [join(pieces, kind, sizes, mesh, tolerance=0)
               for pieces, (_, kind) in zip(held, program.result_leaves())]
    return Ran(program, results, held, log)


def check_proof(program: Program, mesh: Mesh, placed: Shards, sizes: Mapping[str, int],
                log: Sequence[tuple]) -> None:
    """The program is proven, and every rank made the collectives of its projection, in that order."""
    dtypes = {path: str(t.dtype).removeprefix("torch.") for path, t in placed[0].items()}
    whole = complete_sizes(program, sizes)
    calls = [project(program, mesh, rank, whole, dtypes) for rank in range(mesh.world_size)]
    assert match(calls) == prove(program, mesh, sizes, dtypes).collectives == len(log)
    for rank, expected in enumerate(calls):
        made = [(method, group) for group, method, _ in log if rank in group]
        assert made == [(c.op.replace("permute", "all_to_all"), c.group) for c in expected]


def line(text: str) -> str:
    """Where the model's file, or that of its programs, has `text`."""
    return next(f"{path.name}:{i}" for path in (Path(llama.__file__), Path(causal.__file__))
                for i, l in enumerate(path.read_text().splitlines(), 1) if text in l)


# -- generation ----------------------------------------------------------------------------------------------

def generate(weights: Any, config: LlamaConfig, layout: Layout, mesh: Mesh,
             prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Collection[int] = (),
             sampling: Sampling = Sampling(), chunk: int | None = None) -> list[list[int]]:
    """What `decoding.Model.generate` says under the same names, by the same programs,
    with all ranks in this process. chunk: of prompts, so many tokens at once."""
    static, lm = {"config": config}, family_of(config).lm
    if sampling.temperature:
        static["sampling"] = sampling
    later, first = ((lm.next_sample, lm.prompt_sample) if sampling.temperature
                    else (lm.next_token, lm.prompt_token))
    longest, rows = max(map(len, prompts)), len(prompts)
    begins = range(0, longest, chunk or longest)
    programs = [lower(f, layout, None, weights, mesh=mesh, **static, **ahead) for f, ahead in
                (*((first, {"ahead": begin}) for begin in begins), (later, {}))]
    sizes = dict(config.sizes, B=rows, S=longest + max_new_tokens)
    leaves = dict(programs[0].arg_leaves())
    assert all(leaves == dict(program.arg_leaves()) for program in programs)
    cache = dict(leaf_values(init(lm.cache, sizes, path="cache", dtype=weights.embed.dtype), "cache"))
    whole = {**dict(leaf_values(weights, "w")), **cache}
    state = [{path: shard_of(t, leaves[path], mesh, c) for path, t in whole.items()}
             for c in mesh.coordinates()]

    def call(number: int, ids: Tensor, start: Tensor, last: Tensor, proven: bool = True) -> Tensor:
        """What that program chooses; it takes the cache further."""
        here = {"ids": ids, "start": start, "last": last,
                **({"row": torch.arange(rows)} if sampling.temperature else {})}
        placed = [{**held, **{n: shard_of(t, leaves[n], mesh, c) for n, t in here.items()}}
                  for held, c in zip(state, mesh.coordinates())]
        ran = execute(programs[number], mesh, placed, {**sizes, "T": ids.shape[1]}, proven)
        for rank, held in enumerate(state):
            held.update(zip(cache, (pieces[rank] for pieces in ran.held[1:])))
        return ran.results[0]

    lengths = torch.tensor([len(p) for p in prompts])
    given = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
    chosen = torch.zeros_like(lengths)
    for number, ids in enumerate(given.split(chunk or longest, 1)):
        start = torch.full_like(lengths, begins[number])
        made = call(number, ids, start, (lengths - 1 - start).clamp(-1, ids.shape[1] - 1))
        chosen = torch.where((lengths - 1 - start).div(begins.step, rounding_mode="floor") == 0, made, chosen)
    tokens, live = [list(p) for p in prompts], [True] * rows
    for at in range(max_new_tokens):
        if at:
            chosen = call(-1, chosen[:, None], lengths + at - 1, torch.zeros_like(lengths), proven=at < 2)
        for row, token in enumerate(chosen.tolist()):
            if live[row]:
                tokens[row].append(token)
                live[row] = token not in eos_ids
        if not any(live):
            break
    return tokens


# -- models, meshes and layouts ------------------------------------------------------------------------------

@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    """Small, with sizes that the ranks do not divide.

    transformers wants d_model to be a multiple of the query heads.
    """
    kv, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return LlamaConfig(vocab_size=draw(st.integers(7, 29)),
                       d_model=kv * queries * draw(st.integers(-(-12 // (kv * queries)), 12)),
                       num_layers=draw(st.integers(1, 3)), num_kv_heads=kv, queries_per_kv=queries,
                       head_dim=2 * draw(st.integers(1, 4)), d_ff=draw(st.integers(1, 23)),
                       norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
                       rope_theta=draw(st.sampled_from((1e4, 5e5))),
                       rope_scaling=draw(st.sampled_from((
                           None, RopeScaling(8.0, 1.0, 4.0, 16), RopeScaling(2.0, 0.5, 3.0, 32)))),
                       tied=draw(st.booleans()), max_context=64)


NAMED = (("tp", "tp"), ("tp", "tp+sp"), ("dp", "tp"), ("dp", "fsdp"), ("tk,tg", "tp"), ("tk,tg", "tp+sp"),
         ("cp", "cp"), ("cp,tp", "tp+cp"), ("dp,tp", "tp+fsdp"), ("dp,cp,tp", "tp+sp+fsdp+cp"),
         ("dp,tk,tg", "tp+sp+fsdp"))


@st.composite
def named(draw: st.DrawFn) -> tuple[Mesh, Layout]:
    """One of the layouts that have a name, on a mesh of at most 12 ranks."""
    axes, layout = draw(st.sampled_from(NAMED))
    sizes = draw(st.tuples(*[st.integers(1, 4 if "," not in axes else 3)] * len(axes.split(","))).filter(
        lambda sizes: torch.tensor(sizes).prod() <= 12))
    mesh = Mesh(dict(zip(axes.split(","), sizes)))
    return mesh, named_layout(layout, mesh)


@st.composite
def any_layout(draw: st.DrawFn) -> tuple[Mesh, Layout]:
    """Any dims on any axes in any order: slow perhaps, but never wrong. The layers may be a pipeline.

    Only rms_norm refuses activations split on D.
    """
    axes = ("x", "y", "z")[:draw(st.integers(1, 3))]
    mesh = Mesh({a: draw(st.integers(1, 3 if len(axes) < 3 else 2)) for a in axes})
    dims = draw(st.permutations("BKGFVTSDH"))[:draw(st.integers(1, 9))]
    layout = Layout(
        {dim: tuple(draw(st.permutations(axes))[:draw(st.integers(1, len(axes)))]) for dim in dims})
    stages = (draw(st.sampled_from(axes)),) if draw(st.booleans()) else ()
    if layout.complete("BTD", {})["D"] or layout.without(stages).complete("BTD", {})["D"]:
        layout = Layout({dim: axes for dim, axes in layout.entries.items() if dim != "D"})
    layout = Layout({**({"L": stages} if stages else {}), **layout.entries})
    return mesh, layout


def placements() -> st.SearchStrategy[tuple[Mesh, Layout]]:
    return st.one_of(named(), any_layout())
