"""The mutants: one line of the code, what is put in its place, and the tests that must notice.

A survivor is a hole in the tests. Once there is a test for it, it stays here, so that the test keeps its teeth. `old` is in its file
exactly once, and says so much that it stays so.
"""
from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """file: from the root.  old, new: text.  tests: files, or tests, with blanks between them."""
    file: str
    old: str
    new: str
    tests: str


PASSES, PLANNER, IN_PLACE, COND, GRAD = ("tests/test_passes.py", "tests/test_planner.py", "tests/test_in_place.py", "tests/test_cond.py",
                                         "tests/test_grad.py")
PACK, API, PROVE, EXPLAIN, LAYOUT, MESH = ("tests/test_pack.py", "tests/test_api.py", "tests/test_prove.py", "tests/test_explain.py",
                                           "tests/test_layout.py", "tests/test_mesh.py")
GROUP, ROUTING, WATCHDOG, TENSORS, QUEUE = (f"tests/distributed/test_{name}.py" for name in (
    "group_coordinator", "routing", "watchdog", "tensor_dicts", "message_queue"))
NVLINK, PROTOCOLS = "tests/ops/test_nvlink.py", "tests/triton_kernels/test_protocols.py"
CALLS = "tests/test_calls.py"
EXCHANGES = PLANNER + " -k exchange_says"
ASKED = GROUP + " -k all_members_ask"
CUT_OFF = WATCHDOG + " -k cut_off_from"
FITS = TENSORS + " -k a_spec_that_fits"
FORKED = QUEUE + " -k forked_child_that_closes"
ONCE = PROTOCOLS + " -k pushed_once"
RIGHT = PROTOCOLS + " -k without_a_change"

MUTANTS = (
    # shardlib/passes
    Mutant("shardlib/passes/hoist_sums.py", 'any(o.kind == "max" for o in a.ins[0].owed) or ', "", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", "(a.inputs[0], b.inputs[0]), (total,)", "(b.inputs[0], a.inputs[0]), (total,)", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", "Step(step.op, (a.ins[0]", "Step(ADD, (a.ins[0]", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", "(a.ins, a.outs) != (b.ins, b.outs) or ", "", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", "(a.ins, a.outs) != (b.ins, b.outs)", "a.outs != b.outs", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", " or any(count[s.outputs[0]] != 1 for s in (a, b))", "", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", "steps = tuple(s.rewritten(hoist_sums) for s in program.steps)", "steps = program.steps", PASSES),
    Mutant("shardlib/passes/hoist_sums.py", "while (changed := _once(program)) is not program:\n        program = changed", "program = _once(program)", PASSES),
    Mutant("shardlib/passes/replan_moves.py", "count[before.outputs[0]] == 1", "count[before.outputs[0]] >= 1", PASSES),
    Mutant("shardlib/passes/replan_moves.py", "            if not moves:\n                alias[step.outputs[0]] = here\n", "", PASSES),
    Mutant("shardlib/passes/replan_moves.py", "and then[1] < now[1]", "and then[1] <= now[1] + 1", PASSES),
    Mutant("shardlib/passes/replan_moves.py", "then[0] < now[0] - 1e-12 or ", "", PASSES),
    Mutant("shardlib/passes/replan_moves.py", "then[0] < now[0] - 1e-12 or then[0] <= now[0] + 1e-12 and then[1] < now[1]", "then[0] < now[0] - 1e-12", PASSES),
    Mutant("shardlib/passes/replan_moves.py", "alias.get(v, v) for v in r.values", "v for v in r.values", PASSES),
    Mutant("shardlib/passes/replan_moves.py", ".rewritten(lambda body: replan_moves(body, mesh))", "", PASSES),
    Mutant("shardlib/passes/dead_steps.py", "needed.intersection(step.outputs)", "needed.intersection(step.outputs[:1])", PASSES),
    Mutant("shardlib/passes/dead_steps.py", "step.rewritten(drop_dead_steps)", "step", PASSES),
    Mutant("shardlib/passes/rewrite.py", ", *(n for n, _ in program.result_leaves())", "", PASSES),
    # shardlib/emit.py, moves.py, simulate.py
    Mutant("shardlib/emit.py", "all(uses[n] == 1 for n in chain[1:] or chain)", "all(uses[n] >= 1 for n in chain[1:] or chain)", IN_PLACE),
    Mutant("shardlib/emit.py", "for n in chain[1:] or chain)", "for n in chain[-1:])", IN_PLACE),
    Mutant("shardlib/emit.py", "i in owned and uses[i] == 1}", "i in owned and uses[i] >= 1}", IN_PLACE),
    Mutant("shardlib/emit.py", "if p in updated - donated and uses[p] == 1]", "if p in updated - donated and uses[p] > 1]", IN_PLACE),
    Mutant("shardlib/emit.py", "and outer[path] in owned and uses[outer[path]] == 1}", "and outer[path] in owned}", IN_PLACE),
    Mutant("shardlib/moves.py", "for a in members for b in members}) == 1\n    got", "for a in [e.coordinate] for b in members}) == 1\n    got", EXCHANGES),
    Mutant("shardlib/moves.py", "for a in members for b in members}) == 1\n    got", "for a in members for b in members}) == 0\n    got", EXCHANGES),
    Mutant("shardlib/moves.py", "have, want, changed, c, e.coordinate) for c in members]", "have, want, changed, e.coordinate, c) for c in members]", EXCHANGES),
    Mutant("shardlib/moves.py", "key=lambda j: (arrive[j][dim][0], j))", "key=lambda j: j)", PLANNER + " -k relabels_its_value"),
    Mutant("shardlib/simulate.py", "if any(t != told[0] for t in told):", "if False:", "tests/test_simulate.py"),
    Mutant("shardlib/simulate.py", "if even and len(", "if len(", "tests/test_simulate.py"),
    # shardlib/emit.py, moves.py, convert.py
    Mutant("shardlib/emit.py", "torch.stack({lists[out]}{reverse})", "torch.stack({lists[out]})", GRAD),
    Mutant("shardlib/emit.py", '".unbind(0)") + reverse for p', '".unbind(0)") for p', GRAD),
    Mutant("shardlib/emit.py", "frozenset(inner[p] for p in leaves[1 + count:]), {}",
           "frozenset(inner[p] for p in leaves[1:] if p in inner), {}", IN_PLACE),
    Mutant("shardlib/emit.py", "if sizes.setdefault(name, n) != n:", "if sizes.setdefault(name, n) > n:", API),
    Mutant("shardlib/moves.py", "if any(e.coordinate[a] for a in fresh):",
           "if fresh and all(e.coordinate[a] for a in fresh):", PLANNER + " -k relabels_its_value"),
    Mutant("shardlib/moves.py", "{('sum' if kind == '+' else 'max')!r}", "{'sum'!r}", PLANNER + " -k relabels_its_value"),
    Mutant("shardlib/moves.py", "pads[2 * (len(have.dims) - 1 - i)] = at - start",
           "pads[2 * (len(have.dims) - 1 - i)] = start + size - at - n", PLANNER + " -k relabels_its_value"),
    Mutant("shardlib/convert.py", "2 * (k - 1) / k * local", "(k - 1) / k * local", PLANNER + " -k costs_is"),
    Mutant("shardlib/convert.py", "return a.op in (SHARD, OWE) or changed_dims", "return changed_dims", PLANNER + " -k one_move"),
    Mutant("shardlib/convert.py", "return a.op in (SHARD, OWE) or changed_dims(a.have, a.want) == changed_dims(b.have, b.want)",
           "return True", PLANNER + " -k relabels_its_value"),
    Mutant("shardlib/convert.py", 'due = [a for a in want.owed_axes if all(o.kind != "max" for o in here.owed)]',
           "due = list(want.owed_axes)", PLANNER + " -k every_pair"),
    # shardlib/complete.py, grad.py, pack.py, params.py
    Mutant("shardlib/complete.py", "for (p, _), n in zip(body.arg_leaves(), inputs[1:]) if n in self.params}",
           "for (p, _), n in zip(body.arg_leaves(), inputs) if n in self.params}", COND),
    Mutant("shardlib/complete.py", "!= [k for _, k in bodies[1].arg_leaves()] or \\", "!= [k for _, k in bodies[0].arg_leaves()] or \\", COND),
    Mutant("shardlib/complete.py", "!= [k for _, k in bodies[1].result_leaves()]:", "!= [k for _, k in bodies[0].result_leaves()]:", COND),
    Mutant("shardlib/complete.py", 'inputs[0] = self.move(inputs[0], whole, "the predicate of cond")', "pass", COND),
    Mutant("shardlib/complete.py", "inner.params |= {p for p, n in zip(paths, inputs) if n in self.params}",
           "pass", COND),
    Mutant("shardlib/grad.py", "params = {p for p, n in outer.items() if self.root.get(n, n) in self.params}",
           "params = {p for p, n in outer.items() if n in self.params}", GRAD),
    Mutant("shardlib/grad.py", "if settle or len(by_type) > 1:", "if settle:", GRAD),
    Mutant("shardlib/grad.py", '"stacked": len(stacked) + len(made), "reverse": True', '"stacked": len(stacked) + len(made), "reverse": False', GRAD),
    Mutant("shardlib/grad.py", " and not self.types[root].owed else name", " else name", GRAD),
    Mutant("shardlib/grad.py", "active = {p for p, n in outer.items() if n in self.active} | {paths[0]}",
           "active = {p for p, n in outer.items() if n in self.active}", GRAD),
    Mutant("shardlib/grad.py", "self.given.setdefault(self.root.get(name, name), [])", "self.given.setdefault(name, [])", GRAD),
    Mutant("shardlib/pack.py", " and used.count(step.inputs[1]) == 1:", ":", PACK),
    Mutant("shardlib/pack.py", 'if n.split(".")[0] in prepared and uses[n] == 1}', 'if n.split(".")[0] in prepared}', PACK),
    Mutant("shardlib/pack.py", "if inner and right and x.labels == left + inner and w.labels == inner + right and", "if inner and right and", PACK),
    Mutant("shardlib/pack.py", "and out not in results else None", "else None", PACK),
    Mutant("shardlib/pack.py", "joins if joins and all(i in made for i in joins.inputs[1:]) else None", "joins", PACK),
    Mutant("shardlib/pack.py", "(joins.op, joins.inputs[1:], joins.attrs, step", "(joins.op, joins.attrs, step", PACK),
    Mutant("shardlib/params.py", "out.append((name, present(value)) if isinstance(value, Params) else name)", "out.append(name)", API),
    Mutant("shardlib/params.py", "1 / math.sqrt(max(fan, 1))", "1 / max(fan, 1)", API),
    Mutant("shardlib/params.py", 'Spec(meta["spec"].dims[:1])', "Spec(spec.dims[:1])", API),
    Mutant("shardlib/params.py", 'if meta["scale"] is not None else', 'if meta["scale"] else', API),
    Mutant("shardlib/params.py", "index = index[..., None] * whole +", "index = index[..., None] * size +", API),
    Mutant("shardlib/params.py", "zlib.crc32(name.encode()) ^", 'zlib.crc32(b"") ^', API),
    # shardlib/prove.py, project.py, explain.py, dtypes.py
    Mutant("shardlib/prove.py", "s.op in COLLECTIVES or any(map(_communicates, s.bodies)) for s", "s.op in COLLECTIVES for s", COND),
    Mutant("shardlib/prove.py", "if mine is not None and call.numel != prod(mine):", "if False:", PROVE),
    Mutant("shardlib/prove.py", "{call.op}{call.group}{call.dtype}{call.shapes}{call.root}", "{call.op}{call.group}{call.dtype}{call.root}", PROVE),
    Mutant("shardlib/prove.py", "        for body in step.bodies:\n            check_branches(body)\n", "", COND),
    Mutant("shardlib/project.py",
           "(self.op, self.group, self.dtype, self.shapes, self.root) == (other.op, other.group, other.dtype, other.shapes, other.root)",
           "(self.op, self.group, self.dtype, self.shapes) == (other.op, other.group, other.dtype, other.shapes)", PROVE),
    Mutant("shardlib/project.py", "piece = local // len(group) + (group.index(rank) < local % len(group))",
           "piece = local // len(group)", EXPLAIN),
    Mutant("shardlib/project.py", "ALL_REDUCE: 2 * (k - 1) / k", "ALL_REDUCE: (k - 1) / k", PLANNER + " -k costs_is"),
    Mutant("shardlib/explain.py", "n + again * max(more)", "n + again * sum(more)", "tests/test_programs.py -k larger_branch"),
    Mutant("shardlib/explain.py", "self.default), times * again, taken)", "self.default), again, taken)", EXPLAIN),
    Mutant("shardlib/explain.py", "whole if even or not exchange else -1", "whole", EXPLAIN),
    Mutant("shardlib/explain.py", '("max" if any(o.kind == "max" for o in have.owed) else "sum")', '"sum"', CALLS),
    Mutant("shardlib/explain.py", "want if step.op is ALL_GATHER else have, sizes", "have, sizes", CALLS),
    Mutant("shardlib/explain.py", "{exchanged(mesh, sizes, have, want, a, b) for a in members for b in members}",
           "{exchanged(mesh, sizes, have, want, members[0], b) for b in members}", EXPLAIN),
    Mutant("shardlib/dtypes.py", "step.inputs[len(step.inputs) - len(paths):]", "step.inputs", COND),
    Mutant("shardlib/dtypes.py", "if i in step.op.index and i not in kept)", "if i in step.op.index)", EXPLAIN),
    # shardlib/layout.py, mesh.py, spec.py, variables.py, local.py, step.py
    Mutant("shardlib/layout.py", "                used.update(prefix)\n", "", LAYOUT),
    Mutant("shardlib/layout.py", "            return axes[:i]\n", "            return ()\n", LAYOUT),
    Mutant("shardlib/layout.py", "if f.axes or f.whole}, **inner}", "if f.axes or f.whole}}", LAYOUT),
    Mutant("shardlib/mesh.py", "min(i, more), each + (i < more)", "min(i, more), each + (i <= more)", MESH),
    Mutant("shardlib/mesh.py", "each * i + min(i, more)", "each * i + i * bool(more)", MESH),
    Mutant("shardlib/mesh.py", "return start * inner, size * inner", "return start, size * inner", MESH),
    Mutant("shardlib/mesh.py", "for axis, size in reversed(self.axes.items()):", "for axis, size in self.axes.items():", MESH),
    Mutant("shardlib/mesh.py", 'if o.kind == "@" and not 0 <= o.at < self.axes[o.axis]:',
           'if o.kind == "@" and not 0 <= o.at <= self.axes[o.axis]:', MESH),
    Mutant("shardlib/spec.py", "tuple(sorted(self.owed, key=lambda o: o.axis))", "tuple(self.owed)", "tests/test_spec.py"),
    Mutant("shardlib/variables.py", "loops | {name for name, count in assigned.items() if count > 1}", "loops", f"{COND} {IN_PLACE}"),
    Mutant("shardlib/variables.py", "_renamed(block, {}, loops | ", "_renamed(block, {}, ", f"{GRAD} {IN_PLACE}"),
    Mutant("shardlib/local.py", "kinds = [s.owing(*(a for a in busy if a not in s.split_axes and a not in s.owed_axes)) for s in step.ins]",
           "kinds = [s.owing() for s in step.ins]", "tests/test_local.py"),
    Mutant("shardlib/step.py", "*[x.key for x in operands], *attrs.items())", "*[x.key for x in operands])", API),
    Mutant("shardlib/step.py", "if op is RENAME:", "if False:", API),
    Mutant("shardlib/step.py", "Spec(v.spec.dims[1:], v.spec.owed), v.local[i], v.id == PARAM)",
           "Spec(v.spec.dims[1:], v.spec.owed), v.local[i])", API),
    # shardlib/distributed
    Mutant("shardlib/distributed/group_coordinator.py", 'self.route("all_gather", x, None, count, cut.even)',
           'self.route("all_gather", x, None, None, cut.even)', ASKED),
    Mutant("shardlib/distributed/group_coordinator.py", "call = (name, op, x.dtype, device, nbytes, even,",
           "call = (name, op, x.dtype, device, nbytes, True,", ASKED),
    Mutant("shardlib/distributed/group_coordinator.py", 'self.route("reduce_scatter", x, op, None, cut.even)',
           'self.route("reduce_scatter", x, op)', ASKED),
    Mutant("shardlib/distributed/group_coordinator.py", 'self.route("gather", x, None, count, cut.even)',
           'self.route("gather", x, None, count)', ASKED),
    Mutant("shardlib/distributed/group_coordinator.py", "pieces[0], None, sum(send) if even else -1, even)",
           "pieces[0], None, sum(send), even)", ASKED),
    Mutant("shardlib/distributed/group_coordinator.py", 'Call("send", None, dtype, device.type, count * dtype.itemsize)',
           'Call("send", None, dtype, device.type, count)', ASKED),
    Mutant("shardlib/distributed/group_coordinator.py", 'self.route("all_reduce", x, op).all_reduce',
           'self.route("all_reduce", x).all_reduce', ASKED),
    Mutant("shardlib/distributed/routing.py", 'tables = (_own(device), *map(_read, sorted(SHIPPED.glob("*.json"))))',
           'tables = (*map(_read, sorted(SHIPPED.glob("*.json"))), _own(device))', ROUTING),
    Mutant("shardlib/distributed/routing.py", " and t.hardware == hardware(device)), UNMEASURED)", "), UNMEASURED)", ROUTING),
    Mutant("shardlib/distributed/routing.py", "return ta ** (1 - x) * tb ** x", "return ta ** x * tb ** (1 - x)", ROUTING),
    Mutant("shardlib/distributed/routing.py", "(c.name, c.size, c.capturing, c.communicator) == (call.name, size, call.capturing, communicator)",
           "(c.name, c.capturing, c.communicator) == (call.name, call.capturing, communicator)", ROUTING),
    Mutant("shardlib/distributed/router.py", "        self.known.clear()\n\n    def route", "\n    def route", ROUTING),
    Mutant("shardlib/distributed/router.py", "if len(self.known) >= REMEMBERED:", "if False:", ROUTING),
    Mutant("shardlib/distributed/router.py", "self.deterministic and call.op is not None and", "self.deterministic and", ROUTING),
    Mutant("shardlib/distributed/ring.py", "if self._mine == 0 and self._process == os.getpid():", "if self._mine == 0:", FORKED),
    Mutant("shardlib/distributed/ring.py", "self.capacity - max(self._unread(i)", "self.capacity - min(self._unread(i)", QUEUE + " -k all_messages"),
    Mutant("shardlib/distributed/watchdog.py", "(self.limit_s if cut_off else 0.95 * self.timeout_s)", "0.95 * self.timeout_s", CUT_OFF),
    Mutant("shardlib/distributed/watchdog.py", "cut_off = asked is not None and at - asked > self.timeout_s / 5", "cut_off = True", CUT_OFF),
    Mutant("shardlib/distributed/watchdog.py", "self.limit_s, self.tick_s = timeout_s, 0.75 * timeout_s,",
           "self.limit_s, self.tick_s = timeout_s, 0.95 * timeout_s,", WATCHDOG + " -k states_travel"),
    Mutant("shardlib/distributed/tensor_dicts.py", "x.ndim >= len(parsed.dims)", "x.ndim > len(parsed.dims)", FITS),
    Mutant("shardlib/distributed/tensor_dicts.py", "else x.ndim == len(parsed.dims)", "else x.ndim >= len(parsed.dims)", FITS),
    Mutant("shardlib/distributed/reduction.py", "total = first.to(wide, copy=True)", "total = first.to(wide)", "tests/distributed/test_reduction.py"),
    Mutant("shardlib/distributed/reduction.py", "torch.float16: torch.float32, torch.bfloat16: torch.float32,",
           "torch.float16: torch.float16, torch.bfloat16: torch.bfloat16,", "tests/distributed/test_reduction.py"),
    Mutant("shardlib/distributed/flat.py", "if piece.data_ptr() != at or piece.untyped_storage().data_ptr() != storage:",
           "if piece.data_ptr() != at:", "tests/distributed/test_flat.py"),
    Mutant("shardlib/distributed/flat.py", "tuple(map(prod, shapes)), prod(head) <= 1, even)",
           "tuple(map(prod, shapes)), prod(head) <= 2, even)", "tests/distributed/test_flat.py"),
    Mutant("shardlib/distributed/flat.py", "even = len(set(sizes)) == 1", "even = sizes[0] == sizes[-1]", "tests/distributed/test_flat.py"),
    Mutant("shardlib/distributed/agreement.py", "if a.send[j] != b.recv[i]:", "if a.send[j] > b.recv[i]:", GROUP),
    # ops/nvlink.py, triton_kernels
    Mutant("ops/nvlink.py", "prod(cut.shapes[0][cut.dim:])", "prod(cut.whole[cut.dim:])", NVLINK),
    Mutant("ops/nvlink.py", 'call.nbytes % (QUAD if call.name == "all_reduce" else QUAD * self.size)', "call.nbytes % QUAD", NVLINK),
    Mutant("ops/nvlink.py", "return x if x.data_ptr() % QUAD == 0 else x.clone()", "return x", NVLINK),
    Mutant("ops/nvlink.py", '        if not call.even:\n            return "NVLink takes even pieces only"\n', "", NVLINK),
    Mutant("ops/nvlink.py", "self._free.pop(0)", "self._free[0]", NVLINK),
    Mutant("triton_kernels/reduce_scatter.py", "without_empty(d), lane < share, INTERPRET)", "without_empty(d), lane <= share, INTERPRET)", ONCE),
    Mutant("triton_kernels/all_reduce.py", "a, b, c, d, lane < quads, INTERPRET)", "a, b, c, d, lane <= quads, INTERPRET)", ONCE),
    Mutant("triton_kernels/all_reduce.py", "a, b, c, d, lane < share, INTERPRET)", "a, b, c, d, lane <= share, INTERPRET)", ONCE),
    Mutant("triton_kernels/all_reduce.py", "without_empty(c), without_empty(d), lane < share, INTERPRET)",
           "without_empty(c), without_empty(d), lane <= share, INTERPRET)", ONCE),
    Mutant("triton_kernels/exchange.py", "    there = lane < piece\n", "    there = lane <= piece\n", ONCE),
    Mutant("triton_kernels/exchange.py", "there & (lane % LINE == 0), INTERPRET)", "there, INTERPRET)", ONCE),
    Mutant("triton_kernels/lamport.py", "return source - (source > target)", "return source - (source < target)", ONCE),
    Mutant("triton_kernels/lamport.py", "tl.minimum(at + tl.arange(0, BLOCK), stop - 1)", "at + tl.arange(0, BLOCK)", RIGHT),
    Mutant("triton_kernels/quads.py", "rounded = bits + 0x7FFF + ((bits >> 16) & 1)", "rounded = bits + 0x8000", PROTOCOLS + " -k halves_to_even"),
)
