"""drgn's types, enumerators and symbols, served from BTF and kallsyms: drgn itself knows only DWARF and CTF.

Members are made lazily, so a structure costs what is used of it.
"""

from drgn import (
    FindObjectFlags,
    Object,
    Program,
    Qualifiers,
    Symbol,
    SymbolBinding,
    SymbolKind,
    Type,
    TypeEnumerator,
    TypeKind,
    TypeMember,
)

from plugins.parasight import btf
from plugins.parasight.btf import Btf, Member, Record

_KINDS = {
    TypeKind.INT: (btf.INT,),
    TypeKind.BOOL: (btf.INT,),
    TypeKind.FLOAT: (btf.FLOAT,),
    TypeKind.STRUCT: (btf.STRUCT,),
    TypeKind.UNION: (btf.UNION,),
    TypeKind.ENUM: (btf.ENUM, btf.ENUM64),
    TypeKind.TYPEDEF: (btf.TYPEDEF,),
}
_QUALIFIERS = {btf.CONST: Qualifiers.CONST, btf.VOLATILE: Qualifiers.VOLATILE, btf.RESTRICT: Qualifiers.RESTRICT}


class BtfFinder:
    """A drgn type finder, and an object finder for enumerators and variables."""

    def __init__(self, prog: Program, types: Btf, variables: dict[str, tuple[str, int]]) -> None:
        """``variables``: name to type and address; BTF does not know the types of most."""
        self._prog, self._types, self._variables = prog, types, variables
        self._made: dict[int, Type] = {}
        self._constants: dict[str, tuple[int, int]] | None = None
        prog.register_type_finder("btf", self._find_type, enable_index=0)
        prog.register_object_finder("btf", self._find_object, enable_index=0)

    def _find_type(self, _prog, kinds, name, _filename):
        for wanted in kinds:
            for kind in _KINDS.get(wanted, ()):
                record = self._types.by_name.get((kind, name))
                if record is not None and (found := self.make(record.id)).kind == wanted:
                    return found
        return None

    def _find_object(self, prog, name, flags, _filename):
        if flags & FindObjectFlags.VARIABLE and name in self._variables:
            type_name, address = self._variables[name]
            return Object(prog, type_name, address=address)
        if flags & FindObjectFlags.CONSTANT:
            if self._constants is None:
                self._constants = self._collect()
            if name in self._constants:
                type_id, value = self._constants[name]
                return Object(prog, self.make(type_id), value=value)
        return None

    def _collect(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for record in self._types.records:
            if record.kind in (btf.ENUM, btf.ENUM64):
                for name, value in self._types.enumerators(record):
                    found.setdefault(name, (record.id, value))
        return found

    def make(self, type_id: int) -> Type:
        """The drgn type of a BTF type."""
        if type_id not in self._made:
            self._made[type_id] = self._make(self._types.records[type_id])
        return self._made[type_id]

    def _make(self, record: Record) -> Type:
        prog, types = self._prog, self._types
        match record.kind:
            case 0:
                return prog.void_type()
            case btf.INT:
                signed, boolean, _ = types.encoding(record)
                if boolean:
                    return prog.bool_type(record.name, record.value)
                return prog.int_type(record.name, record.value, signed)
            case btf.FLOAT:
                return prog.float_type(record.name, record.value)
            case btf.PTR:
                return prog.pointer_type(self.make(record.value))
            case btf.ARRAY:
                element, count = types.array(record)
                return prog.array_type(self.make(element), count)
            case btf.STRUCT | btf.UNION:
                make = prog.struct_type if record.kind == btf.STRUCT else prog.union_type
                return make(record.name or None, record.value, [self._member(m) for m in types.members(record)])
            case btf.ENUM | btf.ENUM64:
                name = "unsigned int" if record.kind == btf.ENUM else "unsigned long"
                if record.flag:
                    name = name.removeprefix("unsigned ")
                found = [TypeEnumerator(*pair) for pair in types.enumerators(record)]
                return prog.enum_type(record.name or None, prog.int_type(name, record.value, record.flag), found)
            case btf.TYPEDEF:
                return prog.typedef_type(record.name, self.make(record.value))
            case btf.CONST | btf.VOLATILE | btf.RESTRICT:
                inner = self.make(record.value)
                return inner.qualified(inner.qualifiers | _QUALIFIERS[record.kind])
            case btf.FWD:
                make = prog.union_type if record.flag else prog.struct_type
                return make(record.name)
            case btf.FUNC_PROTO:
                return prog.function_type(self.make(record.value), [])
        return self.make(record.value)  # TYPE_TAG, FUNC

    def _member(self, member: Member) -> TypeMember:
        def object_or_type() -> Object | Type:
            made = self.make(member.type_id)
            return Object(self._prog, made, bit_field_size=member.bits) if member.bits else made

        return TypeMember(object_or_type, member.name or None, member.bit_offset)


def add_symbols(prog: Program, symbols: dict[str, int]) -> None:
    """Let drgn find symbols by name; by address it has no need to."""

    def find(_prog, name, address, _one):
        if name is None or address is not None or name not in symbols:
            return []
        return [Symbol(name, symbols[name], 0, SymbolBinding.GLOBAL, SymbolKind.OBJECT)]

    prog.register_symbol_finder("kallsyms", find, enable_index=0)
