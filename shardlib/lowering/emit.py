"""Lowering: from an explicit program to the plain Python that one rank runs.

The text holds only identifiers made here, literals, and names of torch; sizes and offsets of the rank are in
it as numbers. Collectives are calls on the group's coordinator, or, for the simulator, `yield`s of the same
request. Axes of size 1 are gone.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from shardlib.compiler.passes.pack import Packing, emit_packed, packings
from shardlib.compiler.passes.rewrite import use_counts
from shardlib.dtypes import inner_dtypes, read_dtypes, value_dtypes, widest
from shardlib.errors import SpecError
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.cond import COND
from shardlib.language.fused import FUSED
from shardlib.language.held import here, runs
from shardlib.language.moves import axes_of
from shardlib.language.scan import SCAN
from shardlib.lowering.answers import Answers
from shardlib.lowering.buffers import updated_arguments, updates_of, updates_of_fused
from shardlib.lowering.variables import reuse
from shardlib.program import Program, Scan, Step
from shardlib.spec import Spec

_VIEW = re.compile(r"\.view\([0-9, ]+\)$")
_MARK = re.compile(r"  # step (\d+)$")  # at the end of lines that are being written: which step they are of


class Emitter(Answers):
    """Writes one rank's code: see `Answers` for what it is given."""

    def program(self, program: Program) -> str:
        """The source of a module whose function `main` takes the program's argument leaves
        and returns its result leaves."""
        self.packs = packings(program, set(self.prepared), self.given)
        self.outermost = {id(step) for step in program.steps}
        args = self.arguments(program)
        names = {path: f"a{i}" for i, path in enumerate(args)}
        updated, uses = updated_arguments(program), use_counts(program)
        donated = {path for path, _ in program.arg_leaves() if path.split(".")[0] in self.donate}
        updated -= {path for path in updated - donated if path.split(".")[0] in self.prepared}
        lines = [f"{names[p]} = {names[p]}.clone()" for p in names if p in updated - donated and uses[p] == 1]
        self.kinds = value_dtypes(program, self.given)
        lines += self._block(program, names, donated | updated, {}, self.kinds)
        results = [names.get(n) or self.room(spec, self.kinds[n]) for n, spec in program.result_leaves()]
        argument = {variable: path for path, variable in names.items() if path in args}
        self.returned = tuple(argument.get(variable) for variable in results)
        lines = reuse([*lines, f"return ({', '.join(results)}{',' if len(results) == 1 else ''})"])
        if self.yields:
            lines.insert(0, "if False: yield")
        lines = [f"def main({', '.join(names[a] for a in args)}):", *_indented(lines)]
        marks = [_MARK.search(line) for line in lines]
        self.lines = tuple(self._written[int(mark[1])] if mark else None for mark in marks)
        return "\n".join(line[:mark.start()] if mark else line for line, mark in zip(lines, marks)) + "\n"

    def arguments(self, program: Program) -> list[str]:
        """What `main` takes, in order: leaves by path, packed weights by their packing's name."""
        packed = {path: group for group in self.packs for path in group.outer_paths}
        return list(dict.fromkeys(packed[p].name if p in packed else p for p, _ in program.arg_leaves()))

    def product(self, x: str, w: str, sizes: tuple[int, int, int], dtype: str,
                then: Step | None = None) -> str | None:
        kernel = self.kernels and self.kernels.product(*sizes, dtype, then)
        return f"{self._kernel(kernel)}({x}.reshape({sizes[0]}, {sizes[1]}), {w})" if kernel else None

    def _kernel(self, kernel: Callable) -> str:
        name = f"k{len(self.helpers)}"
        self.helpers[name] = kernel
        return name

    def variable(self) -> str:
        """A name that generated code has not used yet."""
        self.variables += 1
        return f"v{self.variables}"

    def read(self, variable: str, have: str, want: str) -> str:
        """`variable`, of dtype `have`, in the dtype `want`."""
        return variable if have == want else self.hoist(variable, f"{{x}}.to(torch.{want})")

    def _block(self, program: Program, names: dict[str, str], owned: set[str], packs: Mapping[str, Packing],
               dtypes: dict[str, Any]) -> list[str]:
        """The lines of a program's steps. `names`: value -> variable, gets what the steps make. `owned`:
        values whose buffers may be reused, where nothing else uses them. `packs`: packings of this body, by
        the name of the value that is the packed weight. `dtypes`: of the program's values."""
        outside, makers = self.dtypes, self.makers
        self.dtypes, self.makers = dtypes, {o: step for step in program.steps for o in step.outputs}
        group_of = {s.outputs[0]: (arg, group) for arg, group in packs.items() for s in group.steps}
        uses = use_counts(program)
        lines: list[str] = []
        for step in program.steps:
            if step.outputs[0] in names or not runs(step, self.coordinate):
                continue                    # a packing has made it already, or it is another stage's
            around, self._where = self._where, (program.name, step)
            if step.outputs[0] in group_of:
                arg, group = group_of[step.outputs[0]]
                made = emit_packed(self, group, program, names, names[arg], uses)
            elif step.op is SCAN:
                made = self._scan(step, names, owned, uses)
            elif step.op is COND:
                made = self._cond(step, names)
            elif step.op is FUSED:
                made = self._fused(step, names, program.name, owned, uses)
            else:
                made = self._line(step, names, owned, uses)
            self._where = around
            lines += self._marked(step, made)
        self.dtypes, self.makers = outside, makers
        return lines

    def _marked(self, step: Step | None, lines: Sequence[str]) -> list[str]:
        """The lines as those of `step`, but for those of the steps inside of it."""
        self._written.append(step)
        return [line if _MARK.search(line) else f"{line}  # step {len(self._written) - 1}" for line in lines]

    def _line(self, step: Step, names: dict[str, str], owned: set[str], uses: Mapping[str, int]) -> list[str]:
        self.in_place = {i for i in step.inputs if i in owned and uses[i] == 1}
        args = self._operands(step, [names.get(i) or self.room(spec, self.dtypes[i])
                                     for i, spec in zip(step.inputs, step.ins)])
        text = self._text(step, args)
        if not here(step.outs[0], self.coordinate):     # it is sent away
            return [text]
        if step.op in (CAST_LIKE, WIDEN) and text == args[0]:
            names[step.outputs[0]] = text           # it has that dtype already
            return []
        if step.op.updates is not None:
            owned.add(step.outputs[0])
        if len(step.outputs) == 1 and (view := _VIEW.search(text)) and uses.get(step.outputs[0], 0) == 1:
            variable = self.variable()
            names[step.outputs[0]] = variable + view.group()
            return [f"{variable} = {text[:view.start()]}"]
        for out in step.outputs:
            names[out] = self.variable()
        return [f"{', '.join(names[o] for o in step.outputs)} = {text}"]

    def _operands(self, step: Step, args: list[str]) -> list[str]:
        """The operands in the dtypes in which the op reads them,
        where torch would not read them so itself."""
        have = [self.dtypes[i] for i in step.inputs]
        want = read_dtypes(step, have)
        counting = [i for i in range(len(args)) if i not in step.op.index]
        if (step.op.promotes and all(step.ins[i].dims for i in counting)
            and widest(*(have[i] for i in counting)) == want[counting[0]]):
            return args
        return [self.read(*of) for of in zip(args, have, want)]

    def _text(self, step: Step, args: list[str]) -> str:
        """What the op says.

        SpecError where a size is not known, or the op cannot be called with these dims.
        """
        try:
            return step.op.emit(self, step, args)
        except SpecError as error:
            raise error.at(step.where) from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            unknown = next((n for s in (*step.ins, *step.outs) for n in s.names if n not in self.sizes), None)
            raise SpecError(f"{step.op.name}: no argument holds all of {unknown}; say its global size: "
                            f"sizes=dict({unknown}=...)" if unknown else
                            f'{step.op.name}: "{step.text}" is no call of it').at(step.where) from error

    def _cond(self, step: Step, names: dict[str, str]) -> list[str]:
        """A branch, each body in its place.

        Nothing of it is done before a loop around it: it may not be taken.
        """
        made = [self.variable() for _ in step.outputs]
        lines, around = [], (self.invariant, self._branch)
        self.invariant = frozenset()
        for head, body in zip((f"if bool({names[step.inputs[0]]}):", "else:"), step.bodies):
            inner = {path: names[value] for path, value in step.passed(body)}
            self._branch = (*around[1], f"{step.outputs[0]} {head}")
            block = self._block(body, inner, set(), {}, inner_dtypes(step, body, self.dtypes))
            block += [f"{v} = {inner[n]}" for v, (n, _) in zip(made, body.result_leaves())]
            lines += [head, *_indented(block or ["pass"])]
        self.invariant, self._branch = around
        names.update(zip(step.outputs, made))
        return lines

    def _fused(self, step: Step, names: dict[str, str], title: str, owned: set[str],
               uses: Mapping[str, int]) -> list[str]:
        """A kernel's call, at the step that communicates; or the body in its place:
        its steps are those of the program `title` around it. Buffers that results update are given up."""
        (body,) = step.bodies
        updates, outer = updates_of_fused(step), dict(step.passed(body))
        free = {v for path in updates.values() if (v := outer[path]) in owned and uses[v] == 1}
        owned |= {*updates}
        like = [torch.empty(self.shape(spec), dtype=getattr(torch, self.dtypes[n]), device="meta")
                for spec, n in zip(step.ins, step.inputs)] if self.kernels else []
        if self.kernels and (kernel := self.kernels(step, like)) is not None:
            wire = next((s for s in body.steps
                         if s.op.wire and self.mesh.size(axes_of(s, self.mesh)) > 1), None)
            self._where = wire and (title, wire)
            inner = [replace(s, inputs=tuple(outer.get(i, i) for i in s.inputs)) for s in body.steps]
            looks = {s.op.looks(self, s, [names.get(i, i) for i in s.inputs]): None
                     for s in inner if s.op.looks}
            kept = {outer[path] for path in updates.values()} - free
            args = [f"{names[i]}.clone()" if i in kept else names[i] for i in step.inputs]
            text = f"{self._kernel(kernel)}({', '.join(args)}{self._here()})"
            names.update((out, self.variable()) for out in step.outputs)
            return [*(look for look in looks if not look.isidentifier()),
                    f"{', '.join(names[out] for out in step.outputs)} = {text}"]
        body = self.kernels.body(step) if self.kernels else body
        given, own = {p: names[v] for p, v in outer.items()}, {p for p, v in outer.items() if v in free}
        dtypes = inner_dtypes(step, body, self.dtypes)
        lines = self._block(replace(body, name=title), given, own, {}, dtypes)
        names.update((out, given[n]) for out, (n, _) in zip(step.outputs, body.result_leaves()))
        return lines

    def _scan(self, step: Step, names: dict[str, str], owned: set[str], uses: Mapping[str, int]) -> list[str]:
        """A loop over the layers.

        A stacked cache that the body updates and returns in its place is updated in place.
        """
        body, parts = step.body, Scan.of(step)
        layered = self.layered if id(step) in self.outermost else ()
        outer, slices = dict(step.passed(body)), [path for path, _ in parts.stacked]
        kept = {made: path for made, _ in parts.made if (path := updates_of(body, made)) in slices
                and outer[path] in owned and uses[outer[path]] == 1}
        packs = {group.name: group for group in self.packs if group.scan == step.outputs[0]}
        outer |= {name: name for name in packs}
        absorbed = {p for group in packs.values() for p in group.inner_paths}
        stacked = [*packs, *(p for p in slices if p not in absorbed)]
        constants = {path: names[value] for path, value in parts.constants}
        inner = {**{path: self.variable() for path, _ in parts.carries},
                 **{p: self.variable() for p in stacked}, **constants}
        carries, targets = [inner[path] for path, _ in parts.carries], [inner[p] for p in stacked]
        around = self.invariant, self.hoisted
        self.invariant, self.hoisted = frozenset(constants.values()), {}
        dtypes = inner_dtypes(step, body, self.dtypes)
        block = self._block(body, inner, set(kept.values()), packs, dtypes)
        hoisted, (self.invariant, self.hoisted) = self.hoisted, around
        lines = [line for (variable, template), made in hoisted.items() for line in self._marked(
            self._hoisting[made], [f"{made} = {self.hoist(variable, template, made.count(',') + 1)}"])]
        layers = self.rows(step.ins[len(carries)].dims[0])[1]
        lines = lines if layers else []  # without layers nothing is looked up, or refused
        lists = {made: self.variable() for made, _ in parts.made if made not in kept}
        block += [f"{made}.append({inner[out]})" for out, made in lists.items()]
        if carries:
            block += [f"{', '.join(carries)} = {', '.join(inner[out] for out, _ in parts.carried)}"]
        reverse = "[::-1]" if parts.reverse else ""
        rows = [names[outer[p]] + ("" if outer[p] in layered or outer[p].split(".")[0] in self.prepared
                                   else ".unbind(0)") + reverse for p in stacked]
        before, after = self._ends(step, parts)
        lines += [*(f"{carry} = {before and before(i) or names[value]}"
                    for i, (carry, (_, value)) in enumerate(zip(carries, parts.carries))),
                  *(f"{made} = []" for made in lists.values()),
                  f"for {', '.join(targets)}, in zip({', '.join(rows)}):", *_indented(block)]
        if after:
            lines += [after(carry) for carry in carries]
        else:
            names.update(zip((value for _, value in parts.carried), carries))
        types = body.types()
        for out, made in parts.made:
            if out in kept:
                names[made] = names[outer[kept[out]]]
                owned.add(made)
                continue
            if made in layered:
                lines += [f"{lists[out]}.reverse()"] if reverse else []
            elif lists[out] not in names.values():      # a body may return a value twice
                rows_of = Spec((step.ins[len(carries)].dims[0], *types[out].dims))
                lines.append(f"{lists[out]} = " + (f"torch.stack({lists[out]}{reverse})" if layers else
                                                   self.room(rows_of, dtypes[out])))
            names[made] = lists[out]
        return lines

    def _ends(self, step: Step, parts: Scan) -> tuple[Callable | None, Callable | None]:
        """Of a stage of a pipeline: the code of its carries, by number, as the stage before sends them, and
        what sends one on to the stage after. None at the ends, where the carries are the program's."""
        if not parts.stages:
            return None, None
        (axis,) = step.ins[len(parts.carries)].dims[0].axes
        turn, here = (-1 if parts.reverse else 1), self.coordinate[axis]
        back, on = here - turn, here + turn

        def before(i: int) -> str:
            return self.recv(axis, back, here, self.shape(step.ins[i]), self.dtypes[step.inputs[i]])

        def after(carry: str) -> str:
            return self.send(axis, here, on, carry)
        return (before if 0 <= back < parts.stages else None), (after if 0 <= on < parts.stages else None)


def _indented(lines: Sequence[str]) -> list[str]:
    return ["    " + line for line in lines]
