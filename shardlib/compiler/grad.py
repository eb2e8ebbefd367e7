"""Backward as a program, transposed from the explicit forward one and typed by the same rules.

A move is the identity on what its value denotes, so it needs no derivative: the cotangents of a value and of
all it was converted to are added up at the value itself, and the sum is converted to the type that is wanted
there, split like the value and owing nothing, in its dtype. That one law makes all_gather and reduce_scatter
each other's backward, leaves a cotangent that is already settled alone, and brings every gradient home in its
parameter's own spec. A value that was gathered is gathered again (`regather`), so that backward keeps no
whole copy of what is split.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardlib.compiler.builder import Builder
from shardlib.dtypes import FLOATS, holds, inner_dtypes, step_dtypes, value_dtypes
from shardlib.errors import SpecError
from shardlib.language.arithmetic import ADD
from shardlib.language.held import as_held, held
from shardlib.language.rearrange import REARRANGE, RENAME
from shardlib.language.reductions import SUM
from shardlib.language.scan import SCAN
from shardlib.language.trace import fresh
from shardlib.mesh import Mesh
from shardlib.program import Op, Program, Result, Scan, Step
from shardlib.rules import Rule, natural
from shardlib.spec import Dim, Owed, Spec
from shardlib.tree import Struct, leaves

ONES_LIKE = Op("ones_like", rule=lambda s: Rule(shapes=(0,)), infer=lambda ins, attrs: (ins[0].owing(),),
               index=(0,), takes=("any",), emit=lambda e, s, a: f"torch.ones_like({a[0]})",
               reference=lambda d, x: x.new_ones(()))
ZEROS_LIKE = Op("zeros_like", rule=lambda s: Rule(shapes=(0,)), infer=lambda ins, attrs: (ins[0].owing(),),
                index=(0,), takes=("any",), emit=lambda e, s, a: f"torch.zeros_like({a[0]})",
                reference=lambda d, x: x.new_zeros(()))
TABLE = {"ones_like": ONES_LIKE, "zeros_like": ZEROS_LIKE}
REGATHER = ("all", "weights", "nothing")


def value_and_grad_program(program: Program, wrt: Sequence[str], mesh: Mesh, regather: str = "all",
                           dtypes: Mapping[str, str] | None = None, late: Sequence[str] = (),
                           has_aux: bool = False, remat: Sequence[str] = ()) -> Program:
    """The explicit program that returns the scalar of `program`, what else it returns where it `has_aux`,
    then its gradients by the arguments `wrt`, in that order, each in its spec.

    regather: what backward gathers again rather than keep: "all", "weights" (activations are kept gathered),
    "nothing".
    dtypes: of the arguments; where they differ, cotangents are cast to their values'.
    late: axes over which no layer's gradient is summed by itself, but all at once, at the end.
    remat: scans whose bodies, by name, run again in backward, which keeps their carries alone.
    """
    if regather not in REGATHER:
        raise SpecError(f"value_and_grad: regather is {regather!r}; it is one of {', '.join(REGATHER)}")
    if program.results[0].tree != Spec() or len(program.results) > 1 and not has_aux:
        raise SpecError(f"value_and_grad: {program.name} returns "
                        f"{', '.join(str(s) for _, s in program.result_leaves())}; it must return "
                        f"{'a scalar, (), first' if has_aux else 'one scalar, ()'}").at(program.where)
    steps = (s for p in (program, *program.bodies()) for s in p.steps)
    scanned = dict.fromkeys(s.body.name for s in steps if s.op is SCAN)
    if strange := next((name for name in remat if name not in scanned), None):
        raise SpecError(f"value_and_grad: remat names {strange}, which is no body of a scan of "
                        f"{program.name}; these are {', '.join(scanned) or 'none'}").at(program.where)
    trees, indices = dict(program.args), value_dtypes(program, {}, None)
    active = {path for n in wrt for path, _ in leaves(n, trees[n])}
    if path := next((path for n in wrt for path, _ in leaves(n, trees[n]) if indices[path]), None):
        raise SpecError(f"value_and_grad: {program.name} takes indices in {path}; there is no gradient by "
                        "them").at(program.where)
    (loss,), aux = program.results[0].values, program.results[1:]
    params = {path for n, tree in program.args if isinstance(tree, Struct) for path, _ in leaves(n, tree)}
    back = _Backward(program, active, mesh, regather, params, value_dtypes(program, dtypes or {}, None),
                     late, remat)
    back.contribute(loss, back.call(ONES_LIKE, [loss]))
    back.run()
    results = [Result(trees[name], tuple(back.total(path) for path, _ in leaves(name, trees[name])))
               for name in wrt]
    return Program(f"{program.name}_and_grad", program.args, (*back.forward, *back.steps),
                   (Result(Spec(), (loss,)), *aux, *results), True, program.where)


class _Backward(Builder):
    """The backward steps of one body.

    `forward` is its forward steps, scans made to keep what backward needs.
    """

    def __init__(self, program: Program, active: set[str], mesh: Mesh, regather: str, params: set[str],
                 dtypes: dict[str, str | None], late: Sequence[str] = (), remat: Sequence[str] = ()) -> None:
        super().__init__(mesh, program.names())
        self.dtypes, self.late, self.remat = dtypes, late, remat
        self.program, self.regather, self.params = program, regather, params
        self.types.update(program.types())
        self.forward = list(program.steps)
        self.root: dict[str, str] = {}
        self.given: dict[str, list[str]] = {}
        self.active = set(active)
        self.anew: dict[str, Step] = {}             # constants of the body of a scan: no layer's is kept
        for step in program.steps:
            if step.op.moves:
                root = self.root[step.outputs[0]] = self.root.get(step.inputs[0], step.inputs[0])
                if self.types[root].owed:       # what is settled is kept, as `available` has it
                    self.source[step.outputs[0]] = root
                    self._converted[root, step.outs[0]] = step.outputs[0]
            self._refuse_tables(step)
            if (not step.op.constant
                and any(i in self.active for j, i in enumerate(step.inputs) if j not in step.op.index)):
                self.active.update(step.outputs)

    def add(self, op: Op, inputs: Sequence[str], outs: Sequence[Spec], *args: Any,
            **more: Any) -> tuple[str, ...]:
        made = super().add(op, inputs, outs, *args, **more)
        self.dtypes.update(zip(made, step_dtypes(self.steps[-1], [self.dtypes[i] for i in inputs])))
        return made

    def contribute(self, name: str, cotangent: str) -> None:
        """Add a cotangent of `name`, whatever its type:
        it denotes the same for all that `name` was converted from."""
        self.given.setdefault(self.root.get(name, name), []).append(cotangent)

    def total(self, name: str, settle: bool = True, late: bool = False) -> str:
        """The whole cotangent of a root value, split as the value is and owing nothing;
        without `settle` it may owe, and with `late` what is summed at the end."""
        want = held(self.types[name])
        by_type: dict[Spec, list[str]] = {}
        for given in self.given.pop(name, ()):
            by_type.setdefault(self.types[given], []).append(given)
        if late:
            want = want.owing(*want.owed, *self._at_the_end(want, [*by_type]))
        sums = []
        for group in by_type.values():
            total = group[0]
            for other in group[1:]:
                total = self.call(ADD, [total, other])
            if settle or len(by_type) > 1:
                total = self.move(total, want, f"the gradient of {name}")
            sums.append(total)
        if not sums:
            return self.call(ZEROS_LIKE, [name])
        total = sums[0]
        for other in sums[1:]:
            total = self.call(ADD, [total, other])
        return total

    def _at_the_end(self, want: Spec, kinds: Sequence[Spec]) -> list[Owed]:
        """What all of `kinds` owe that no dim of `want` takes up; nothing, unless some of it is late."""
        owed = [o for o in kinds[0].owed if o.kind == "+" and o.axis not in want.split_axes
                and all(o in kind.owed for kind in kinds)] if kinds else []
        return owed if any(o.axis in self.late for o in owed) else []

    def run(self) -> None:
        for index, step in reversed(list(enumerate(self.program.steps))):
            self.where = step.where
            self.called.update((i, word) for i, word in zip(step.inputs, step.said) if word)
            if step.op.moves or not any(o in self.given for o in step.outputs):
                continue
            if step.op is SCAN:
                self.forward[index] = self._scan(step)
                continue
            if not any(i in self.active for j, i in enumerate(step.inputs) if j not in step.op.index):
                continue
            if step.bodies:
                self._again(step)
                continue
            if step.op.vjp is None:
                if step.op.constant:
                    continue
                raise SpecError(f"value_and_grad: {step.op.name} has no derivative; stop_gradient makes its "
                                "operand a constant").at(step.where)
            cotangents = [self.total(o, settle=step.op not in (RENAME, REARRANGE)) for o in step.outputs]
            vjp, step = step.op.vjp, self._keeping_more(step)
            self.forward[index] = step
            here = step.having(inputs=tuple(self.available(i) for i in step.inputs),
                               outputs=tuple(self.available(o) for o in step.outputs))
            for name, ct in zip(step.inputs, vjp(self, here, cotangents)):
                if ct is not None and name in self.active:
                    self._contribute_like(name, ct)

    def _keeping_more(self, step: Step) -> Step:
        """The step as its op `keeps` what its derivative takes."""
        if step.op.keeps is None:
            return step
        op, more = step.op.keeps(step)
        step = replace(step, op=op, outs=(*step.outs, *more))
        outs = natural(op.name, op.rule(step), step.ins, step.outs)
        names = tuple(self._fresh(f"{step.outputs[0]}_kept") for _ in more)
        step = replace(step, outs=outs, outputs=(*step.outputs, *names))
        self.types.update(zip(step.outputs, outs))
        self.dtypes.update(zip(step.outputs, step_dtypes(step, [self.dtypes[i] for i in step.inputs])))
        return step

    def _contribute_like(self, name: str, cotangent: str) -> None:
        """The same, in the dtype of `name`."""
        known = self.dtypes[cotangent] and self.dtypes[name]
        self.contribute(name, self.like(cotangent, name) if known else cotangent)

    def _refuse_tables(self, step: Step) -> None:
        """SpecError where a gradient is wanted by floats that the op takes as a constant,
        as `rope` does its table."""
        for j in step.op.index:
            if j < len(step.inputs) and step.inputs[j] in self.active and holds(step, j) == "float":
                who = step.said[j] if step.said and step.said[j] else step.inputs[j]
                raise SpecError(f"value_and_grad: {step.op.name} has no derivative by {who}; stop_gradient "
                                "makes it a constant").at(step.where)

    def available(self, name: str) -> str:
        """`name` as backward has it: kept, or converted again from what it was converted from."""
        if name in self.anew:
            step = self.anew[name]
            if (name, step.outs[0]) not in self._converted:
                (self._converted[name, step.outs[0]],) = self.add(step.op, [], step.outs, attrs=step.attrs)
            return self._converted[name, step.outs[0]]
        root = self.root.get(name, name)
        again = self.regather == "all" or self.regather == "weights" and root in self.params
        return (self.move(root, self.types[name], "gathered again for backward")
                if root != name and again and not self.types[root].owed else name)

    # -- fused steps and conds ------------------------------------------------------------------------------

    def _again(self, step: Step) -> None:
        """Backward through a fused step or a cond: a step of its kind, each of whose bodies runs the forward
        one again and then backward through it, so that nothing but operands is kept. What its results owe is
        settled outside, as after any step, unless one branch of a cond owes what the other does not."""
        cotangents = {i: self.total(out) for i, out in enumerate(step.outputs) if out in self.given}
        paths = [[path for path, _ in step.passed(body)] for body in step.bodies]
        inners, seeds = zip(*(self._seeded(step, body, cotangents) for body in step.bodies))
        places = [i for i, (_, value) in enumerate(step.passed(step.body)) if self._turns(value)
                  and any(inner.given.get(of[i]) for inner, of in zip(inners, paths))]
        made = [[inner.total(of[i], settle=False) for i in places] for inner, of in zip(inners, paths)]
        if not places:
            return
        for k in range(len(places)):
            if len({inner.types[names[k]] for inner, names in zip(inners, made)}) > 1:
                for inner, of, names in zip(inners, paths, made):
                    names[k] = inner.move(names[k], held(inner.types[of[places[k]]]), "as the other branch")
        steps = [_needed((*inner.forward, *inner.steps), names) for inner, names in zip(inners, made)]
        used = [{*names, *(i for s in those for i in s.inputs)} for names, those in zip(made, steps)]
        taken = [j for j in range(len(step.body.args)) if any(
            path in names for body, names in zip(step.bodies, used) for path, _ in leaves(*body.args[j]))]
        sown = [k for k in range(len(cotangents)) if any(s[k] in names for s, names in zip(seeds, used))]
        backward = [Program(f"{body.name}_vjp", (*(body.args[j] for j in taken),
                                                 *((own[k], inner.types[own[k]]) for k in sown)), those,
                            tuple(Result(inner.types[name], (name,)) for name in names), True)
                    for body, inner, own, those, names in zip(step.bodies, inners, seeds, steps, made)]
        outer, values = dict(step.passed(step.body)), list(cotangents.values())
        inputs = [*step.inputs[:len(step.inputs) - len(outer)],
                  *(outer[path] for j in taken for path, _ in leaves(*step.body.args[j]))]
        grads = self.add(step.op, [*map(self.available, inputs), *(values[k] for k in sown)],
                         [inners[0].types[name] for name in made[0]], body=backward[0],
                         orelse=backward[1] if len(backward) > 1 else None)
        for i, grad in zip(places, grads):
            self._contribute_like(outer[paths[0][i]], grad)

    def _seeded(self, step: Step, body: Program,
                cotangents: Mapping[int, str]) -> tuple[_Backward, list[str]]:
        """The backward of a body, run, and the arguments by which the cotangents of its results come in."""
        active = {path for path, value in step.passed(body) if value in self.active}
        inner = _Backward(body, active, self.mesh, "nothing", set(), inner_dtypes(step, body, self.dtypes),
                          remat=self.remat)
        seeds = []
        for i, cotangent in cotangents.items():
            seeds.append(inner.declare(inner._fresh("g"), self.types[cotangent]))
            inner.dtypes[seeds[-1]] = self.dtypes[cotangent]
            inner.contribute(body.result_leaves()[i][0], seeds[-1])
        inner.run()
        return inner, seeds

    def _turns(self, value: str) -> bool:
        """Whether a value is to have a gradient, and may: integers and masks have none."""
        return value in self.active and self.dtypes[value] in (None, *FLOATS)

    # -- scan ------------------------------------------------------------------------------------------------

    def _scan(self, step: Step) -> Step:
        """Backward through a scan: a scan in reverse over the same slices and what the forward one kept.

        Returns the latter.
        """
        body, parts, outer = step.body, Scan.of(step), dict(step.passed(step.body))
        inner, turned, sown = self._inside(step, parts)
        inner.run()
        carries = [inner.move(inner.total(path), held(inner.types[path])) for path in turned]
        slices, constants = ([path for path, _ in pairs] for pairs in (parts.stacked, parts.constants))
        grads = {path: inner.total(path, late=True) for path in (*slices, *constants) if path in inner.active}
        seeds, steps = [seed for seed, _ in sown], tuple(inner.steps)
        if body.name in self.remat:
            steps = _needed((*inner.forward, *steps), (*carries, *grads.values()))
            inner.forward = [*body.steps]
        kept = _kept(steps, (*seeds, *slices, *constants))
        forward, made = self._keeping(step, inner, kept)
        backward = Program(
            f"{body.name}_vjp",
            (*((seed, inner.types[seed]) for seed in seeds), *(a for a in body.args if _is_among(a, slices)),
             *((k, inner.types[k]) for k in kept), *(a for a in body.args if _is_among(a, constants))),
            steps, tuple(Result(inner.types[name], (name,)) for name in (*carries, *grads.values())), True)
        dim = self.types[outer[slices[0]]].dims[0]
        inputs = [*(self.total(value) for _, value in sown), *(outer[p] for p in slices), *made,
                  *(outer[p] for p in constants)]
        before = {path: self.types[value] for path, value in parts.carries}    # of stages: where they come in
        outs = [*(as_held(inner.types[name], before[path]) for path, name in zip(turned, carries)),
                *_stacked(dim, [inner.types[name] for name in grads.values()])]
        names = [self._fresh(name) for name in (*["g"] * len(turned), *(f"d_{path}" for path in grads))]
        stacked = len(sown) - len(turned) + len(slices) + len(made)
        attrs = Scan.attrs(dim.label, stacked, len(turned), True, parts.stages)
        given = self.add(SCAN, inputs, outs, names, attrs=attrs, body=backward)
        for path, name in zip((*turned, *grads), given):
            if path in constants:
                name = self.call(SUM, [name], outs=(Spec(self.types[name].dims[1:]),))
            if outer[path] in self.active:
                self.contribute(outer[path], name)
        return forward

    def _inside(self, step: Step, parts: Scan) -> tuple[_Backward, list[str], list[tuple[str, str]]]:
        """The backward of the body; the carries that have a cotangent, those of floats; and where cotangents
        come in, those of the carries after the last round and then of what is stacked: (argument, value)."""
        turned = {path: pair for (path, before), pair in zip(parts.carries, parts.carried)
                  if self.dtypes[before] in (None, *FLOATS)}
        active = {path for path, value in step.passed(step.body) if value in self.active} | {*turned}
        params = {path for path, value in step.passed(step.body)
                  if self.root.get(value, value) in self.params}
        again = step.body.name in self.remat
        inner = _Backward(step.body, active, self.mesh, "nothing" if again else self.regather, params,
                          inner_dtypes(step, step.body, self.dtypes), self.late, self.remat)
        inner.anew = {} if again else {s.outputs[0]: s for s in step.body.steps if not s.inputs}
        sown = []
        for result, value in (*turned.values(), *(p for p in parts.made if p[1] in self.given)):
            seed = inner.declare(inner._fresh("g"), held(inner.types[result]))
            inner.dtypes[seed] = inner.dtypes[result]
            inner.contribute(result, seed)
            sown.append((seed, value))
        return inner, [*turned], sown

    def _keeping(self, step: Step, inner: _Backward, kept: Sequence[str]) -> tuple[Step, tuple[str, ...]]:
        """The forward scan that also stacks the values `kept` of its body,
        and what these are called outside."""
        body, kinds = step.body, [inner.types[k] for k in kept]
        body = replace(body, steps=tuple(inner.forward),
                       results=(*body.results, *(Result(kind, (k,)) for k, kind in zip(kept, kinds))))
        made = tuple(self._fresh(f"{k}_kept") for k in kept)
        outs = _stacked(self.types[Scan.of(step).stacked[0][1]].dims[0], kinds)
        self.types.update(zip(made, outs))
        self.dtypes.update(zip(made, (inner.dtypes[k] for k in kept)))
        return replace(step, body=body, outputs=(*step.outputs, *made), outs=(*step.outs, *outs)), made

    def _fresh(self, base: str) -> str:
        return fresh(base.replace(".", "_"), self.taken)


def _needed(steps: Sequence[Step], results: Iterable[str]) -> tuple[Step, ...]:
    """The steps without those that no result needs."""
    needed, kept = {*results}, []
    for step in reversed(steps):
        if needed.intersection(step.outputs):
            needed.update(step.inputs)
            kept.append(step)
    return tuple(reversed(kept))


def _stacked(dim: Dim, kinds: Sequence[Spec]) -> list[Spec]:
    return [Spec((dim, *k.dims), k.owed) for k in kinds]


def _is_among(arg: tuple, paths: Sequence[str]) -> bool:
    """Whether an argument, a tensor or a pytree, has its leaves among `paths`."""
    return leaves(*arg)[0][0] in paths


def _kept(steps: Sequence[Step], given: Sequence[str]) -> list[str]:
    """The values of the forward body that `steps`, its backward, use and do not have: neither made nor
    `given`."""
    made = {o for s in steps for o in s.outputs}
    return list(dict.fromkeys(i for s in steps for i in s.inputs if i not in made and i not in given))
