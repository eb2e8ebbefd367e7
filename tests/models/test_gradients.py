"""Gradients of the Llama's loss on any mesh: those of autograd in fp64,
with the collectives that Megatron makes."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import llama_reference as reference
import pytest
import torch
from here import HELPERS
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ranks
from simulated import Ran, configs, placements, run, tree

from shardlib import Layout, Mesh, lower, simulate
from shardlib.api import value_and_grad
from shardlib.language.held import here
from shardlib.language.moves import COLLECTIVES
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, loss
from shardlib.params import leaf_values
from shardlib.program import leaves
from shardlib.schedules.folding import Fold
from shardlib.schedules.generators import one_f_one_b, zbv

pytestmark = pytest.mark.usefixtures("one_thread")

REGATHER = ("all", "weights", "nothing")


class Batch:
    """A drawn model and batch."""

    def __init__(self, config: LlamaConfig, rows: int, time: int, seed: int,
                 dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config, self.dtype = config, dtype
        self.weights = {path: t.to(dtype) for path, t in reference.random_weights(config, seed).items()}
        self.ids, self.labels = torch.randint(0, config.vocab_size, (2, rows, time), generator=generator)
        self.args = {"ids": self.ids, "labels": self.labels, "w": tree(self.weights, config),
                     "start": torch.zeros(rows, dtype=torch.int64)}
        self.sizes = dict(config.sizes, B=rows, T=time, S=time)

    def run(self, mesh: Mesh, layout: Layout, regather: str = "all") -> Ran:
        return run(value_and_grad(loss, regather=regather), layout, mesh, self.args, self.sizes,
                   config=self.config)

    def by_torch(self, dtype: torch.dtype, order: int = 0) -> dict[str, torch.Tensor]:
        return reference.gradients({path: t.to(dtype) for path, t in self.weights.items()}, self.ids,
                                   self.labels, self.config, order)


# a dozen tokens or more: the gradient of a single token that the model is sure of is a difference of near
# equals, all rounding
@settings(max_examples=settings.default.max_examples // 2)
@given(st.builds(Batch, configs(), st.integers(3, 5), st.integers(4, 7), st.integers(0, 1 << 20),
                 st.sampled_from((torch.float64, torch.float32))),
       placements(), st.sampled_from(REGATHER))
def test_gradients(batch: Batch, placement: tuple[Mesh, Layout], regather: str) -> None:
    ran = batch.run(*placement, regather)
    truth = batch.by_torch(torch.float64)

    def errors(dtype: torch.dtype, orders: int) -> list[float]:
        return [reference.gradients_error(batch.by_torch(dtype, order), truth) for order in range(orders)]
    found = dict(zip(batch.weights, ran.results[1:], strict=True))
    assert {t.dtype for t in found.values()} == {batch.dtype}
    assert reference.is_as_good(reference.gradients_error(found, truth), errors, batch.dtype)
    assert leaves("w", ran.program.results[1].tree) == leaves("w", dict(ran.program.args)["w"])


@settings(max_examples=settings.default.max_examples // 4)
@given(st.builds(Batch, configs(), st.just(4), st.just(6), st.integers(0, 1 << 20)))
def test_the_reference_is_transformers(batch: Batch) -> None:
    """In fp32, transformers is as near to the reference in fp64 as that is in fp32."""
    weights, config, truth = ({path: t.float() for path, t in batch.weights.items()}, batch.config,
                              batch.by_torch(torch.float64))
    model = reference.to_transformers(weights, config)
    logits = model(batch.ids).logits
    exact = reference.logits(batch.weights, batch.ids, config)

    def of_logits(dtype: torch.dtype, orders: int) -> list[float]:
        return [reference.error(reference.logits(reference.shuffled(weights, order), batch.ids, config),
                                exact) for order in range(orders)]

    def of_gradients(dtype: torch.dtype, orders: int) -> list[float]:
        return [reference.gradients_error(batch.by_torch(dtype, order), truth) for order in range(orders)]
    assert reference.is_as_good(reference.error(logits.detach(), exact), of_logits, torch.float32)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    found = reference.from_transformers({name: p.grad for name, p in model.named_parameters()}, config)
    assert reference.is_as_good(reference.gradients_error(found, truth), of_gradients, torch.float32)


# -- what is kept, and what is gathered again ----------------------------------------------------------------

CONFIG = LlamaConfig(vocab_size=11, d_model=18, num_layers=2, num_kv_heads=3, queries_per_kv=2, head_dim=4,
                     d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True, max_context=64)


@pytest.mark.parametrize("mesh, layout", [("tp=2", "tp+sp"), ("dp=2", "fsdp"), ("cp=3", "cp"),
                                          ("dp=2,cp=2,tp=2", "tp+sp+fsdp+cp")])
def test_what_is_gathered_again_is_what_was_gathered(mesh: str, layout: str) -> None:
    """The policies differ in traffic and memory, and in no bit of the gradients."""
    batch, mesh = Batch(CONFIG, 3, 5, 0, torch.float32), Mesh.parse(mesh)
    everything, weights, nothing = (batch.run(mesh, named_layout(layout, mesh), regather)
                                    for regather in REGATHER)
    for other in (weights, nothing):
        for a, b in zip(everything.results, other.results, strict=True):
            assert torch.equal(a, b)
    assert len(everything.log) >= len(weights.log) >= len(nothing.log)


def collectives(mesh: str, layout: str, regather: str = "all",
                tied: bool = False) -> dict[str, dict[str, int]]:
    """Function -> collective -> how many steps of it, on a mesh."""
    config = LlamaConfig(**{**CONFIG.__dict__, "tied": tied})
    made = Mesh.parse(mesh)
    program = lower(value_and_grad(loss, regather=regather), named_layout(layout, made), None, None,
                    tree(reference.random_weights(config, 0), config), mesh=made, config=config)
    return {p.name: dict(sorted(Counter(s.op.name for s in p.steps if s.op in COLLECTIVES).items()))
            for p in [*program.bodies(), program]}


@pytest.mark.parametrize("regather", REGATHER)
def test_tensor_parallel_makes_the_collectives_of_megatron(regather: str) -> None:
    """Shoeybi et al. 2019: two all_reduces a layer in forward, two in backward. Around the layers: the
    embedding; in the loss the largest logit, the sum of exp and the label's logit; the loss's own gradient by
    the last activations."""
    assert collectives("tp=2", "tp", regather) == {"block": {"all_reduce": 2}, "block_vjp": {"all_reduce": 2},
                                                   "loss_and_grad": {"all_reduce": 5}}


def test_sequence_parallel_makes_the_collectives_of_megatron() -> None:
    """Korthikanti et al. 2022: two all_gathers and two reduce_scatters a layer each way; and one all_reduce
    for the weight of each of the two norms, whose rows are split. Megatron keeps no gathered activations, and
    gathers them again: two more."""
    forward, backward = ({"all_gather": 2, "reduce_scatter": 2},
                         {"all_gather": 2, "all_reduce": 2, "reduce_scatter": 2})
    for regather in ("weights", "nothing"):
        found = collectives("tp=2", "tp+sp", regather)
        assert (found["block"], found["block_vjp"]) == (forward, backward)
    found = collectives("tp=2", "tp+sp", "all")
    assert (found["block"], found["block_vjp"]) == (forward, {**backward, "all_gather": 4})


def test_data_parallel_makes_one_all_reduce_for_each_gradient() -> None:
    assert collectives("dp=2", "tp") == {"block": {}, "block_vjp": {"all_reduce": 9},
                                         "loss_and_grad": {"all_reduce": 4}}
    assert collectives("dp=2", "tp", tied=True)["loss_and_grad"] == {"all_reduce": 3}


def test_fsdp_gathers_each_weight_before_its_use_and_scatters_each_gradient() -> None:
    """The nine weights of a layer, and embed, norm and head: gathered in forward, again in backward (the
    embedding's own gradient needs no table), each gradient scattered once; and one all_reduce of the loss."""
    for regather in ("all", "weights"):
        assert collectives("dp=2", "fsdp", regather) == {
            "block": {"all_gather": 9}, "block_vjp": {"all_gather": 9, "reduce_scatter": 9},
            "loss_and_grad": {"all_gather": 5, "all_reduce": 1, "reduce_scatter": 3}}
    assert collectives("dp=2", "fsdp", "nothing") == {
        "block": {"all_gather": 9}, "block_vjp": {"reduce_scatter": 9},
        "loss_and_grad": {"all_gather": 3, "all_reduce": 1, "reduce_scatter": 3}}


def test_context_parallel_gathers_keys_and_values_and_scatters_their_gradients() -> None:
    found = collectives("cp=2", "cp", "nothing")
    assert (found["block"], found["block_vjp"]) == ({"all_gather": 2}, {"all_reduce": 9, "reduce_scatter": 2})


# -- real processes ------------------------------------------------------------------------------------------

def test_real_ranks_compute_what_the_simulator_does(tmp_path: Path) -> None:
    """Over gloo, bit for bit: two pieces have one sum, in whatever order. Stages have their own layers."""
    batch, mesh = Batch(CONFIG, 3, 5, 0, torch.float32), Mesh(x=2)
    layouts = ("K=x,F=x,V=x", "K=x,F=x,V=x,T=x", "B=x,D=x", "T=x", "B=x,K=x,F=x", "L=x")
    schedules = (one_f_one_b(2, 4), zbv(2, 3).cut(0, 0, 2, 0))
    torch.save({"mesh": str(mesh), "layouts": layouts, "schedules": list(map(str, schedules)),
                "config": CONFIG, "sizes": batch.sizes, "args": batch.args}, tmp_path / "job.pt")
    finished = ranks(2, [HELPERS / "gradients_worker.py", tmp_path])
    assert finished.returncode == 0, finished.stderr
    for rank in range(2):
        made = torch.load(tmp_path / f"rank{rank}.pt")
        for text in layouts:
            simulated = batch.run(mesh, Layout.parse(text))
            kinds = [kind for _, kind in simulated.program.result_leaves()]
            for found, held, kind in zip(made[text], simulated.held, kinds, strict=True):
                assert torch.equal(found, held[rank]) or not here(kind, mesh.coordinate(rank))
        value, grads = simulate(value_and_grad(loss), Layout(), *batch.args.values(), mesh=Mesh(),
                                config=CONFIG)
        for schedule in schedules:
            fold = Fold(schedule, Mesh(pp=2))
            program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), *batch.args.values(),
                            mesh=fold.mesh, schedule=schedule, config=CONFIG)
            for found, whole, (_, kind) in zip(made[str(schedule)], [value, *(g for _, g in leaf_values(
                    grads, ""))], program.result_leaves(), strict=True):
                if not (mine := fold.shard(whole, kind, fold.mesh.coordinate(rank))).is_meta:
                    torch.testing.assert_close(found, mine)
