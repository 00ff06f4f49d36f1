"""What one wrong step in a function can look like: every single-point mutant of its source.

Beside what other programs change (operators, numbers, comparisons), a term or a factor is left out,
an axis is exchanged, a transposition dropped, a reduction or a cast left out, an in-place statement
deleted. Each mutant is one changed node of the syntax tree; comments and docstrings are no code.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "refcurv/model/layers.py": (),
    "refcurv/model/loss.py": (),
    "refcurv/model/transformer.py": ("_require_numbers", "require_positions"),
    "refcurv/model/gradient.py": (),
    "refcurv/model/labels.py": ("require_labels",),
    "refcurv/model/rows.py": ("require_rows",),
    "refcurv/model/sampling.py": (),
    "refcurv/model/fisher.py": (),
    "refcurv/curvature/definition.py": (),
    "refcurv/algebra/selection.py": (),
    "refcurv/editing/projection.py": (),
}
"""The modules of forward, backward, loss, A, G and the edit.

All their functions are targets, but those that only refuse what is wrong. A module that joins them,
or a new place of theirs, is one line here.
"""

Change = tuple[str, ast.AST]
"""What kind of change, and what stands in the node's place."""

OPERATORS: dict[type, tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
COMPARISONS: dict[type, tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
IN_ORDER = (ast.Sub, ast.Div, ast.MatMult, ast.FloorDiv, ast.Pow)
OTHER_NAME = {
    name: other
    for pair in (
        "argmax argmin",
        "max min",
        "sum mean",
        "any all",
        "ones zeros",
        "ones_like zeros_like",
    )
    for name, other in (pair.split(), pair.split()[::-1])
}
DROPPED_METHODS = {*"sum mean max min any all reshape transpose swapaxes astype".split()}
DROPPED_FUNCTIONS = {*"exp log sqrt cumsum".split()}
DROPPED_KEYWORDS = {"axis": "axis", "keepdims": "axis", "dtype": "type"}
LONG_ENOUGH = 6
"""Characters of code that say where they stand."""
ALLOCATIONS = {*"empty zeros zeros_like arange".split()}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong version of a module.

    Fields: path, of the module in the repository; function; number and line, of the changed place;
    change, in words; text, the module's.
    """

    path: str
    function: str
    number: int
    line: str
    change: str
    text: str = field(repr=False)

    @property
    def id(self) -> str:
        """The same as long as function, line and change are."""
        text = "\n".join([self.target, self.line, self.change])
        return sha256(text.encode()).hexdigest()[:10]

    @property
    def target(self) -> str:
        """Its function, with the place."""
        return f"{self.path}::{self.function}"

    @property
    def name(self) -> str:
        """Its function, with the module."""
        return f"{Path(self.path).stem}.{self.function}"


# ------------------------------------------------------------------ expressions


def expression_changes(node: ast.AST) -> Iterator[Change]:
    """Every change of one expression, not of the expressions inside."""
    yield from _operation_changes(node)
    yield from _index_changes(node)
    if isinstance(node, ast.Call):
        yield from _call_changes(node)


def _operation_changes(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.BinOp(left=a, op=op, right=b):
            for new in OPERATORS.get(type(op), ()):
                yield "operator", ast.BinOp(a, new(), b)
            if isinstance(op, IN_ORDER):
                yield "order", ast.BinOp(b, op, a)
            yield "missing term", a
            yield "missing term", _minus(b) if isinstance(op, ast.Sub) else b
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not(), operand=x):
            yield "sign", x
        case ast.Compare(left=a, ops=[op], comparators=[b]):
            for other in COMPARISONS.get(type(op), ()):
                yield "comparison", ast.Compare(a, [other()], [b])
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "off by one", ast.Constant(value + 1)
            yield "off by one", ast.Constant(value - 1)


def _index_changes(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Attribute(value=x, attr="T" | "real" as name):
            yield "transpose" if name == "T" else "type", x
        case ast.Subscript(value=x, slice=ast.Tuple(elts=elements), ctx=context):
            for rest in _without(elements, _is_none):
                yield "axis", ast.Subscript(x, ast.Tuple(rest), context)
        case ast.Slice(lower=lower, upper=upper):
            yield from _bound_changes(node, "lower", lower)
            yield from _bound_changes(node, "upper", upper)
        case ast.Tuple(elts=elements, ctx=context):
            for new in _exchanged(elements):
                yield "exchanged", ast.Tuple(new, context)
        case ast.List(elts=elements, ctx=context):
            for new in _exchanged(elements):
                yield "exchanged", ast.List(new, context)


def _call_changes(node: ast.Call) -> Iterator[Change]:
    match node:
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, a, b]):
            yield "exchanged", ast.Call(node.func, [condition, b, a], [])
            yield "missing term", a
            yield "missing term", b
        case ast.Call(func=ast.Name(id="max" | "min" as name), args=args):
            yield "function", ast.Call(ast.Name(OTHER_NAME[name]), args, [])
            yield from (("missing term", each) for each in args)
        case ast.Call(func=ast.Attribute(value=x, attr=name), args=args, keywords=keywords):
            if name in OTHER_NAME:
                yield "function", ast.Call(ast.Attribute(x, OTHER_NAME[name]), args, keywords)
            if name in DROPPED_METHODS and not _is_numpy(x):
                yield "transpose" if name in ("transpose", "swapaxes") else "missing call", x
            if name in DROPPED_FUNCTIONS and _is_numpy(x):
                yield "missing call", args[0]
            if name in ("transpose", "reshape"):
                for new in _exchanged(args):
                    yield "transpose", ast.Call(node.func, new, keywords)
            if name in ALLOCATIONS and len(args) == 2:
                yield "type", ast.Call(node.func, args[:1], keywords)
    for rest in _without(node.keywords, lambda k: k.arg in DROPPED_KEYWORDS):
        gone = next(k.arg for k in node.keywords if k not in rest)
        yield DROPPED_KEYWORDS[gone], ast.Call(node.func, node.args, rest)


def _bound_changes(node: ast.Slice, name: str, bound: ast.expr | None) -> Iterator[Change]:
    if bound is None:
        return
    parts = {"lower": node.lower, "upper": node.upper, "step": node.step}
    yield "off by one", ast.Slice(**(parts | {name: None}))
    if not isinstance(bound, ast.Constant | ast.UnaryOp):  # else their own change
        for op in (ast.Add(), ast.Sub()):
            near = ast.BinOp(bound, op, ast.Constant(1))
            yield "off by one", ast.Slice(**(parts | {name: near}))


def _minus(x: ast.expr) -> ast.UnaryOp:
    return ast.UnaryOp(ast.USub(), x)


def _is_none(x: ast.AST) -> bool:
    return isinstance(x, ast.Constant) and x.value is None


def _is_numpy(x: ast.AST) -> bool:
    return isinstance(x, ast.Name) and x.id == "np"


def _exchanged(items: Sequence[ast.expr]) -> Iterator[list[ast.expr]]:
    """Neighbours in each other's place."""
    for i in range(len(items) - 1):
        yield [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def _without(items: Sequence, which) -> Iterator[list]:
    """The items with one of those that `which` is true of left out."""
    yield from ([*items[:i], *items[i + 1 :]] for i, item in enumerate(items) if which(item))


# ------------------------------------------------------------------ statements


def statement_changes(node: ast.AST, bound: set[str]) -> Iterator[Change]:
    """Changes of a whole statement; `bound` are the names that have a value before it."""
    match node:
        case ast.AugAssign(target=target, op=op, value=value):
            yield "deleted", ast.Pass()
            yield "missing term", ast.Assign([target], value, lineno=0)
            for new in OPERATORS.get(type(op), ()):
                yield "operator", ast.AugAssign(target, new(), value)
        case ast.Assign(targets=[target], value=value):
            if isinstance(target, ast.Subscript) or _names(target) & bound:
                yield "deleted", ast.Pass()
            for new in _negated(value):
                yield "sign", ast.Assign([target], new, lineno=0)
        case ast.Return(value=value) if value is not None:
            for new in _negated(value):
                yield "sign", ast.Return(new)
        case ast.If(body=body, orelse=orelse):
            for always in (True, False):
                yield "branch", ast.If(ast.Constant(always), body, orelse)


def _negated(value: ast.expr) -> Iterator[ast.expr]:
    """−x for a computed x, or for each of several."""
    match value:
        case ast.Tuple(elts=elements):
            for i, each in enumerate(elements):
                for new in _negated(each):
                    yield ast.Tuple([*elements[:i], new, *elements[i + 1 :]], ast.Load())
        case ast.Call(func=ast.Attribute(attr=name)) if name in ALLOCATIONS:
            return
        case ast.BinOp() | ast.Call():
            yield _minus(value)


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


# ------------------------------------------------------------------ a function


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands: in a field of its owner, or in a list there; `above`: its ancestors."""

    owner: ast.AST
    name: str
    index: int | None
    above: tuple[ast.AST, ...]

    def put(self, node: ast.AST) -> None:
        """Let another node stand here."""
        if self.index is None:
            setattr(self.owner, self.name, node)
        else:
            getattr(self.owner, self.name)[self.index] = node


def mutants(path: str, source: str, function: str) -> list[Mutant]:
    """Every mutant of one function of a module, in the order of its lines, no two the same."""
    tree, lines = ast.parse(source), source.splitlines()
    seen, found = {ast.unparse(tree)}, []
    for place, node, changes in list(_places(find(tree, function))):
        for kind, new in changes:
            place.put(new)
            text = ast.unparse(tree)
            place.put(node)
            if text not in seen:
                seen.add(text)
                found.append((_number(node, place), _words(kind, node, new, place), text))
    out, times = [], Counter[tuple[str, str]]()
    for number, change, text in sorted(found, key=lambda f: f[0]):
        line = lines[number - 1].strip()
        times[line, change] += 1
        again = f" ({times[line, change]})" if times[line, change] > 1 else ""
        out.append(Mutant(path, function, number, line, change + again, text))
    return out


def find(tree: ast.Module, function: str) -> ast.FunctionDef:
    """The function of that name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return node
    raise KeyError(function)


def code(whole: ast.FunctionDef) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    return whole.body[1:] if ast.get_docstring(whole) else whole.body


def _number(node: ast.AST, place: Place) -> int:
    """The line of a node, or of the next ancestor that has one."""
    return next(n.lineno for n in (node, *place.above) if hasattr(n, "lineno"))


def _words(kind: str, node: ast.AST, new: ast.AST, place: Place) -> str:
    """What is changed; a short thing is shown within a longer one."""
    before, after = (ast.unparse(n).splitlines()[0] for n in (node, new))
    around = [t for n in place.above if len(t := ast.unparse(n).splitlines()[0]) >= LONG_ENOUGH]
    within = f", in {around[0]}" if len(before) < LONG_ENOUGH else ""
    return f"{kind}: {before}" + (f" → {after}" if kind != "deleted" else "") + within


def _places(whole: ast.FunctionDef) -> Iterator[tuple[Place, ast.AST, list[Change]]]:
    """Every node of a function's code, where it stands and what else could stand there."""
    bound = {a.arg for a in whole.args.args}
    waiting: list[tuple[ast.AST, ...]] = [(n, whole) for n in code(whole)]
    here = {n: Place(whole, "body", whole.body.index(n), (whole,)) for n in code(whole)}
    while waiting:
        node, *above = waiting.pop(0)
        changes = [*expression_changes(node), *statement_changes(node, bound)]
        if isinstance(above[0], ast.Assign) and isinstance(node, ast.Tuple):
            if node is above[0].value:
                changes = []  # exchanging the targets is the same
        yield here[node], node, changes
        if isinstance(node, ast.Assign):
            bound |= {n for target in node.targets for n in _names(target)}
        for name, value in ast.iter_fields(node):
            if _changes_nothing(node, name, above):
                continue
            for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    here[child] = Place(node, name, i, (node, *above))
                    waiting.append((child, node, *above))


def _changes_nothing(node: ast.AST, field: str, above: list[ast.AST]) -> bool:
    """May what stands in this field of a node stay as it is?"""
    match node:
        case ast.Call(func=ast.Attribute(attr="transpose" | "swapaxes")):
            return field == "args"  # exchanged as a whole; off by one, NumPy refuses it
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
            return _calls(above[0], "reshape")  # any negative number stands for the size to find
    return field in ("annotation", "returns")  # words


def _calls(node: ast.AST, method: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == method


# ------------------------------------------------------------------ all targets


def targets(root: Path) -> dict[str, list[str]]:
    """{module: its functions}, in the order of the modules above and of their lines."""
    out = {}
    for path, refusing in LEFT_OUT.items():
        tree = ast.parse((root / path).read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if gone := set(refusing) - set(names):
            raise SystemExit(f"{path} has no function {', '.join(sorted(gone))}: correct LEFT_OUT")
        out[path] = [name for name in names if name not in refusing]
    return out


def every_mutant(root: Path, only: Sequence[str] = ()) -> list[Mutant]:
    """The mutants of all targets, or of the functions named."""
    every = targets(root)
    known = [name for names in every.values() for name in names]
    if unknown := set(only) - set(known):
        raise SystemExit(f"no target: {', '.join(sorted(unknown))}; targets: {', '.join(known)}")
    return [
        mutant
        for path, names in every.items()
        for name in names
        if not only or name in only
        for mutant in mutants(path, (root / path).read_text(), name)
    ]


def versions(root: Path) -> dict[str, str]:
    """SHA-256 of each target, whatever its words and layout, and of all tests."""
    texts = {}
    for path, names in targets(root).items():
        tree = _without_words((root / path).read_text())
        texts |= {f"{path}::{name}": function_text(tree, name) for name in names}
    texts["tests"] = "".join(f.read_text() for f in sorted((root / "tests").glob("*.py")))
    return {name: sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def function_text(tree: ast.Module, function: str) -> str:
    """The code of a function, and the values of its module that it uses by name."""
    whole = find(tree, function)
    used = _names(whole)
    values = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign)]
    chosen = [n for n in values if used & {t.id for t in ast.walk(n) if _is_bound(t)}]
    return "\n".join(ast.unparse(n) for n in (*chosen, whole))


def _is_bound(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _without_words(source: str) -> ast.Module:
    """The code of a module, without comments and without any text that stands by itself."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            said = [n for n in node.body if isinstance(n, ast.Expr)]
            words = [n for n in said if isinstance(n.value, ast.Constant)]
            node.body = [n for n in node.body if n not in words] or [ast.Pass()]
    return tree
