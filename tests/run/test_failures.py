"""What fails in generated code names the op and the user's line, on every executor,
wherever the line came from."""
from __future__ import annotations

import re
from builtins import compile as compile_text
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    cond,
    einsum,
    init,
    local,
    lower,
    param,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.distributed.rank_error import RankError
from shardlib.functions import mean, silu, sum
from shardlib.language.moves import ALL_REDUCE
from shardlib.language.reductions import SUM
from shardlib.lowering.emit import Emitter
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, loss, next_logits
from shardlib.program import Op, Step, Where
from shardlib.run.failures import explain_failure
from shardlib.spec import parse

SIZES = dict(B=4, D=6, F=5, L=3)


class Layer(Params):
    up: Tensor = param("D F");  gate: Tensor = param("D F");  down: Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    up = einsum("B D, D F -> B F", x, w.up)
    gate = einsum("B D, D F -> B F", x, w.gate)
    return x + einsum("B F, F D -> B D", silu(gate) * up, w.down)       # LAYER


@sharded("B D, * -> B D")
def straight(x, w: Layer):
    up = einsum("B D, D F -> B F", x, w.up)
    return einsum("B F, F D -> B D", silu(up), w.down)                  # STRAIGHT


@sharded("B D, * -> B D")
def scanned(x, w: Net):
    return scan(layer, x, w.layers)


@sharded("B D -> B D")
def squashed(x):
    return silu(x)                                                      # BRANCH


@sharded("B D -> B D")
def kept(x):
    return x * 1.0


@sharded("B D -> B D")
def chosen(x):
    return cond(sum("B D -> ()", x * 0.0) + 1.0, squashed, kept, x)


@sharded("B D, * -> ()")
def total(x, w: Net):
    return mean("B D -> ()", scan(layer, x, w.layers))


def line(mark: str) -> str:
    with open(__file__) as file:
        line = next(n for n, text in enumerate(file, 1) if text.rstrip().endswith("# " + mark))
        return f"test_failures.py:{line}"


RUNS: dict[str, Callable] = {
    "compile": lambda f, *args: compile(f, mesh=Mesh(dp=1))(*args),
    "step": lambda f, *args: step(f, mesh=Mesh(dp=1))(*args),
    "simulate": lambda f, *args: simulate(f, Layout(B="dp", F="tp"), *args, mesh=Mesh(dp=2, tp=2)),
    "call": lambda f, *args: f(*args)}


def failing(monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: BaseException,
            after: int = 0) -> None:
    """The function of torch works `after` times, then raises."""
    real, calls = getattr(where, name), []

    def fail(*args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(where, name, fail)


def argument(f: object) -> list:
    w = {straight: Layer, scanned: Net, total: Net}.get(getattr(f, "f", f))
    return [torch.randn(4, 6), *([init(w, SIZES)] if w else [])]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("f, mark, after", [(straight, "STRAIGHT", 0), (scanned, "LAYER", 0),
                                            (scanned, "LAYER", 2), (chosen, "BRANCH", 0)])
def test_torch_s_error_is_said_with_the_op_and_the_user_s_line(monkeypatch, run, f, mark, after):
    args = argument(f)
    failing(monkeypatch, F, "silu", cause := RuntimeError("no such kernel\nC++ trace"), after)
    with pytest.raises(SpecError) as error:
        RUNS[run](f, *args)
    assert str(error.value) == f"silu: no such kernel          {line(mark)}"
    assert error.value.__cause__ is cause


def test_a_line_of_backward_is_that_of_its_op(monkeypatch):
    args = argument(total)
    failing(monkeypatch, torch.ops.aten, "silu_backward", NotImplementedError())
    for run in ("compile", "simulate"):
        with pytest.raises(SpecError) as error:
            RUNS[run](value_and_grad(total), *args)
        assert str(error.value) == f"silu_vjp: NotImplementedError          {line('LAYER')}"


def test_a_packed_line_is_that_of_its_first_op(monkeypatch):
    x, w = argument(scanned)
    run = compile(scanned, mesh=Mesh(dp=1))
    prepared = run.prepare("w", w)
    failing(monkeypatch, torch, "matmul", RuntimeError("out of luck"))
    with pytest.raises(SpecError) as error:
        run(x, prepared)
    first = int(line("LAYER").split(":")[1]) - 2
    assert str(error.value) == f"einsum: out of luck          test_failures.py:{first}"


@sharded("B D, * -> B D")
def twice(x, w: Layer):
    y = silu(x)                                                         # ONCE
    return silu(y)                                                      # AGAIN


def test_a_step_that_is_made_once_fails_on_the_line_that_runs(monkeypatch):
    failing(monkeypatch, F, "silu", RuntimeError("late"), 1)
    with pytest.raises(SpecError) as error:
        step(twice, mesh=Mesh(dp=1))(*argument(straight))
    assert str(error.value) == f"silu: late          {line('AGAIN')}"


def short(x):
    return x[:1] if x[0, 0] < 0 else -x


@sharded("B D -> B D")
def shortened(x):
    y = local("B D -> B D", short, x)
    return local("B D -> B D", short, y)                                # SHORT


def test_a_result_that_is_refused_is_that_of_the_line_that_runs():
    """Step by step too, where the second call is as the first and its code is not made anew."""
    for run in (step, compile):
        with pytest.raises(SpecError) as error:
            run(shortened, mesh=Mesh(dp=1))(torch.ones(4, 6))
        assert str(error.value) == (
            f"local: short returns (1, 6), its text says (4, 6) on this rank          {line('SHORT')}")


class Stopped(Exception):
    """An exception of the user's own."""


def stops(x):
    raise Stopped("enough")


@sharded("B D -> B D")
def stopped(x):
    return local("B D -> B D", stops, x)                                # LOCAL


def tripled(x):
    return 3 * x


@sharded("B D -> B D")
def within(x):
    return local("B D -> B D", tripled, x) + x


@pytest.mark.parametrize("run", RUNS)
def test_errors_that_are_caught_by_their_class_keep_it(monkeypatch, run):
    with pytest.raises(Stopped) as error:
        RUNS[run](stopped, torch.ones(4, 6))
    assert str(error.value) == "enough" and error.value.__notes__ == [f"in local at {line('LOCAL')}"]
    args = argument(straight)
    for cause in (torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError("")):
        with monkeypatch.context() as patch, pytest.raises(type(cause)) as error:
            failing(patch, F, "silu", cause)
            RUNS[run](straight, *args)
        assert error.value is cause and cause.__notes__ == [f"in silu at {line('STRAIGHT')}"]
    for cause in (KeyboardInterrupt(), RankError("silu: rank 1 has left")):
        with monkeypatch.context() as patch, pytest.raises(type(cause)) as error:
            failing(patch, F, "silu", cause)
            RUNS[run](straight, *args)
        assert error.value is cause and not hasattr(cause, "__notes__")


CONFIG = LlamaConfig(vocab_size=11, d_model=8, num_layers=3, num_kv_heads=2, queries_per_kv=2, head_dim=4,
                     d_ff=12, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True, max_context=16)


@pytest.mark.parametrize("f", [next_logits, loss, value_and_grad(loss)],
                         ids=["next_logits", "loss", "gradients"])
def test_every_line_is_of_the_step_that_asked_for_it(f):
    """A collective's line names its step itself."""
    mesh = Mesh(dp=2, tp=2)
    program = lower(f, named_layout("tp+sp+fsdp", mesh), mesh=mesh, config=CONFIG)
    e = Emitter(mesh, 0, {**CONFIG.sizes, "B": 4, "T": 4, "S": 8})
    source = e.program(program).splitlines()
    assert len(e.lines) == len(source)
    said = [(step, e.plan[name]) for text, step in zip(source, e.lines)
            for name in re.findall(r"at=(s\d+)\)", text)]
    assert len(said) == len(e.plan) > 8
    for one, planned in said:
        assert (str(one.where), one.text) == (planned.where, planned.text)
    of_none = [text for text, step in zip(source, e.lines) if step is None]
    assert [text for text in of_none if not text.endswith(".clone()")] == [source[0], source[-1]]


def test_a_compiled_function_can_be_traced_whole():
    """torch.compile passes through the call, a function in `local` included."""
    x = torch.randn(4, 6)
    for f in (squashed, within):
        run = compile(f, mesh=Mesh(dp=1))
        want = run(x)
        assert torch.equal(torch.compile(lambda x: run(x), fullgraph=True, backend="eager")(x), want)


@pytest.mark.parametrize("op", (ALL_REDUCE, SUM), ids=lambda op: op.name)
def test_what_a_collective_raises_passes_as_it_is(op: Op) -> None:
    """It names its step itself; an op of this rank does not."""
    step_ = Step(op, (parse("D +tp"),), (parse("D"),), ("x",), ("y",), where=Where("model.py", 3))
    code = compile_text("fail()", "<shardlib failing>", "exec")

    def fail() -> None:
        raise RuntimeError("peers are gone")
    with pytest.raises(RuntimeError) as raised:
        exec(code, {"fail": fail})
    lines = {"<shardlib failing>": (step_,)}
    if op is ALL_REDUCE:
        assert explain_failure(raised.value, lines) is None
        return
    with pytest.raises(SpecError) as said:
        explain_failure(raised.value, lines)
    assert str(said.value) == "sum: peers are gone          model.py:3"
