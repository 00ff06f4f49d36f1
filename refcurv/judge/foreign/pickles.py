"""The pickle inside a file of torch.save, parsed into plain values. Nothing is run or imported.

A pickle is a program for a machine with a stack. `parse` steps through its opcodes. It knows those
that build dictionaries, lists, tuples, texts and numbers, and it knows a few names. A name stands
for a record of ours, or for a function of ours that makes such a record. Every other opcode and
every other name is refused. No value is ever walked through recursively, so that values within
values are harmless however deep they lie.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.files.disk import is_addressable
from refcurv.law.checks import SchemaError

MAX_BYTES: Final = 16 * 2**20
MAX_OPCODES: Final = 1_000_000
MAX_MARKS: Final = 100
"""Bounds of one pickle. Chosen: two thousand tensors take 0.3 MB and 80,000 opcodes, and torch
opens four marks within one another."""

MAX_AXES: Final = 8

STORAGES: Final = MappingProxyType(
    {
        "torch DoubleStorage": "float64",
        "torch FloatStorage": "float32",
        "torch HalfStorage": "float16",
        "torch BFloat16Storage": "bfloat16",
        "torch LongStorage": "int64",
        "torch IntStorage": "int32",
        "torch ShortStorage": "int16",
        "torch CharStorage": "int8",
        "torch ByteStorage": "uint8",
        "torch BoolStorage": "bool",
    }
)
"""torch's classes of storages, as module and name → the dtype of what they hold."""

_DTYPE: Final = re.compile(r"torch (u?int(8|16|32|64)|b?float(16|32|64)|bool)")
"""dtypes as values, such as torch.float32; a note that a user put beside the tensors."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names: module, a space, name. It is never looked up."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers that lie in the archive under `key`: `length` items of `dtype`."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage. Offset and strides count items; they are checked against its length."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Its name; "bfloat16" is one."""
        return self.storage.dtype

    @property
    def span(self) -> int:
        """How many items of the storage there are from the first to the last of the tensor."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((length - 1) * stride for length, stride in steps)


def item_bytes(dtype: str) -> int:
    """Bytes of one item."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def parse(where: str, data: bytes, stored: Mapping[str, int]) -> Any:
    """The value of a pickle: dict, list, tuple, str, bytes, int, float, bool, None, Tensor, Name.

    Keys of dictionaries are texts; whole numbers become texts.

    Args:
        where: begins the messages.
        data: the bytes of the pickle.
        stored: key of each storage of the archive → its bytes.

    Raises:
        SchemaError: an opcode or a name that is not known, a tensor that its storage cannot hold,
            a bound that is exceeded, or bytes that are no pickle.

    Proof: tests/test_foreign_pickles.py::test_what_would_run_is_refused_by_name,
        tests/test_foreign_pickles.py::test_hand_made_bytes_are_read
    """
    if len(data) > MAX_BYTES:
        raise SchemaError(f"{where}: its pickle has {len(data)} bytes; at most {MAX_BYTES} are.")
    machine, file, at = _Machine(stored), io.BytesIO(data), 0
    try:
        for _ in range(MAX_OPCODES):
            at = file.tell()
            name, step, argument = _next(file)
            step(machine, argument)
            if name == "STOP":
                break
        else:
            raise _RefusedError(f"it has more than {MAX_OPCODES} opcodes")
    except _RefusedError as error:
        raise SchemaError(f"{where}: byte {at} of its pickle: {error}. Nothing was run.") from None
    except (IndexError, ValueError, OverflowError, struct.error):
        raise SchemaError(
            f"{where}: byte {at} of its pickle: it is damaged there. Copy or save it again."
        ) from None
    if at + 1 != len(data) or machine.marks or len(machine.stack) != 1:
        raise SchemaError(f"{where}: its pickle does not end where it should. Save it again.")
    return machine.stack[0]


def _next(file: io.BytesIO) -> tuple[str, Callable[[_Machine, Any], None], Any]:
    """The next opcode: its name, what it does, its argument. None is decoded that is not known."""
    opcode = _OPCODES.get(file.read(1).decode("latin1"))
    if opcode is None:
        raise ValueError("no opcode")
    if opcode.name not in _STEPS:
        raise _RefusedError(f"it has the opcode {opcode.name}{_NEEDLESS}")
    if opcode.name == "GLOBAL":  # pickletools would decode escapes that pickle leaves alone
        return opcode.name, _global, f"{_line(file)} {_line(file)}"
    return opcode.name, _STEPS[opcode.name], opcode.arg.reader(file) if opcode.arg else None


def _line(file: io.BytesIO) -> str:
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a line that does not end")
    return line[:-1].decode()


_OPCODES: Final = {opcode.code: opcode for opcode in pickletools.opcodes}


class _RefusedError(Exception):
    """What `parse` will not do."""


_NEEDLESS: Final = (
    ", which plain dictionaries of tensors and numbers do not need. "
    "Save those alone: torch.save({layer: {'A': A, 'G': G, 'n': n}}, path)"
)


class _Machine:
    """The stack, the stacks below open marks, the memo, and what the archive stores."""

    __slots__ = ("marks", "memo", "stack", "stored")

    def __init__(self, stored: Mapping[str, int]) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.stored = stored

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items


# ------------------------------------------------------------------ opcodes


def _nothing(machine: _Machine, argument: Any) -> None:
    """PROTO, FRAME, STOP."""


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, argument: Any) -> None:
        machine.push(make())

    return step


def _mark(machine: _Machine, argument: Any) -> None:
    if len(machine.marks) >= MAX_MARKS:
        raise _RefusedError(f"it opens more than {MAX_MARKS} marks within one another")
    machine.marks.append(machine.stack)
    machine.stack = []


def _tuple(machine: _Machine, argument: Any) -> None:
    machine.push(tuple(machine.since_mark()))


def _tuple_of(n: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, argument: Any) -> None:
        items = [machine.pop() for _ in range(n)]
        machine.push(tuple(reversed(items)))

    return step


def _append(machine: _Machine, argument: Any) -> None:
    _extend(machine, [machine.pop()])


def _appends(machine: _Machine, argument: Any) -> None:
    _extend(machine, machine.since_mark())


def _extend(machine: _Machine, items: list[Any]) -> None:
    if not isinstance(machine.stack[-1], list):
        raise _RefusedError("it appends to what is no list")
    machine.stack[-1].extend(items)


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _update(machine, [key, value])


def _set_items(machine: _Machine, argument: Any) -> None:
    _update(machine, machine.since_mark())


def _update(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
        raise _RefusedError("it sets entries of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise _RefusedError(f"it has a key that is a {type(key).__name__}, not a text")
        if str(key) in target:
            raise _RefusedError(f"it has the key {_shown(key)} twice")
        target[str(key)] = value


def _put(machine: _Machine, argument: Any) -> None:
    if argument >= MAX_OPCODES:
        raise _RefusedError(f"it uses place {argument} of the memo; at most {MAX_OPCODES} are read")
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    if argument not in machine.memo:
        raise _RefusedError(f"it reads place {argument} of the memo, where nothing was put")
    machine.push(machine.memo[argument])


def _global(machine: _Machine, argument: Any) -> None:
    if argument not in _CALLS and argument not in STORAGES and not _DTYPE.fullmatch(argument):
        hint = _NEEDLESS
        if argument.startswith("numpy"):
            hint = ". Save arrays as tensors, torch.from_numpy(A), or all of them by numpy.savez"
        shown = argument.replace(" ", ".", 1)
        raise _RefusedError(f"it asks for {shown!r:.120}{hint}")
    machine.push(Name(argument))


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise _RefusedError("it asks for a name that is no text")
    _global(machine, f"{module} {name}")


def _reduce(machine: _Machine, argument: Any) -> None:
    given, function = machine.pop(), machine.pop()
    call = _CALLS.get(function.text) if isinstance(function, Name) else None
    if call is None or not isinstance(given, tuple):
        what = function.text if isinstance(function, Name) else type(function).__name__
        raise _RefusedError(f"it calls {what!r:.120}, which is no function that is known")
    machine.push(call(given))


def _build(machine: _Machine, argument: Any) -> None:
    """The state of an object: of a NumPy dtype its byte order; of a dictionary nothing of ours."""
    state = machine.pop()
    of = machine.stack[-1]
    little = isinstance(of, _NumPy) and isinstance(state, tuple) and state[1:2] in (("<",), ("|",))
    if not little and not (isinstance(of, dict) and isinstance(state, dict)):
        raise _RefusedError(f"it sets the state of a {type(of).__name__}")


def _persistent(machine: _Machine, argument: Any) -> None:
    """A storage of the archive: ("storage", class, key, place, items)."""
    given = machine.pop()
    if not (isinstance(given, tuple) and len(given) == 5 and given[0] == "storage"):
        raise _RefusedError("it has a persistent id that is no storage's")
    _, kind, key, _, length = given
    if not isinstance(kind, Name) or kind.text not in STORAGES:
        raise _RefusedError("it has a storage of a class that is not known")
    if not isinstance(key, str) or key not in machine.stored:
        raise _RefusedError(f"it asks for the storage {_shown(key)}, which the file lacks")
    dtype = STORAGES[kind.text]
    if not _natural(length) or length * item_bytes(dtype) != machine.stored[key]:
        raise _RefusedError(
            f"storage {_shown(key)} has {machine.stored[key]} bytes; the pickle says "
            f"{_shown(length)} items of {dtype}"
        )
    machine.push(Storage(key, dtype, length))


_STEPS: Final[Mapping[str, Callable[[_Machine, Any], None]]] = MappingProxyType(
    {
        **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
        **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
        **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES"), _push),
        "NONE": _constant(lambda: None),
        "NEWTRUE": _constant(lambda: True),
        "NEWFALSE": _constant(lambda: False),
        "EMPTY_DICT": _constant(dict),
        "EMPTY_LIST": _constant(list),
        "EMPTY_TUPLE": _constant(tuple),
        "MARK": _mark,
        "TUPLE": _tuple,
        "TUPLE1": _tuple_of(1),
        "TUPLE2": _tuple_of(2),
        "TUPLE3": _tuple_of(3),
        "APPEND": _append,
        "APPENDS": _appends,
        "SETITEM": _set_item,
        "SETITEMS": _set_items,
        **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
        "MEMOIZE": _memoize,
        **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "REDUCE": _reduce,
        "BUILD": _build,
        "BINPERSID": _persistent,
    }
)


# ------------------------------------------------------------------ names that may be called


@dataclass(frozen=True, slots=True)
class _NumPy:
    """A NumPy dtype, little-endian, of a number that stands in the pickle itself."""

    code: str


def _shown(value: object) -> str:
    """A text or a number for a message; of anything else, which may lie within itself, its type."""
    return f"{value!r:.80}" if type(value) in (str, int) else f"a {type(value).__name__}"


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _naturals(value: object) -> bool:
    return isinstance(value, tuple) and all(_natural(n) for n in value)


def _ordered_dict(given: tuple[Any, ...]) -> dict[str, Any]:
    if given:
        raise _RefusedError("it has an OrderedDict with arguments")
    return {}


def _size(given: tuple[Any, ...]) -> tuple[int, ...]:
    if len(given) != 1 or not _naturals(given[0]):
        raise _RefusedError("it has a torch.Size of what are no lengths")
    return tuple(given[0])


def _device(given: tuple[Any, ...]) -> str:
    return " ".join(str(part) for part in given if type(part) in (str, int))


def _parameter(given: tuple[Any, ...]) -> Tensor:
    if not given or not isinstance(given[0], Tensor):
        raise _RefusedError("it has a parameter of what is no tensor")
    return given[0]


def _tensor(given: tuple[Any, ...]) -> Tensor:
    """_rebuild_tensor_v2: storage, offset, shape, strides, gradient wanted, hooks, bits."""
    if len(given) not in (6, 7) or not isinstance(given[0], Storage):
        raise _RefusedError("it has a tensor without a storage")
    storage, offset, shape, strides = given[:4]
    if len(given) == 7 and given[6]:
        raise _RefusedError("it has a tensor that torch conjugates or negates when read")
    if not (_natural(offset) and _naturals(shape) and _naturals(strides)):
        raise _RefusedError("it has a tensor whose offset, shape or strides are no natural numbers")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise _RefusedError(f"it has a tensor of {len(shape)} axes and {len(strides)} strides")
    made = Tensor(storage, offset, shape, strides)
    if made.span and offset + made.span > storage.length:
        raise _RefusedError(
            f"it has a tensor that ends at item {_shown(offset + made.span)} of storage "
            f"{_shown(storage.key)}, which has {storage.length}"
        )
    _require_apart(made)
    if not is_addressable(shape, item_bytes(storage.dtype)):
        raise _RefusedError(f"it has a tensor of shape {shape!r:.80}, larger than any file")
    return made


def _require_apart(tensor: Tensor) -> None:
    """No two entries share an item, so that a tensor is no larger than its storage."""
    reach = 0
    for stride, length in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if tensor.span and length > 1:
            if stride <= reach:
                raise _RefusedError(
                    "it has a tensor whose entries share memory (expand()?): save its .clone()"
                )
            reach += (length - 1) * stride


def _encode(given: tuple[Any, ...]) -> bytes:
    """Bytes of a number, as protocol 2 writes them."""
    if len(given) != 2 or given[1] != "latin1" or not isinstance(given[0], str):
        raise _RefusedError("it has bytes by another way than _codecs.encode(text, 'latin1')")
    return given[0].encode("latin1")


def _numpy_dtype(given: tuple[Any, ...]) -> _NumPy:
    code = given[0] if given else None
    if not isinstance(code, str) or not re.fullmatch("b1|[iu][1248]|f[248]", code):
        raise _RefusedError(f"it has the NumPy dtype {_shown(code)}, which is no number's")
    return _NumPy(code)


def _scalar(given: tuple[Any, ...]) -> int | float | bool:
    if len(given) != 2 or not isinstance(given[0], _NumPy) or not isinstance(given[1], bytes):
        raise _RefusedError("it has a NumPy number without its bytes")
    dtype = np.dtype(f"<{given[0].code}")
    if len(given[1]) != dtype.itemsize:
        raise _RefusedError(f"it has a NumPy number of {len(given[1])} bytes")
    value: int | float | bool = np.frombuffer(given[1], dtype)[0].item()
    return value


_CALLS: Final[Mapping[str, Callable[[tuple[Any, ...]], Any]]] = MappingProxyType(
    {
        "collections OrderedDict": _ordered_dict,
        "torch Size": _size,
        "torch device": _device,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch._utils _rebuild_parameter": _parameter,
        "_codecs encode": _encode,
        "numpy dtype": _numpy_dtype,
        "numpy._core.multiarray scalar": _scalar,
        "numpy.core.multiarray scalar": _scalar,
    }
)
"""Module and name → what is made of the arguments."""
