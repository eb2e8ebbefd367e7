"""Reading one function of a printed program: its values by name, their types, its steps.

An explicit one is typed as it is read.
"""
from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from shardlib.compiler.parse_text import (
    Definitions,
    Tree,
    at_line,
    literal,
    name_of,
    not_printed,
    original,
    stacked_along,
)
from shardlib.errors import SpecError
from shardlib.language.arithmetic import BINARY, SCALE, SHIFT
from shardlib.language.calls import check_keywords
from shardlib.language.cond import COND
from shardlib.language.fused import FUSED
from shardlib.language.local import local_op, local_vjp_op
from shardlib.language.moves import RESHARD, check_move
from shardlib.language.rearrange import RENAME
from shardlib.language.scan import SCAN
from shardlib.mesh import MAX_RANKS
from shardlib.program import Op, Program, Result, Scan, Step
from shardlib.reference import check_operands
from shardlib.rules import natural
from shardlib.spec import Owed, Spec, nameable, parse_signature
from shardlib.tree import Struct, leaves

MAX_STEPS = 1_000_000       # steps, those of bodies counted wherever they are used
MAX_DEPTH = 16              # bodies within bodies
_SIGNS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
# by ops given what they do not take
_MISUSED = (LookupError, TypeError, ValueError, AttributeError, StopIteration, ArithmeticError)


class FunctionText:
    """One function under way: its values by name, their types, its steps."""

    def __init__(self, known: Definitions, node: ast.FunctionDef) -> None:
        self.known, self.node = known, node
        self.values: dict[str, Tree] = {}
        self.types: dict[str, Spec] = {}
        self.steps: list[Step] = []
        self.size = self.depth = 0

    def program(self) -> Program:
        node = self.node
        call = node.decorator_list[0] if len(node.decorator_list) == 1 else None
        if (not isinstance(call, ast.Call) or name_of(call.func) != "sharded" or len(call.args) != 1
            or node.returns):
            raise not_printed(node)
        if [(k.arg, name_of(k.value)) for k in call.keywords] not in ([], [("layout", "EXPLICIT")]):
            raise not_printed(call)
        self.explicit = bool(call.keywords)
        with at_line(call):
            ins, outs = parse_signature(literal(call.args[0]))
        args = self._arguments(node.args, ins)
        *steps, last = node.body
        for stmt in steps:
            if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1:
                raise not_printed(stmt)
            with at_line(stmt):
                self._assign(stmt.targets[0], stmt.value)
        if not isinstance(last, ast.Return):
            raise not_printed(last)
        items = ([] if last.value is None else last.value.elts if isinstance(last.value, ast.Tuple)
                 else [last.value])
        if len(items) != len(outs):
            raise not_printed(last)
        with at_line(last):
            results = tuple(self._result(i, s) for i, s in zip(items, outs))
        self.known.sizes[node.name], self.known.depths[node.name] = self.size, self.depth
        return Program(original(node.name), args, tuple(self.steps), results, self.explicit)

    def _arguments(self, given: ast.arguments, ins: Sequence[Spec | None]) -> tuple[tuple[str, Any], ...]:
        if (given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults
            or len(given.args) != len(ins)):
            raise not_printed(self.node)
        args = []
        for arg, spec in zip(given.args, ins):
            if (not nameable(arg.arg) or arg.arg in self.values or spec is not None
                and (arg.annotation or spec.ellipsis)):
                raise not_printed(arg)
            tree = spec if spec is not None else self.known.struct(arg.annotation)
            args.append((arg.arg, tree))
            flat = leaves(arg.arg, tree)
            self.values[arg.arg] = Tree(tree, tuple(n for n, _ in flat))
            self.types.update(flat)
        return tuple(args)

    def _result(self, node: ast.expr, spec: Spec | None) -> Result:
        value = self._value(node)
        if isinstance(value.tree, Struct) != (spec is None):
            raise not_printed(node)
        if spec is not None:
            self._same(self.types[value.names[0]], spec, node)
        return Result(value.tree if spec is None else spec, value.names)

    def _same(self, have: Spec, want: Spec, node: ast.AST) -> None:
        """SpecError unless a value of type `have` may stand where `want` is written."""
        if have != want if self.explicit else have.labels != want.labels:
            raise SpecError(f'this is no program: "{have}" stands where "{want}" is said, line '
                            f'{getattr(node, "lineno", "?")}')

    def _value(self, node: ast.expr) -> Tree:
        if isinstance(node, ast.Name) and node.id in self.values:
            return self.values[node.id]
        if isinstance(node, ast.Attribute):
            return self._value(node.value).field(node.attr, node)
        if not isinstance(node, ast.Call) or node.args:
            raise not_printed(node)
        struct = self.known.struct(node.func)
        parts = {k.arg: self._value(k.value) for k in node.keywords}
        declared = dict(struct.fields)
        if len(parts) != len(node.keywords) or any(n not in declared for n in parts):
            raise not_printed(node)
        fields = [(n, replace(parts[n].tree, stacked=d.stacked)
                   if isinstance(d, Struct) and isinstance(parts[n].tree, Struct) else parts[n].tree)
                  for n, d in declared.items() if n in parts]
        return Tree(Struct(struct.name, tuple(fields)),
                    tuple(x for n in declared if n in parts for x in parts[n].names))

    # -- steps -----------------------------------------------------------------------------------------------

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(value, ast.BinOp):
            return self._infix(target, value)
        if not isinstance(value, ast.Call):
            raise not_printed(value)
        name = name_of(value.func)
        if with_body := {"scan": self._scan, "cond": self._cond, "fused": self._fused}.get(name):
            return with_body(target, value)
        op = self.known.ops.get(name) or self._asserted(value)
        if op is None:
            raise SpecError(f"this is no program: unknown op {name!r}, line {value.lineno}")
        if op.takes_text and not value.args or any(k.arg is None for k in value.keywords):
            raise not_printed(value)
        attrs = tuple(sorted((k.arg, literal(k.value)) for k in value.keywords))
        inputs = [self._one(a)
                  for a in (value.args[1 + (op.function is not None):] if op.takes_text else value.args)]
        if not op.takes_text:
            return self._untitled(op, inputs, attrs, target)
        text = literal(value.args[0])
        ins, outs = parse_signature(text if inputs or not isinstance(text, str) else f"-> {text}")
        if len(ins) != len(inputs) or any(s is None or s.ellipsis for s in (*ins, *outs)):
            raise not_printed(value)
        for have, want in zip(inputs, ins):
            self._same(self.types[have], want, value)
        self._add(Step(op, ins, outs, tuple(inputs), self._targets(target, len(outs)), attrs))

    def _asserted(self, value: ast.Call) -> Op | None:
        """The op of a call of `local`, whose function must be one of those given."""
        make = {"local": local_op, "local_vjp": local_vjp_op}.get(name_of(value.func))
        if make is None or len(value.args) < 2:
            return None
        named = ast.unparse(value.args[1])
        if named not in self.known.local:
            error = SpecError(
                f"this program runs {named}, which was not given; pass functions={{{named!r}: ...}}")
            error.located = True
            raise error
        return make(self.known.local[named])

    def _infix(self, target: ast.expr, value: ast.BinOp) -> None:
        sign = _SIGNS.get(type(value.op))
        left = self._one(value.left)
        if isinstance(value.right, (ast.Constant, ast.UnaryOp)):
            op, inputs, attrs = ({"mul": SCALE, "add": SHIFT}.get(sign), [left],
                                 (("by", literal(value.right)),))
        else:
            op, inputs, attrs = BINARY.get(sign), [left, self._one(value.right)], ()
        if op is None:
            raise not_printed(value)
        self._untitled(op, inputs, attrs, target)

    def _untitled(self, op: Op, inputs: Sequence[str], attrs: tuple, target: ast.expr) -> None:
        """A step of an op without a spec string: its types follow from its operands."""
        ins = tuple(self.types[i] if self.explicit else self.types[i].whole() for i in inputs)
        step = Step(op, ins, (), tuple(inputs), (), attrs)
        check_keywords(step)
        check_operands(op, len(inputs))
        dims = _guarded(op, lambda: op.infer(ins, dict(attrs)))
        outs = (_guarded(op, lambda: natural(op.name, op.rule(replace(step, outs=dims)), ins, dims, inputs))
                if self.explicit else dims)
        self._add(replace(step, outs=tuple(outs), outputs=self._targets(target, len(outs))))

    def _scan(self, target: ast.expr, value: ast.Call) -> None:
        if len(value.args) < 3 or not isinstance(value.args[2], ast.Tuple) or not value.args[2].elts:
            raise not_printed(value)
        stages, reverse = _scan_options(value)
        body = self.known.function(value.args[0])
        nodes = value.args[1].elts if isinstance(value.args[1], ast.Tuple) else [value.args[1]]
        carries = [self._one(n) for n in nodes]
        stacked = [self._value(n) for n in value.args[2].elts]
        operands = [*map(self._value, nodes), *stacked, *map(self._value, value.args[3:])]
        inputs, count, begin = ([n for o in operands for n in o.names], sum(len(s.names) for s in stacked),
                                len(carries))
        if (not count or not (first := self.types[inputs[begin]].dims)
            or len(body.results) < begin):
            raise not_printed(value)
        kinds = [self.types[n] for n in inputs]
        if (any(k.dims[:1] != first[:1] for k in kinds[begin:begin + count])
            or (stages > 0) != (self.explicit and len(first[0].axes) == 1)):
            raise not_printed(value)
        turn = (stages - 1, 0) if reverse else (0, stages - 1)
        at = [Owed("@", a, n) for a in first[0].axes for n in turn]
        self._matches(operands, [Spec(k.dims[1:], k.owed) if begin <= i < begin + count else
                                 k.owing(*(o for o in k.owed if i >= begin or o not in at[:1]))
                                 for i, k in enumerate(kinds)], body, value)
        outs = [s.owing(*s.owed, *at[1:]) if i < begin else Spec((first[0], *s.dims), s.owed)
                for i, (_, s) in enumerate(body.result_leaves())]
        trees = [stacked_along(r.tree, first[:1]) if i >= begin and isinstance(r.tree, Struct) else r.tree
                 for i, r in enumerate(body.results)]
        if any(isinstance(tree, Struct) for tree in trees[:begin]):
            raise not_printed(value)
        for out, kind in zip(outs, kinds[:begin]):
            self._same(out.owing(*(o for o in out.owed if o not in at), *at[:1]), kind, value)
        attrs = Scan.attrs(first[0].label, count, begin, reverse, stages)
        self._add(
            Step(SCAN, tuple(kinds), tuple(outs), tuple(inputs), self._leaves(target, trees), attrs, body))

    def _cond(self, target: ast.expr, value: ast.Call) -> None:
        if len(value.args) < 3 or value.keywords:
            raise not_printed(value)
        body, orelse = (self.known.function(a) for a in value.args[1:3])
        predicate, operands = self._one(value.args[0]), [self._value(a) for a in value.args[3:]]
        inputs = [predicate, *(n for o in operands for n in o.names)]
        kinds = [self.types[n] for n in inputs]
        self._same(kinds[0], Spec(), value)
        for one in (body, orelse):
            self._matches(operands, kinds[1:], one, value)
        outs, others = (tuple(s for _, s in one.result_leaves()) for one in (body, orelse))
        if len(outs) != len(others):
            raise not_printed(value)
        for yes, no in zip(outs, others):
            self._same(yes, no, value)
        self._add(Step(COND, tuple(kinds), outs, tuple(inputs),
                       self._leaves(target, [r.tree for r in body.results]), (), body, orelse))

    def _fused(self, target: ast.expr, value: ast.Call) -> None:
        if not value.args or value.keywords:
            raise not_printed(value)
        body, inputs = self.known.function(value.args[0]), tuple(self._one(a) for a in value.args[1:])
        kinds, outs = tuple(self.types[n] for n in inputs), tuple(s for _, s in body.result_leaves())
        trees = [*(tree for _, tree in body.args), *(r.tree for r in body.results)]
        if any(isinstance(tree, Struct) for tree in trees):
            raise not_printed(value)
        self._matches([self._value(a) for a in value.args[1:]], kinds, body, value)
        self._add(Step(FUSED, kinds, outs, inputs, self._targets(target, len(outs)), (), body))

    def _matches(self, operands: Sequence[Tree], kinds: Sequence[Spec], body: Program,
                 node: ast.expr) -> None:
        """SpecError unless `operands`, their leaves of types `kinds`, are what `body` takes."""
        if ([len(o.names) for o in operands] != [len(leaves("", t)) for _, t in body.args]
            or body.explicit != self.explicit):
            raise not_printed(node)
        for have, (_, want) in zip(kinds, body.arg_leaves()):
            self._same(have, want, node)

    def _leaves(self, target: ast.expr, trees: Sequence[Any]) -> tuple[str, ...]:
        """The leaves of the values that a target names, trees and tensors."""
        roots = self._targets(target, len(trees))
        for root, tree in zip(roots, trees):
            if isinstance(tree, Struct):
                self.values[root] = Tree(tree, tuple(n for n, _ in leaves(root, tree)))
        return tuple(n for root, tree in zip(roots, trees) for n, _ in leaves(root, tree))

    def _targets(self, node: ast.expr, count: int) -> tuple[str, ...]:
        names = tuple(name_of(n) for n in (node.elts if isinstance(node, ast.Tuple) else [node]))
        if (len(names) != count or len({*names}) != count
            or any(n in self.values or not nameable(n) for n in names)):
            raise not_printed(node)
        return names

    def _one(self, node: ast.expr) -> str:
        value = self._value(node)
        if len(value.names) != 1 or isinstance(value.tree, Struct):
            raise not_printed(node)
        return value.names[0]

    def _add(self, step: Step) -> None:
        for name in [n for b in step.bodies for n, f in self.known.functions.items() if f is b]:
            self.size += self.known.sizes[name]
            self.depth = max(self.depth, self.known.depths[name] + 1)
        self.size += 1
        if self.size > MAX_STEPS or self.depth > MAX_DEPTH:
            raise SpecError(f"this is no program: it unfolds to more than {MAX_STEPS} steps, or to bodies "
                            f"{MAX_DEPTH} deep")
        if step.op.takes_text and not step.bodies:
            check_keywords(step)
            check_operands(step.op, len(step.inputs))
            _guarded(step.op, lambda: self._check(step))
        self.steps.append(step)
        self.types.update(zip(step.outputs, step.outs))
        for name, spec in zip(step.outputs, step.outs):
            if "." not in name and name not in self.values:
                self.values[name] = Tree(spec, (name,))

    def _check(self, step: Step) -> None:
        """SpecError unless the types of an explicit step's results are what its text says."""
        op = step.op
        if ((op.moves or op is RENAME)
            and ((len(step.ins), len(step.outs)) != (1, 1) or len(step.ins[0].dims) != len(step.outs[0].dims)
                 or op.moves and step.ins[0].labels != step.outs[0].labels)):
            raise SpecError(f'{op.name}: "{step.text}" is no call of it')
        rule = op.rule(step)
        if not self.explicit or op.asserted or op is RESHARD:
            return
        if op.moves:
            if problem := check_move(op, step.ins[0], step.outs[0]):
                raise SpecError(f"{op.name}: {problem}")
        elif op is RENAME:
            if ([d.axes for d in step.ins[0].dims] != [d.axes for d in step.outs[0].dims]
                or step.ins[0].owed != step.outs[0].owed):
                raise SpecError(f'rename: "{step.text}" changes more than names')
        else:
            for made, want in zip(natural(op.name, rule, step.ins, step.outs, step.inputs), step.outs):
                self._same(made, want, self.node)


def _scan_options(value: ast.Call) -> tuple[int, bool]:
    """Over how many stages a scan is, 0 where it is no pipeline, and whether it runs in reverse."""
    given = [(k.arg, literal(k.value)) for k in value.keywords]
    options = dict(given)
    stages, reverse = options.pop("stages", 0), options.pop("reverse", False)
    if (options or len(dict(given)) < len(given) or type(stages) is not int or type(reverse) is not bool
        or not 0 <= stages <= MAX_RANKS):
        raise not_printed(value)
    return stages, reverse


def _guarded(op: Op, f: Callable) -> Any:
    """What `f` returns; SpecError where the op fails on operands that it was never meant for."""
    try:
        return f()
    except SpecError:
        raise
    except _MISUSED as error:
        raise SpecError(f"this is no program: {op.name} is called with what it does not take") from error
