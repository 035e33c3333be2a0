"""The opcodes of pickles, all protocols (0 to 5), and running a pickle by them.

Owns which byte means what; what is done is `machine`'s. They are described in Python's `pickletools`.
"""

from __future__ import annotations

import struct
from codecs import raw_unicode_escape_decode  # by its name, it would be imported
from collections.abc import Callable

from mergekit_sd.formats.pickles.machine import LONGEST_NAME, Machine, Persistent
from mergekit_sd.formats.pickles.stream import Stream
from mergekit_sd.text import shown


def unpickle(stream: Stream, reported: dict[str, None], persistent: Persistent | None = None) -> object:
    """The value of the stream's next pickle. Raises MalformedFile, or ForbiddenCall for a call that is not allowed.

    `persistent` makes a value of what the pickle says of its storages; `reported` collects the names
    that a pickle of weights has no need of.
    """
    machine = Machine(stream, reported, persistent)
    while (opcode := stream.take(1)) != STOP:
        step = OPCODES.get(opcode)
        if step is None:
            machine.refuse(f"has the byte {opcode[0]:#04x} where an opcode should stand")
        machine.spend(1)
        try:
            step(machine)
        except ValueError as error:  # of a text that is no number, bytes that are no text
            machine.refuse(f"has an argument that cannot be read ({shown(str(error))[:LONGEST_NAME]})")
    return machine.pop()


STOP = b"."

# Every opcode but STOP, with its name in `pickletools`.
OPCODES: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": Machine.check_protocol,  # PROTO
    b"\x95": Machine.check_frame,  # FRAME
    b"(": Machine.mark,  # MARK
    b"0": Machine.drop,  # POP
    b"1": lambda m: m.since_mark().clear(),  # POP_MARK
    b"2": lambda m: m.push(m.top()),  # DUP
    b"N": lambda m: m.push(None),  # NONE
    b"\x88": lambda m: m.push(True),  # NEWTRUE
    b"\x89": lambda m: m.push(False),  # NEWFALSE
    b"I": Machine.push_number_line,  # INT
    b"L": lambda m: m.push(int(m.stream.line().rstrip(b"L"))),  # LONG
    b"J": lambda m: m.push(int.from_bytes(m.stream.take(4), "little", signed=True)),  # BININT
    b"K": lambda m: m.push(m.stream.unsigned(1)),  # BININT1
    b"M": lambda m: m.push(m.stream.unsigned(2)),  # BININT2
    b"\x8a": lambda m: m.push_long(1),  # LONG1
    b"\x8b": lambda m: m.push_long(4),  # LONG4
    b"F": lambda m: m.push(float(m.stream.line())),  # FLOAT
    b"G": lambda m: m.push(struct.unpack(">d", m.stream.take(8))[0]),  # BINFLOAT
    b"S": Machine.push_quoted,  # STRING
    b"T": lambda m: m.push_old_string(m.stream.counted(4)),  # BINSTRING
    b"U": lambda m: m.push_old_string(m.stream.counted(1)),  # SHORT_BINSTRING
    b"B": lambda m: m.push(m.stream.counted(4)),  # BINBYTES
    b"C": lambda m: m.push(m.stream.counted(1)),  # SHORT_BINBYTES
    b"\x8e": lambda m: m.push(m.stream.counted(8)),  # BINBYTES8
    b"\x96": lambda m: m.push(m.stream.counted(8)),  # BYTEARRAY8
    b"V": lambda m: m.push(raw_unicode_escape_decode(m.stream.line())[0]),  # UNICODE
    b"X": lambda m: m.push_text(m.stream.counted(4)),  # BINUNICODE
    b"\x8c": lambda m: m.push_text(m.stream.counted(1)),  # SHORT_BINUNICODE
    b"\x8d": lambda m: m.push_text(m.stream.counted(8)),  # BINUNICODE8
    b")": lambda m: m.push(()),  # EMPTY_TUPLE
    b"t": lambda m: m.push(tuple(m.since_mark())),  # TUPLE
    b"\x85": lambda m: m.collect(1),  # TUPLE1
    b"\x86": lambda m: m.collect(2),  # TUPLE2
    b"\x87": lambda m: m.collect(3),  # TUPLE3
    b"]": lambda m: m.push([]),  # EMPTY_LIST
    b"l": lambda m: m.push(m.since_mark()),  # LIST
    b"a": lambda m: m.extend([m.pop()]),  # APPEND
    b"e": lambda m: m.extend(m.since_mark()),  # APPENDS
    b"}": lambda m: m.push({}),  # EMPTY_DICT
    b"d": Machine.new_dictionary,  # DICT
    b"s": Machine.store_one,  # SETITEM
    b"u": lambda m: m.store_pairs(m.since_mark()),  # SETITEMS
    b"\x8f": lambda m: m.push([]),  # EMPTY_SET: a list, since nobody asks what is in one
    b"\x90": lambda m: m.extend(m.since_mark()),  # ADDITEMS
    b"\x91": lambda m: m.push(m.since_mark()),  # FROZENSET
    b"p": lambda m: m.put(int(m.stream.line())),  # PUT
    b"q": lambda m: m.put(m.stream.unsigned(1)),  # BINPUT
    b"r": lambda m: m.put(m.stream.unsigned(4)),  # LONG_BINPUT
    b"\x94": Machine.memoize,  # MEMOIZE
    b"g": lambda m: m.get(int(m.stream.line())),  # GET
    b"h": lambda m: m.get(m.stream.unsigned(1)),  # BINGET
    b"j": lambda m: m.get(m.stream.unsigned(4)),  # LONG_BINGET
    b"c": lambda m: m.push_global(m.stream.line().decode(), m.stream.line().decode()),  # GLOBAL
    b"\x93": Machine.stack_global,  # STACK_GLOBAL
    b"R": Machine.reduce,  # REDUCE
    b"b": Machine.build,  # BUILD
    b"i": Machine.old_instance,  # INST
    b"o": Machine.old_object,  # OBJ
    b"\x81": Machine.new_object,  # NEWOBJ
    b"\x92": lambda m: m.new_object(m.pop()),  # NEWOBJ_EX
    b"\x82": lambda m: m.extension(1),  # EXT1
    b"\x83": lambda m: m.extension(2),  # EXT2
    b"\x84": lambda m: m.extension(4),  # EXT4
    b"P": lambda m: m.persist(m.stream.line().decode()),  # PERSID
    b"Q": lambda m: m.persist(m.pop()),  # BINPERSID
    b"\x97": lambda m: m.refuse("refers to a buffer outside of itself"),  # NEXT_BUFFER
    b"\x98": Machine.top,  # READONLY_BUFFER
}
