"""The grammar of specs: what is printed is read back; anything else is a SpecError, and soon."""
from __future__ import annotations

import copy
import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardlib.errors import SpecError, aligned
from shardlib.mesh import Mesh
from shardlib.spec import MAX_TEXT, Dim, Factor, Owed, Spec, parse, parse_signature

NAMES = ("B", "T", "D", "K", "G", "H", "d_model", "batch", "_x", "S2", "max", "last")
AXES = ("dp", "tp", "tk", "x", "y", "z", "ep", "pp")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any spec, with names and axes used once."""
    names, axes = list(draw(st.permutations(NAMES))), list(draw(st.permutations(AXES)))

    def factor() -> Factor:
        split = tuple(axes.pop() for _ in range(draw(st.integers(0, 2))) if axes)
        return Factor(names.pop(), split, whole=not split and draw(st.booleans()))

    def dim() -> Dim:
        kind = draw(st.sampled_from(("name", "name", "name", "ragged", "size", "group")))
        if kind == "size":
            return Dim((), size=draw(st.integers(0, 10 ** 18 - 1)))
        if kind == "group":
            return Dim((factor(), *(Factor(names.pop()) for _ in range(draw(st.integers(1, 2))))))
        if kind == "ragged":
            return Dim((factor(), factor()), ragged=draw(st.sampled_from(NAMES)))
        return Dim((factor(),))
    dims = tuple(dim() for _ in range(draw(st.integers(0, 4))))
    sums = draw(st.sampled_from(("+", "max")))
    owed = [Owed("@", a, draw(st.one_of(st.integers(0, 99), st.just("last")))) if draw(st.booleans())
            else Owed(sums, a)
            for a in axes[:draw(st.integers(0, 2))]]
    return Spec(dims, tuple(owed), draw(st.booleans()))


# -- round trips ---------------------------------------------------------------------------------------------

@given(specs())
def test_what_is_printed_is_read_back(spec: Spec) -> None:
    read = parse(str(spec))
    assert read == spec and (read.dims, read.owed, read.ellipsis) == (spec.dims, spec.owed, spec.ellipsis)
    assert str(read) == str(spec)


@given(specs())
def test_equal_parts_make_one_spec_however_it_is_copied(spec: Spec) -> None:
    """And making one anew, as copies do, leaves the scalar alone, which is made of nothing."""
    assert Spec(spec.dims, spec.owed[::-1], spec.ellipsis) is spec
    assert copy.deepcopy(spec) is spec and replace(spec, owed=()) is spec.owing()
    assert Spec() == parse("()") and Spec().dims == ()


@given(specs(), st.data())
def test_blanks_and_the_order_of_what_is_owed_do_not_matter(spec: Spec, data: st.DataObject) -> None:
    items = spec.items()
    shuffled = items[:len(items) - len(spec.owed)] + data.draw(st.permutations([str(o) for o in spec.owed]))
    text = ("".join(" " * data.draw(st.integers(i > 0, 3)) + item for i, item in enumerate(shuffled))
            + " " * data.draw(st.integers(0, 2)))
    assert parse(text if items else "()") == spec


@given(st.lists(st.one_of(st.none(), specs()), max_size=4),
       st.lists(st.one_of(st.none(), specs()), max_size=3))
def test_a_signature_is_read_back(ins: list, outs: list) -> None:
    def side(given: list) -> str:
        return ", ".join("*" if s is None else str(s) for s in given)
    assert parse_signature(f"{side(ins)} -> {side(outs)}") == (tuple(ins), tuple(outs))


@given(specs())
def test_a_type_is_its_own_text(spec: Spec) -> None:
    mesh = Mesh({a: 2 + i for i, a in enumerate(AXES)})
    held = [o for o in spec.owed if o.kind == "@" and o.at != "last"]
    if any(o.at >= mesh.axes[o.axis] for o in held):
        with pytest.raises(SpecError, match="has coordinates 0 to"):
            spec.resolve(mesh)
        return
    kind = spec.resolve(mesh)
    assert kind.resolve(mesh) == kind == parse(str(kind)) and "/1" not in str(kind).split("/1")[0]
    assert (not any(f.whole for d in kind.dims for f in d.factors)
            and not any(o.at == "last" for o in kind.owed))


# -- arbitrary text ------------------------------------------------------------------------------------------

ALPHABET = "ABDT abxy/~()+@:.10_,-> \tmaxlst\n"
pieces = st.sampled_from(("B", "T/tp", "D/1", "~J", "(E/ep B/dp)~J", "(", ")", "(K/tp G H)", "(K G/tp)",
                          "...", "+tp", "+dp", "max:tp", "@pp:0", "@pp:last", "4", "0", "/", "//", "+", "@",
                          "max:", " ", "  ", "\t", "D", "()", "é", "１", "\u00a0", "B B", "->", ",", "*"))


def ends_well(text: str) -> None:
    start = time.perf_counter()
    try:
        spec = parse(text)
    except SpecError as error:
        assert str(error)
    else:
        assert parse(str(spec)) == spec
        assert re.fullmatch(r"[A-Za-z0-9_~/()+:@. ]*", str(spec))
    try:
        ins, outs = parse_signature(text)
    except SpecError:
        pass
    else:
        assert all(s is None or isinstance(s, Spec) for s in (*ins, *outs))
    assert time.perf_counter() - start < 1


@given(st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=20),
                 st.lists(pieces, max_size=12).map("".join), st.lists(pieces, max_size=12).map(" ".join)))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    ends_well(text)


@pytest.mark.parametrize("unit", ("A", "(", ")", "()", "( ", "A/", "A/a", "/a", " ", "A ", "+", "+a ", "~",
                                  "(A)", "1", "1 ", "@a:1", "9", ".", "A(", "\t", "A,", "->"))
def test_long_text_ends_soon(unit: str) -> None:
    ends_well(unit * (MAX_TEXT // len(unit)))
    ends_well("B " + unit * ((MAX_TEXT - 4) // len(unit)) + " )")


def test_many_names_and_axes_end_soon() -> None:
    ends_well(" ".join(f"A{i}" for i in range(400)))
    ends_well("A" + "".join(f"/a{i}" for i in range(380)))
    ends_well(" ".join(f"+a{i}" for i in range(330)))


# -- what is refused, in whole -------------------------------------------------------------------------------

NOT_AN_ITEM = "is neither a dim (D, D/tp, D/1, 4, (K G H), (E B T)~J) nor owed (+tp, max:tp, @pp:0)"
BLANKS = "items are separated by blanks, and each parenthesis has its partner"


@pytest.mark.parametrize("text, says", (
    ("", 'an empty string is no spec; the scalar is written "()"'),
    ("   ", 'an empty string is no spec; the scalar is written "()"'),
    ("B B", 'spec "B B": dim B appears twice; give the second one its own letter'),
    ("(K G) G", 'spec "(K G) G": dim G appears twice; give the second one its own letter'),
    ("T/tp D/tp", 'spec "T/tp D/tp": axis tp is used twice; an axis splits one dim, or is owed, once'),
    ("T/tp/tp", 'spec "T/tp/tp": axis tp is used twice; an axis splits one dim, or is owed, once'),
    ("T/tp D +tp", 'spec "T/tp D +tp": axis tp is used twice; an axis splits one dim, or is owed, once'),
    ("T +tp +tp", 'spec "T +tp +tp": axis tp is used twice; an axis splits one dim, or is owed, once'),
    ("T max:x +y",
     'spec "T max:x +y": an owed max beside an owed sum has no meaning; reduce one of them first'),
    ("T +x D", "spec 'T +x D': D stands after +x; dims come before what is owed"),
    ("T ...", f"spec 'T ...': '...' {NOT_AN_ITEM}"),
    ("T/2", f"spec 'T/2': 'T/2' {NOT_AN_ITEM}"),
    ("T/tp~", f"spec 'T/tp~': {BLANKS}"),
    ("T~J", f"spec 'T~J': {BLANKS}"),
    ("(E B)~", f"spec '(E B)~': {BLANKS}"),
    ("(E B)~J/tp", f"spec '(E B)~J/tp': {BLANKS}"),
    ("(E)~J", "spec '(E)~J': (E)~J is no group; a group holds names, as in (K/tp G H)"),
    ("T/", f"spec 'T/': 'T/' {NOT_AN_ITEM}"),
    ("4/tp", f"spec '4/tp': '4/tp' {NOT_AN_ITEM}"),
    ("-1", f"spec '-1': '-1' {NOT_AN_ITEM}"),
    ("é", f"spec 'é': 'é' {NOT_AN_ITEM}"),
    ("T @pp:x", f"spec 'T @pp:x': '@pp:x' {NOT_AN_ITEM}"),
    ("B,T", f"spec 'B,T': 'B,T' {NOT_AN_ITEM}"),
    ("B\tT", f"spec 'B\\tT': {BLANKS}"),
    ("(K G", f"spec '(K G': {BLANKS}"),
    ("(K G)H", f"spec '(K G)H': {BLANKS}"),
    ("((K G) H)", f"spec '((K G) H)': {BLANKS}"),
    ("(K\tG)", f"spec '(K\\tG)': 'K\\tG' {NOT_AN_ITEM}"),
    ("B ()", "spec 'B ()': () is no group; a group holds names, as in (K/tp G H)"),
    ("(K 4)", "spec '(K 4)': (K 4) is no group; a group holds names, as in (K/tp G H)"),
    ("(4 D)~J", "spec '(4 D)~J': (4 D)~J is no group; a group holds names, as in (K/tp G H)"),
    ("(K G/tp)", "spec '(K G/tp)': in the group (K G/tp) only the first factor may be split"),
    ("B (K G H/tp)", "spec 'B (K G H/tp)': in the group (K G H/tp) only the first factor may be split"),
    ("A" * 2001, "spec of 2001 characters; the longest allowed has 2000"),
    (["B"], "a spec is a string, not list"),
    (None, "a spec is a string, not NoneType"),
))
def test_a_refusal_says(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == says


@pytest.mark.parametrize("text, says", (
    ("B T", '"B T": a signature has exactly one "->" between its operands and its result'),
    ("B -> T -> D", '"B -> T -> D": a signature has exactly one "->" between its operands and its result'),
    ("B,, T -> B", 'an empty string is no spec; the scalar is written "()"'),
    ({}, "a signature is a string, not dict"),
    ("B" * 16001, "signature of 16001 characters; the longest allowed has 16000"),
))
def test_a_refused_signature_says(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_signature(text)
    assert str(caught.value) == says


@pytest.mark.parametrize("text, says", (
    ("T/z", 'spec "T/z": unknown axis z; the mesh has x, y, xy'),
    ("T +z", 'spec "T +z": unknown axis z; the mesh has x, y, xy'),
    ("T/x D/xy", 'spec "T/x D/x/y": axis x is used twice; an axis splits one dim, or is owed, once'),
    ("T @x:2", 'spec "T @x:2": axis x has coordinates 0 to 1, not 2'),
))
def test_a_type_that_the_mesh_lacks_says(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text).resolve(Mesh(x=2, y=3, xy=("x", "y")))
    assert str(caught.value) == says


# -- what a spec says ----------------------------------------------------------------------------------------

def test_labels_names_and_axes() -> None:
    spec = parse("B/dp (K/tp G H) 4 (E/ep R/cp)~J T/1 +x @pp:last")
    assert spec.labels == ("B", "(K G H)", "4", "(E R)~J", "T")
    assert spec.names == ("B", "K", "G", "H", "E", "R", "T")
    assert (spec.axes("(K G H)"), spec.axes("4"), spec.axes("T"), spec.split_axes,
            spec.owed_axes) == (("tp",), (), (), ("dp", "tp", "ep", "cp"), ("x",))
    assert str(spec.whole()) == "B (K G H) 4 (E R)~J T"
    made = spec.owing("q").split({"B": ("x", "y"), "(K G H)": ("z",)})
    assert str(made) == "B/x/y (K/z G H) 4 (E/ep R/cp)~J T +q"
    assert str(made.split_by({"B": ("x",), "R": ("y",), "G": ("z",)})) == "B/x (K G H) 4 (E R/y)~J T +q"


def test_a_type_has_no_aliases() -> None:
    mesh = Mesh(dp=2, tp=3, ep=("dp", "tp"))
    assert str(parse("E/ep D/1").resolve(mesh)) == "E/dp/tp D"
    assert str(parse("E/1 D +ep").resolve(mesh)) == "E D +dp +tp"
    assert str(parse("D @tp:last").resolve(mesh)) == "D @tp:2"


@given(st.lists(specs(), min_size=1, max_size=3), st.sampled_from((None, "B", "+tp", "(K G)", "nothing")))
@example([parse("B 4 4"), parse("4 B")], "4")
def test_any_specs_are_aligned_by_dim(found: list[Spec], caret: str | None) -> None:
    lines = aligned([(f"x{i}", s, "") for i, s in enumerate(found)], caret).split("\n")
    for line, spec in zip(lines, found):
        assert sorted(line.split()[1:]) == sorted(str(spec).split())
