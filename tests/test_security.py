"""Text from anywhere is data: whatever is written as a spec, a name, a layout, a mesh or a program, either a
`SpecError` says what is wrong with it, or the code that ranks then run holds our own identifiers and
literals, and nothing else.
"""
import ast
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import shardlib
import shardlib.functions
from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    cond,
    einsum,
    lower,
    param,
    reshard,
    scan,
    sharded,
    stacked,
    value_and_grad,
)
from shardlib.compiler.complete import complete
from shardlib.compiler.parser import CORE, check, parse_program
from shardlib.functions import argmax, cast, greater, mean, silu, softmax
from shardlib.language.trace import Function, trace
from shardlib.lowering.emit import Emitter
from shardlib.ops import TABLE as OPS
from shardlib.ops import rms_norm, rope, rope_table
from shardlib.spec import parse, parse_signature

ROOT = Path(__file__).resolve().parents[1]
MESH = Mesh(dp=2, tp=2)
QUICK = settings(max_examples=2 * settings.default.max_examples, deadline=None,
                 suppress_health_check=list(HealthCheck))


# -- what generated code may hold ----------------------------------------------------------------------------

NODES = {"Module", "FunctionDef", "arguments", "arg", "Assign", "Return", "For", "If", "Expr", "Yield",
         "Pass", "Name", "Load", "Store", "Attribute", "Call", "keyword", "Constant", "Tuple", "List",
         "BinOp", "Add", "Sub", "Mult", "Div", "Pow", "BitAnd", "BitOr", "UnaryOp", "USub", "Invert",
         "Compare", "Gt", "Lt", "Eq", "Subscript", "Slice", "IfExp", "ListComp", "comprehension"}
NAMES = re.compile(r"[avgus][0-9]+|inv[0-9]+|[pj]|main|torch|F|bool|float|zip")
KEYWORDS = ("dtype", "device", "keepdim", "min", "at")
STRINGS = re.compile(r"[A-Za-z,]*->[A-Za-z]*|sum|max|nan|all_reduce|reduce_scatter|all_gather|all_to_all")


def is_known(attribute: ast.Attribute) -> bool:
    """Whether `x.attribute` is a tensor's, a dtype or a function on tensors of torch, or a collective."""
    base, name = ast.unparse(attribute.value), attribute.attr
    if name.startswith("_"):
        return False
    if base in ("torch", "F"):
        found = getattr(torch if base == "torch" else torch.nn.functional, name, None)
        return (name == "ops" or isinstance(found, torch.dtype) or callable(found)
                and name not in ("load", "save", "compile", "classes"))
    if base in ("torch.ops", "torch.ops.aten"):
        return base == "torch.ops.aten" or name == "aten"
    return (hasattr(Tensor, name)
            or name in ("append", "all_reduce", "reduce_scatter", "all_gather", "all_to_all"))


def assert_safe(source: str, helpers: dict) -> None:
    """Generated code is an AST of these nodes, names, attributes and strings;
    helpers are functions of the library."""
    assert all(f.__module__.startswith("shardlib.") and f.__name__ == name for name, f in helpers.items())
    for node in ast.walk(ast.parse(source)):
        assert type(node).__name__ in NODES, ast.unparse(node)
        name = (getattr(node, "id", None) or getattr(node, "arg", None)
                or (node.name if isinstance(node, ast.FunctionDef) else None))
        assert (name is None or NAMES.fullmatch(name) or name in helpers or isinstance(node, ast.keyword)
                and name in KEYWORDS), name
        if isinstance(node, ast.Attribute):
            assert is_known(node), ast.unparse(node)
        if isinstance(node, ast.Constant) and not isinstance(node.value, (int, float, bool, type(None))):
            assert isinstance(node.value, str) and STRINGS.fullmatch(node.value), node.value


def assert_program_safe(program, mesh: Mesh) -> None:
    """It prints, reads back, and each rank's code is safe, or cannot be made and says why."""
    assert parse_program(str(program), ops=OPS) == program
    names = {n for p in (*program.bodies(), program) for spec in p.types().values() for n in spec.names}
    for rank in range(mesh.world_size):
        e = Emitter(mesh, rank, dict.fromkeys(names, 4))
        try:
            source = e.program(program)
        except SpecError:
            return
        assert_safe(source, e.helpers)


def accepts(make) -> object:
    """What `make` returns; None where it is refused, with a SpecError and nothing else."""
    try:
        return make()
    except SpecError as error:
        assert str(error)
        return None


# -- text ----------------------------------------------------------------------------------------------------

NASTY = [
    "__import__('os').system('echo')", "os.system('echo')", "eval('1')", "x.__class__", "lambda: 0", '"', "'",
    "\\", "\n", "\t", "\0", "(", ")", "#", ";", "=", "->", ",", " ", "...", "*", "~", "/1", "/tp", "/dp/tp",
    "/tq", "+tp", "+dp", "max:tp", "@tp:0", "@tp:last", "@tp:99", "B", "D", "D2", "()", "(K G)", "4", "0",
    "-1", "1e999", "9" * 30, "9" * 5000, "inf", "nan", "None", "True", "é", "ﬁ", "名", "²", "class", "for",
    "__init__", "__2", "f__2", "v1", "a0", "main", "torch", "einsum", "scan", "Params",
    "float32); import os; (", "{x}", "{}", "%s", "\ud800", "\u2028", "\x0c",
]
NEAR = (st.lists(st.sampled_from(["B", "T", "D", "K", "tp", "dp", *NASTY]), max_size=8).map(" ".join)
        | st.lists(st.sampled_from(NASTY), max_size=4).map("".join))
ANY = st.text(max_size=30) | NEAR
SPECS = ["B/dp T D +tp", "M/dp/tp", "B T (K/tp G H)", "(E/tp B)~J D", "E/1 4 D", "()", "B max:tp", "X @tp:0",
         "... D"]


@st.composite
def changed(draw, texts):
    """One of `texts` with a few edits: cut, doubled, or something else put in."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, len(text)))
        b = min(len(text), a + draw(st.integers(0, 12)))
        new = draw(st.sampled_from([*NASTY, "", text[a:b] * 2]) | st.text(max_size=3))
        text = text[:a] + new + text[b:]
    return text


@QUICK
@given(ANY | changed(SPECS))
@example("")
@example("B" * 5000)
def test_any_text_as_a_spec(text):
    spec = accepts(lambda: parse(text))
    if spec is not None:
        assert parse(str(spec)) == spec and str(parse(str(spec))) == str(spec)
    accepts(lambda: parse_signature(text))
    accepts(lambda: MESH.resolve(parse(text)))
    f = accepts(lambda: Function(lambda x: x, f"{text} -> {text}"))
    for layout in (EXPLICIT, Layout(B="dp", D="tp")):
        program = f and accepts(lambda: lower(f, layout, mesh=MESH))
        if program is not None:
            assert_program_safe(program, MESH)


@QUICK
@given(ANY | changed(
    ["B T D, D F -> B T F", "B/dp D/tp, D/tp F -> B/dp F +tp", "B T D -> B T", "B T D -> (B T) D"]),
       st.sampled_from(["einsum", "rest"]))
def test_any_text_in_a_call(text, op):
    calls = {"einsum": lambda x, w: einsum(text, x, w), "rest": lambda x, w: reshard(text, x)}

    def run():
        f = sharded("B T D, D F -> B T F")(lambda x, w: calls[op](x, w))
        return lower(f, Layout(B="dp", F="tp"), mesh=MESH)
    program = accepts(run)
    if program is not None:
        assert_program_safe(program, MESH)
    for call in (lambda x: argmax(text, x), lambda x: mean(text, x), lambda x: softmax(x, text),
                 lambda x: cast(x, text), lambda x: shardlib.rename(text, x),
                 lambda x: shardlib.rearrange(text, x), lambda x: shardlib.functions.sum(text, x),
                 lambda x: shardlib.all_reduce(text, x), lambda x: rope(text, x, x),
                 lambda x: rope_table(text, x, theta=1e4)):
        program = accepts(lambda: lower(sharded("B T D -> B T D")(call), Layout(B="dp"), mesh=MESH))
        if program is not None:
            assert_program_safe(program, MESH)


@QUICK
@given(ANY, ANY)
def test_any_text_as_dim_and_axis(dim, axis):
    mesh = accepts(lambda: Mesh({axis: 2}))
    layout = accepts(lambda: Layout({dim: axis}))
    if mesh is None or layout is None:
        return
    assert Mesh.parse(str(mesh)) == mesh and Layout.parse(str(layout)) == layout

    def run():
        f = sharded(f"B {dim}, {dim} D -> B D")(lambda x, w: einsum(f"B {dim}, {dim} D -> B D", silu(x), w))
        return lower(f, layout, mesh=mesh)
    program = accepts(run)
    if program is not None:
        assert_program_safe(program, mesh)


@QUICK
@given(ANY | changed(["dp=2,tp=4,ep=dp/tp", "B=dp,K=tp,F=tp/tk"]))
@example(",".join(f"a{i}=999999999" for i in range(200)))
def test_any_text_as_a_layout_and_a_mesh(text):
    mesh, layout = accepts(lambda: Mesh.parse(text)), accepts(lambda: Layout.parse(text))
    assert mesh is None or Mesh.parse(str(mesh)) == mesh
    assert layout is None or Layout.parse(str(layout)) == layout


@QUICK
@given(ANY, ANY, ANY)
@example("class", "x", "f")
@example("W", "for", "f")
@example("W", "a: int = __import__('os').system('echo') #", "f")
@example("W__2", "x", "f__2")
@example("einsum", "einsum", "einsum")
@example("W", "w", "<lambda>")
@example("Ｗ", "ｗ", "ｆ")
def test_any_text_as_the_name_of_a_class_a_field_and_a_function(cls, field, name):
    body = {"__annotations__": {field: "Tensor"}, field: param("D F")}
    made = accepts(lambda: type(cls, (Params,), body) if cls.isprintable() else None)
    if made is None:
        return

    def fn(x, w):
        return einsum("B D, D F -> B F", x, getattr(w, field))
    fn.__name__, fn.__annotations__ = name, {"w": made}
    program = accepts(lambda: lower(sharded("B D, * -> B F")(fn), Layout(F="tp"), mesh=MESH))
    if program is not None:
        assert_program_safe(program, MESH)


def test_names_that_python_takes_and_the_grammar_does_not():
    with pytest.raises(SpecError, match="no name for an argument"):
        sharded("B -> B")(lambda größe: größe)
    with pytest.raises(SpecError, match="no name for a class"):
        type("Größe", (Params,), {})
    program = lower(sharded("B -> B")(lambda x: silu(x)), mesh=MESH)
    assert program.name == "f" and parse_program(str(program)) == program


def test_two_functions_of_one_name_and_one_that_looks_like_a_second():
    class W(Params):
        up: Tensor = param("D D2")

    class Net(Params):
        first: W = stacked("L", W)
        second: W = stacked("L", W)

    def layers(name, scale):
        def f(x, w):
            return x * scale + einsum("B D2, D D2 -> B D", einsum("B D, D D2 -> B D2", x, w.up), w.up)
        f.__name__, f.__annotations__ = name, {"w": W}
        return sharded("B D, * -> B D")(f)

    @sharded("B D, * -> B D")
    def layer(x, w: Net):
        for name, scale in (("layer", 2.0), ("layer", 3.0), ("layer2", 4.0), ("layer__2", 5.0)):
            x = scan(layers(name, scale), x, w.first)
        return x
    assert_program_safe(lower(layer, Layout(D2="tp"), mesh=MESH), MESH)


def test_variables_named_like_what_a_program_calls():
    @sharded("B F, F D -> B D")
    def f(x, w):
        all_reduce = einsum("B F, F D -> B D", x, w)
        silu = shardlib.functions.silu(all_reduce)
        mean = shardlib.functions.mean("B D -> B", silu)
        return all_reduce * silu * mean
    program = lower(f, Layout(F="tp"), mesh=MESH)
    used = {s.op.name for s in program.steps}
    assert not used & {n for s in program.steps for n in s.outputs}
    assert_program_safe(program, MESH)


# -- programs as text ----------------------------------------------------------------------------------------

class Mlp(Params):
    norm: Tensor = param("D")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Mlp = stacked("L", Mlp)
    head: Tensor = param("D V")


@sharded("B D, * -> B D, B")
def layer(x, w: Mlp):
    h = einsum("B D, D F -> B F", rms_norm(x, w.norm), w.up)
    y = x + einsum("B F, F D -> B D", silu(h) * 0.5 + 1.0, w.down)
    return y, mean("B D -> B", y)


@sharded("B D -> B D")
def twice(x):
    return x + x


@sharded("B D -> B D")
def soft(x):
    return softmax(x, "D")


@sharded("B D, * -> B, B V")
def net(x, w: Net):
    y, _ = scan(layer, x, w.layers)
    y = cond(greater(mean("B D -> ()", y), 0.0), twice, soft, y)
    logits = einsum("B D, D V -> B V", y, w.head)
    return argmax("B V -> B", logits), cast(logits, "float32")


@sharded("B D, * -> ()")
def loss(x, w: Net):
    y, _ = scan(layer, x, w.layers)
    return mean("B V -> ()", einsum("B D, D V -> B V", y, w.head))


PROGRAMS = [lower(net, Layout(B="dp", F="tp", V="tp"), mesh=MESH),
            lower(value_and_grad(loss), Layout(B="dp", F="tp", D="dp"), mesh=MESH),
            lower(twice, Layout(), mesh=MESH), complete(trace(soft), Layout(B="tp"), MESH)]
TEXTS = [str(p) for p in PROGRAMS]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_these_programs_are_safe(program):
    assert_program_safe(program, MESH)


def read(text):
    program = accepts(lambda: parse_program(text, ops=OPS))
    if program is None:
        return
    assert parse_program(str(program), ops=OPS) == program
    completed = accepts(lambda: check(program, MESH) if program.explicit
                        else complete(program, Layout(B="dp", F="tp"), MESH))
    if completed is not None:
        assert_program_safe(completed, MESH)


@QUICK
@given(ANY)
def test_any_text_as_a_program(text):
    read(text)


@settings(QUICK, max_examples=4 * settings.default.max_examples)
@given(changed(TEXTS))
def test_programs_with_a_few_edits(text):
    read(text)


KEYWORDS_OF_OPS = ['along="D"', 'dtype="float32"', 'dtype="os"', "by=2", "eps=1e-6", 'eps="os"', 'of="D"',
                   "mean=True", "than=0", "theta=1e4, scaling=None", "theta=1e4, scaling=(1, 2, 3, 4)",
                   "temperature=1.0, top_p=1.0, seed=0"]


@st.composite
def calls(draw):
    """A program of one or two calls of any op, with any specs, operands and keywords."""
    spec = st.sampled_from(
        ["B D", "B/dp D", "D", "()", "B D F", "B D/tp", "B D +tp", "B T K G H", "(B D)", "4 D"])
    lines = []
    for i in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([*CORE, *OPS, "scan", "cond", "fused", "local"]))
        texts = draw(st.lists(spec, max_size=4))
        keywords = draw(st.lists(st.sampled_from(KEYWORDS_OF_OPS), max_size=1))
        args = draw(st.lists(st.sampled_from(["x", "y", "z", "g"]), max_size=4))
        text = [f'"{", ".join(texts)} -> {draw(spec)}"'] if draw(st.booleans()) else []
        lines.append(f"    v{i} = {name}({', '.join([*text, *args, *keywords])})")
    result = draw(spec)
    ins = ", ".join(draw(spec) for _ in "xyz")
    g = '@sharded("B D -> B D", layout=EXPLICIT)\ndef g(x):\n    return x\n'
    style = draw(st.sampled_from(["", ", layout=EXPLICIT"]))
    return (f'{g}@sharded("{ins} -> {result}"{style})\ndef f(x, y, z):\n' + "\n".join(lines)
            + "\n    return v0")


@settings(QUICK, max_examples=5 * settings.default.max_examples)
@given(calls())
def test_programs_that_call_any_op_with_anything(text):
    read(text)


REFUSED = [
    "import os\nos.system('echo')",
    "__import__('os').system('echo')",
    "@sharded('B -> B')\ndef f(x):\n    __import__('os').system('echo')\n    return x",
    "@sharded('B -> B')\ndef f(x):\n    y = __import__('os').system(x)\n    return y",
    "@sharded('B -> B')\ndef f(x=__import__('os').system('echo')):\n    return x",
    "@sharded('B -> B')\ndef f(x: __import__('os').system('echo')):\n    return x",
    "@sharded('B -> B')\ndef f(x) -> __import__('os'):\n    return x",
    "@sharded('B -> B', layout=__import__('os'))\ndef f(x):\n    return x",
    "@__import__('os')\ndef f(x):\n    return x",
    "@sharded('B -> B')\ndef f(x):\n    return x.__class__",
    "@sharded('B -> B')\ndef f(x):\n    y = cast(x, dtype='float32); import os; (')\n    return y",
    "@sharded('B -> B')\ndef f(x):\n    y = x * '__import__'\n    return y",
    "@sharded('B -> B')\ndef f(x):\n    y = x * 1e999\n    return y",
    "@sharded('B -> B')\ndef f(x):\n    y = x * (lambda: 1)()\n    return y",
    "@sharded('B -> B')\ndef f(x):\n    y = local('B -> B', os.system, x)\n    return y",
    "@sharded('B D -> B D')\ndef f(x):\n    y = softmax(x, along='__import__')\n    return y",
    "@sharded('B -> B')\ndef f(x):\n    if x:\n        return x\n    return x",
    "@sharded('B -> B')\ndef f(x):\n    return x\n    return x",
    "@sharded('B -> B')\ndef f(x):\n    x = silu(x)\n    return x",
    "@sharded('B -> B')\ndef f(x, *, y):\n    return x",
    ("class A(Params):\n    x: Tensor = param(open('/etc/passwd'))\n@sharded('* -> B')\ndef f(w: A):\n"
     "    return w.x"),
    ("class A(Params, metaclass=M):\n    x: Tensor = param('B')\n@sharded('* -> B')\ndef f(w: A):\n"
     "    return w.x"),
    "class A(object):\n    x: Tensor = param('B')\n@sharded('* -> B')\ndef f(w: A):\n    return w.x",
    "class A(Params):\n    x: Tensor = param(['B'])\n@sharded('* -> B')\ndef f(w: A):\n    return w.x",
    "@sharded(['B -> B'])\ndef f(x):\n    return x",
    "async def f(x): return x",
    "f = 1",
    "",
]


@pytest.mark.parametrize("text", REFUSED)
def test_code_is_refused(text):
    with pytest.raises(SpecError):
        parse_program(text)


WATCHED = ("exec", "os.", "subprocess.", "open", "socket.", "import", "ctypes.", "shutil.")
SEEN: list[str] | None = None


def _audit(event, _):
    if SEEN is not None and event.startswith(WATCHED):
        SEEN.append(event)


sys.addaudithook(_audit)


def test_reading_a_program_executes_imports_and_opens_nothing():
    global SEEN
    for text in (*REFUSED, *TEXTS, *TEXTS):
        SEEN = []
        try:
            accepts(lambda: parse_program(text, ops=OPS))
            assert not SEEN
        finally:
            SEEN = None


def doubled_classes(n):
    classes = ["class C0(Params):\n    x: Tensor = param('B')"]
    classes += [f"class C{i}(Params):\n    x: C{i - 1} = nested(C{i - 1})\n    y: C{i - 1} = nested(C{i - 1})"
                for i in range(1, n)]
    return "\n".join([*classes, f"@sharded('* -> B')\ndef f(w: C{n - 1}):\n    return w.x"])


def doubled_functions(n):
    """Each calls the one before four times."""
    head = "@sharded('(), B D -> B D', layout=EXPLICIT)\ndef f{0}(p, x):\n"
    calls = "    y = cond(p, f{1}, f{1}, p, x)\n    z = cond(p, f{1}, f{1}, p, y)\n    return z\n"
    return head.format(0) + "    return x\n" + "".join((head + calls).format(i, i - 1) for i in range(1, n))


@pytest.mark.parametrize("text", [
    "(" * 100_000, "[" * 500 + "]" * 500, "-" * 50_000 + "1", "x" + ".a" * 50_000, "a+" * 50_000 + "a",
    "@sharded('B -> B')\ndef f(x):\n    return x" + ".a" * 900,
    "@sharded('B -> B')\ndef f(x):\n    y = x * " + "-" * 900 + "1\n    return y",
    "9" * 100_000, "\0", "\ud800", "\ufeff\ufeff", "if x:\n" * 50, "#" * 5_000_000,
    "@sharded('" + "B" * 100_000 + " -> B')\ndef f(x):\n    return x",
    "@sharded('" + "B, " * 20_000 + "B -> B')\ndef f(x):\n    return x", doubled_classes(60),
    doubled_functions(12), doubled_functions(60), b"x = 1", None, 3,
], ids=range(21))
def test_deep_and_huge_text_is_refused_at_once(text):
    began = time.monotonic()
    with pytest.raises(SpecError):
        parse_program(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("call, said", [
    ("silu(x, x)", "silu: it takes 1 operand; 2 were given"),
    ("silu()", "silu: it takes 1 operand; 0 were given"),
    ("where(x, x)", "where: it takes 3 operands; 2 were given"),
    ("rms_norm(x, x, x, eps=1e-06)", "rms_norm: it takes 2 operands; 3 were given"),
    ('take("D, D, D -> ()", x, x, x)', "take: it takes 2 operands; 3 were given"),
    ('attention("D, D -> D", x, x)', "attention: it takes 3 or more operands; 2 were given"),
    ('compare(x, x, sign=["a"])', "compare: sign is ['a']"),
])
def test_a_call_has_as_many_operands_as_its_op_takes(call: str, said: str) -> None:
    """One too many was read as if it were not there."""
    with pytest.raises(SpecError) as error:
        parse_program("@sharded('D -> D', layout=EXPLICIT)\n"
                      f"def f(x):\n    v = {call}\n    return v", ops=OPS)
    assert str(error.value).split("  ")[0] == said


# -- the library's own source --------------------------------------------------------------------------------

def sources(*folders):
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py")) if ".venv" not in f.parts]
    assert files
    return [(f.relative_to(ROOT).as_posix(), ast.parse(f.read_text())) for f in files]


def test_code_is_executed_in_one_place_only():
    """`exec` and `compile` of text are called by `load` in load.py, on what the emitter wrote;
    nothing calls `eval`."""
    found = []
    for file, tree in sources("shardlib", "ops", "models", "triton_kernels"):
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)] + [tree]:
            for node in ast.walk(function):
                if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                    and node.func.id in ("eval", "exec", "__import__")):
                    found.append((file, getattr(function, "name", "")))
                if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ("eval", "exec", "system", "popen")):
                    if getattr(node.func.value, "id", "") in ("builtins", "os"):
                        found.append((file, ast.unparse(node)))
    assert ({f for f, name in found if name} == {"shardlib/lowering/load.py"}
            and {name for _, name in found if name} == {"load"})


def test_nothing_is_pickled():
    """Nor by torch: its object collectives pickle, and its files are pickles.

    Benchmarks alone call those, as peers.
    """
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    calls = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
             "send_object_list", "recv_object_list"}
    for file, tree in sources("shardlib", "ops", "models", "triton_kernels", "benchmarks", "docs", "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not banned & {a.name.split(".")[0] for a in node.names}, file
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, file
            if isinstance(node, ast.Attribute):
                assert node.attr not in calls or file.startswith("benchmarks/"), f"{file}:{node.lineno}"
                if not file.startswith("tests/"):
                    assert not (node.attr in ("load", "save")
                                and getattr(node.value, "id", "") == "torch"), f"{file}:{node.lineno}"
