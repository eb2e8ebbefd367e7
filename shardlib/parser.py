"""Reading a printed Program back: `parse_program(str(program)) == program`.

The text goes through `ast`, and only the forms that printing makes are understood: classes of `param` and `stacked` fields,
`@sharded` functions, calls of known ops with names, numbers and strings, `scan`, and a return. Nothing is executed.
"""
from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping

from shardlib import grad, moves, pointwise, reductions
from shardlib.arithmetic import BINARY, RECIPROCAL, SCALE, SHIFT
from shardlib.complete import complete
from shardlib.cond import COND
from shardlib.einsum import EINSUM
from shardlib.errors import SpecError
from shardlib.layout import EXPLICIT
from shardlib.local import local_op, local_vjp_op
from shardlib.mesh import Mesh
from shardlib.program import Op, Program, Result, Step, Struct, leaves
from shardlib.rearrange import REARRANGE, RENAME
from shardlib.rules import natural
from shardlib.scan import SCAN
from shardlib.spec import Spec, parse, parse_signature

CORE: dict[str, Op] = {"einsum": EINSUM, "reciprocal": RECIPROCAL, **moves.TABLE, **pointwise.TABLE, **reductions.TABLE, **grad.TABLE,
                       "rearrange": REARRANGE, "rename": RENAME}


def parse_program(text: str, ops: Mapping[str, Op] | None = None, functions: Mapping[str, Callable] | None = None) -> Program:
    """The program that `text` prints: its last function. SpecError for anything that is not a printed program.

    ops: operators beyond the language's own (`shardlib.ops.TABLE`).  functions: what `local` may run, by "module.name".
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"this is no program: {error}") from None
    reader = _Reader({**CORE, **(ops or {})}, functions or {})
    for node in module.body:
        reader.top(node)
    if not reader.functions:
        raise SpecError("this is no program: it has no @sharded function")
    return list(reader.functions.values())[-1]


@dataclass
class _Tree:
    """A value of the text: its struct or spec, and the names of its leaves."""
    tree: Any
    names: tuple[str, ...]

    def field(self, name: str) -> _Tree:
        at = 0
        for n, sub in self.tree.fields if isinstance(self.tree, Struct) else ():
            count = len(leaves("", sub))
            if n == name:
                return _Tree(sub, self.names[at:at + count])
            at += count
        raise SpecError(f"this is no program: no field {name} in {self.tree}")


class _Reader:
    def __init__(self, ops: Mapping[str, Op], functions: Mapping[str, Callable]) -> None:
        self.ops, self.known = ops, functions
        self.classes: dict[str, Struct] = {}
        self.functions: dict[str, Program] = {}

    def top(self, node: ast.stmt) -> None:
        if isinstance(node, ast.ClassDef):
            self.classes[node.name] = self._class(node)
        elif isinstance(node, ast.FunctionDef):
            self.functions[node.name] = _Function(self, node).program()
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            raise _not(node)

    def function(self, node: ast.expr) -> Program:
        """The function that a name of the text stands for."""
        if _name(node) not in self.functions:
            raise SpecError(f"this is no program: unknown function {_name(node)!r}, line {node.lineno}")
        return self.functions[_name(node)]

    def _class(self, node: ast.ClassDef) -> Struct:
        fields: list[tuple[str, Any]] = []
        for item in node.body:
            if isinstance(item, ast.Pass):
                continue
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(item.value, ast.Call)
                    and isinstance(item.value.func, ast.Name)):
                raise _not(item)
            first = item.value.args[0]
            if item.value.func.id == "param":
                fields.append((item.target.id, parse(_literal(first))))
            elif item.value.func.id == "stacked":
                fields.append((item.target.id, self.stack(self.classes[item.value.args[1].id], parse(_literal(first)))))
            elif item.value.func.id == "nested":
                fields.append((item.target.id, self.classes[first.id]))
            else:
                raise _not(item)
        return Struct(node.name.rstrip("_"), tuple(fields))

    @staticmethod
    def stack(struct: Struct, dim: Spec) -> Struct:
        made = struct.map(lambda s: Spec((*dim.dims, *s.dims), s.owed))
        return Struct(made.name, made.fields, dim.labels[0])


class _Function:
    def __init__(self, reader: _Reader, node: ast.FunctionDef) -> None:
        self.reader, self.node = reader, node
        self.values: dict[str, _Tree] = {}
        self.types: dict[str, Spec] = {}
        self.steps: list[Step] = []

    def program(self) -> Program:
        node = self.node
        if len(node.decorator_list) != 1 or not isinstance(call := node.decorator_list[0], ast.Call) or _name(call.func) != "sharded":
            raise _not(node)
        explicit = any(k.arg == "layout" and _name(k.value) == "EXPLICIT" for k in call.keywords)
        ins, outs = parse_signature(_literal(call.args[0]))
        args = []
        for arg, spec in zip(node.args.args, ins, strict=True):
            tree = spec if spec is not None else self.reader.classes[_name(arg.annotation)]
            args.append((arg.arg, tree))
            flat = leaves(arg.arg, tree)
            self.values[arg.arg] = _Tree(tree, tuple(n for n, _ in flat))
            self.types.update(flat)
        results: tuple[Result, ...] = ()
        for stmt in node.body:
            if isinstance(stmt, ast.Return):
                items = stmt.value.elts if isinstance(stmt.value, ast.Tuple) else [stmt.value]
                results = tuple(self._result(i, s) for i, s in zip(items, outs, strict=True))
            elif isinstance(stmt, ast.Assign) and len(stmt.targets) == 1:
                self._assign(stmt.targets[0], stmt.value, explicit)
            else:
                raise _not(stmt)
        name = node.name.rstrip("0123456789") if node.name.rstrip("0123456789") in self.reader.functions else node.name
        return Program(name, tuple(args), tuple(self.steps), results, explicit)

    def _result(self, node: ast.expr, spec: Spec | None) -> Result:
        value = self._value(node)
        return Result(value.tree if spec is None else spec, value.names)

    def _value(self, node: ast.expr) -> _Tree:
        if isinstance(node, ast.Name) and node.id in self.values:
            return self.values[node.id]
        if isinstance(node, ast.Attribute):
            return self._value(node.value).field(node.attr)
        if isinstance(node, ast.Call) and _name(node.func) in self.reader.classes:
            struct = self.reader.classes[_name(node.func)]
            parts = {k.arg: self._value(k.value) for k in node.keywords}
            fields = tuple((n, parts[n].tree) for n, _ in struct.fields if n in parts)
            fields = tuple((n, replace(sub, stacked=declared.stacked) if isinstance(declared := dict(struct.fields)[n], Struct) else sub)
                           for n, sub in fields)
            return _Tree(Struct(struct.name, fields), tuple(x for p in parts.values() for x in p.names))
        raise _not(node)

    def _assign(self, target: ast.expr, value: ast.expr, explicit: bool) -> None:
        if isinstance(value, ast.BinOp):
            return self._infix(target, value)
        if not isinstance(value, ast.Call):
            raise _not(value)
        if _name(value.func) == "scan":
            return self._scan(target, value)
        if _name(value.func) == "cond":
            return self._cond(target, value)
        op = self.reader.ops.get(_name(value.func)) or self._asserted(value)
        if op is None:
            raise SpecError(f"this is no program: unknown op {_name(value.func)!r}, line {value.lineno}")
        attrs = tuple(sorted((k.arg, _literal(k.value)) for k in value.keywords))
        operands = value.args[1 + (op.function is not None):] if op.takes_text else value.args
        inputs = [self._one(a) for a in operands]
        if op.takes_text:
            ins, outs = parse_signature(_literal(value.args[0]))
        else:
            ins = tuple(self.types[i] for i in inputs)
            outs = self._natural(op, ins, attrs)
        self._add(op, ins, outs, inputs, self._targets(target), attrs)

    def _asserted(self, value: ast.Call) -> Op | None:
        """The op of a call of `local`, whose function must be one of those given."""
        make = {"local": local_op, "local_vjp": local_vjp_op}.get(_name(value.func))
        if make is None or len(value.args) < 2:
            return None
        named = ast.unparse(value.args[1])
        if named not in self.reader.known:
            raise SpecError(f"this program runs {named}, which was not given; pass functions={{{named!r}: ...}}")
        return make(self.reader.known[named])

    def _natural(self, op: Op, ins: tuple[Spec, ...], attrs: tuple) -> tuple[Spec, ...]:
        dims = op.infer(ins, dict(attrs))
        return natural(op.name, op.rule(Step(op, ins, dims, (), (), attrs)), ins, dims)

    def _infix(self, target: ast.expr, value: ast.BinOp) -> None:
        sign = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}.get(type(value.op))
        if sign is None:
            raise _not(value)
        left = self._one(value.left)
        try:
            number = _literal(value.right)
        except SpecError:
            inputs, op, attrs = [left, self._one(value.right)], BINARY[sign], ()
        else:
            inputs, op, attrs = [left], {"mul": SCALE, "add": SHIFT}[sign], (("by", number),)
        ins = tuple(self.types[i] for i in inputs)
        self._add(op, ins, self._natural(op, ins, attrs), inputs, self._targets(target), attrs)

    def _scan(self, target: ast.expr, value: ast.Call) -> None:
        body = self.reader.function(value.args[0])
        stacked = [self._value(n) for n in value.args[2].elts]
        operands = [self._value(value.args[1]), *stacked, *(self._value(a) for a in value.args[3:])]
        inputs = [n for o in operands for n in o.names]
        count = sum(len(s.names) for s in stacked)
        dim = self.types[stacked[0].names[0]].dims[0]
        outs = [s if i == 0 else Spec((dim, *s.dims), s.owed) for i, (_, s) in enumerate(body.result_leaves())]
        attrs = tuple(sorted([("dim", dim.label), ("stacked", count), *((k.arg, _literal(k.value)) for k in value.keywords)]))
        names: list[str] = []
        elts = target.elts if isinstance(target, ast.Tuple) else [target]
        for i, (elt, result) in enumerate(zip(elts, body.results, strict=True)):
            tree = result.tree if i == 0 else _Reader.stack(result.tree, Spec((dim,))) if isinstance(result.tree, Struct) else result.tree
            flat = self._target_leaves(elt, tree)
            names += flat
        self._add(SCAN, tuple(self.types[i] for i in inputs), tuple(outs), inputs, names, attrs, body)

    def _cond(self, target: ast.expr, value: ast.Call) -> None:
        predicate, *operands = [self._value(value.args[0]), *(self._value(a) for a in value.args[3:])]
        body, orelse = (self.reader.function(a) for a in value.args[1:3])
        inputs = [n for o in (predicate, *operands) for n in o.names]
        names: list[str] = []
        elts = target.elts if isinstance(target, ast.Tuple) else [target]
        for elt, result in zip(elts, body.results, strict=True):
            names += self._target_leaves(elt, result.tree)
        self._add(COND, tuple(self.types[i] for i in inputs), tuple(s for _, s in body.result_leaves()), inputs, names, (), body, orelse)

    def _target_leaves(self, node: ast.expr, tree: Any) -> list[str]:
        if isinstance(node, ast.Name):
            flat = [n for n, _ in leaves(node.id, tree)]
            if isinstance(tree, Struct):
                self.values[node.id] = _Tree(tree, tuple(flat))
            return flat
        raise _not(node)

    def _targets(self, node: ast.expr) -> list[str]:
        return [_name(n) for n in (node.elts if isinstance(node, ast.Tuple) else [node])]

    def _one(self, node: ast.expr) -> str:
        names = self._value(node).names
        if len(names) != 1:
            raise _not(node)
        return names[0]

    def _add(self, op: Op, ins: Any, outs: Any, inputs: list[str], outputs: list[str], attrs: tuple, body: Program | None = None,
             orelse: Program | None = None) -> None:
        self.steps.append(Step(op, tuple(ins), tuple(outs), tuple(inputs), tuple(outputs), attrs, body, orelse))
        self.types.update(zip(outputs, outs))
        for name, spec in zip(outputs, outs):
            if "." not in name:
                self.values[name] = _Tree(spec, (name,))


def _name(node: ast.AST | None) -> str:
    if not isinstance(node, ast.Name):
        raise _not(node)
    return node.id


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise _not(node) from None


def _not(node: ast.AST | None) -> SpecError:
    return SpecError(f"this is no program: line {getattr(node, 'lineno', '?')} is not of the printed form")


def check(program: Program, mesh: Mesh) -> Program:
    """An explicit program, typed again from its text: the same program, or a SpecError for the first step that does not type."""
    return complete(program, EXPLICIT, mesh)
