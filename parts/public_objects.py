"""Every documented public object of a package once, under the name that a user types.

Paths to an object are ranked by `Path`; the least is the object's name. Modules and classes are
named first, since what a class inherits belongs to the base where the user meets that.
"""

import builtins
import heapq
import re
import sys
from collections.abc import Callable, Iterator
from inspect import cleandoc
from itertools import count
from types import BuiltinFunctionType, GenericAlias, MethodType, ModuleType
from typing import NamedTuple

from parts.foreign import (
    attribute,
    base_classes,
    is_a,
    names_in_all,
    names_in_dir,
    own_attributes,
    text_of,
)
from parts.package_modules import is_library, sibling_packages

MOST_LEVELS = 20  # below a package, whose modules may make others without end


class Member(NamedTuple):
    """What stands under a name in a module or class, its `owner`, which is a class's base that lies
    `distance` classes away where the member is inherited.
    """

    name: str
    value: object
    owner: object = None
    distance: int = 0


class Path(NamedTuple):
    """A way to reach an object; of several the least gives the name, field by field.

    level: dotted parts below the package, one more for an alias, whose end is not the object's name
    stranger: the function was made for another class, which this one does not descend from
    distance: to the class that holds the member, 0 for the class itself
    elsewhere: the object was not defined under this path
    """

    level: int
    is_alias: bool
    stranger: bool
    distance: int
    elsewhere: bool
    size: int  # of an inherited member's dotted name, else 0
    dotted_name: str


class Found(NamedTuple):
    """An object: its path, its name within its module, where it stands, and the object itself."""

    path: Path
    name: str
    member: Member
    value: object


class Documented(NamedTuple):
    """A public object: its name within its module, its dotted name, and its docstring."""

    name: str
    dotted_name: str
    docstring: str


def documented_objects(
    package: str, modules: dict[str, ModuleType], left_out: set[str], tell: Callable[..., None]
) -> Iterator[Documented]:
    """The public objects of a package that have a docstring of their own.

    modules: those that were imported, by name. Tells ("look", dotted name) before it looks at an
    object, and does not look at those `left_out`.
    """
    walk = Walk(package, modules, left_out, tell)
    for found in walk.objects():
        if is_a(found.value, type):
            walk.class_paths[id(found.value)] = found.path
    known = foreign_docstrings(walk.own)
    for found in walk.objects():
        docstring = own_docstring(found.member)
        if docstring and (found.member.name, docstring) not in known:
            yield Documented(found.name, found.path.dotted_name, docstring)


class Walk:
    """The way through a package's modules and classes, the shortest paths first."""

    def __init__(
        self, package: str, modules: dict[str, ModuleType], left_out: set[str], tell: Callable
    ) -> None:
        self.package, self.left_out = modules[package], left_out
        self.root = text_of(attribute(self.package, "__name__")) or package
        self.modules = {n: module for n, module in modules.items() if is_a(module, ModuleType)}
        self.tell = tell
        self.class_paths: dict[int, Path] = {}  # by identity; known after a first walk
        self._memory: dict[tuple[str, int], tuple] = {}
        self.own = sibling_packages(self.root, self.package)
        self.gifts = self._gifts()

    def objects(self) -> Iterator[Found]:
        """Each object once, by its least path."""
        order, seen, named = count(), set(), set()
        queue: list[tuple[Path, int, Found]] = []

        def push(path: Path, name: str, member: Member) -> None:
            value = identity(member.value)
            if id(value) not in seen and path.level <= MOST_LEVELS:
                heapq.heappush(queue, (path, next(order), Found(path, name, member, value)))

        for dotted_name, module in self.modules.items():
            name = dotted_name if dotted_name == self.root else dotted_name.rpartition(".")[2]
            push(self._module_path(dotted_name), name, Member(name, module))
        while queue:
            path, _, found = heapq.heappop(queue)
            if id(found.value) in seen or path.dotted_name in self.left_out:
                continue
            seen.add(id(found.value))
            self.tell("look", path.dotted_name)
            if path.dotted_name not in named and not self._is_hidden(found):
                named.add(path.dotted_name)
                yield found
            if is_a(found.value, ModuleType):
                listed = names_in_all(found.value)
                for member in self._members(found.value):
                    is_import = self._is_private(member.value) and member.name not in listed
                    if self._is_own(member.value) and not is_import:
                        push(self._path(path, member), member.name, member)
            elif is_a(found.value, type):
                for member in self._class_members(found.value):
                    name = f"{found.name}.{member.name}"
                    push(self._path(path, member, found.value), name, member)

    def _is_hidden(self, found: Found) -> bool:
        """Whether a module cannot be reached by its name, which leads to a function, say."""
        parent, _, name = found.path.dotted_name.rpartition(".")
        holder = own_attributes(self.modules.get(parent))
        return is_a(found.value, ModuleType) and holder.get(name, found.value) is not found.value

    def _module_path(self, name: str) -> Path:
        level = name.count(".") - self.root.count(".")
        return Path(level, False, False, 0, False, 0, name)

    def _path(self, owner: Path, member: Member, cls: type | None = None) -> Path:
        """The path to a member of a module, or of the class `cls`."""
        facts = self._facts(member.value)
        own_path = facts.import_name
        is_below = (own_path or "").startswith(f"{owner.dotted_name}.")
        if own_path and not is_below and not self._is_private(member.value):
            return self._module_path(own_path)  # not through the import of a module beside it
        dotted_name = f"{owner.dotted_name}.{member.name}"
        is_alias = facts.name not in (None, member.name)
        return Path(
            level=owner.level + 1 + is_alias,
            is_alias=is_alias,
            stranger=cls is not None and is_made_for_another(facts.qualified_name, cls),
            distance=member.distance,
            elsewhere=dotted_name != facts.home,
            size=len(dotted_name) if member.distance else 0,
            dotted_name=dotted_name,
        )

    def _class_members(self, cls: type) -> Iterator[Member]:
        """The public members that a class holds, and those of bases where no user meets them."""
        names = set()
        for distance, holder in enumerate((cls, *base_classes(cls))):
            is_met = holder is not cls and self._keeps_members(holder)
            for member in self._members(holder):
                if member.name in names:
                    continue
                names.add(member.name)
                if not is_met and self._is_own(member.value, cls):
                    yield member._replace(distance=distance)

    def _keeps_members(self, base: type) -> bool:
        """Whether a base is public on purpose: not only where it happens to be defined.

        One that is public just there keeps its members where its path is the shorter one.
        """
        path = self.class_paths.get(id(base))
        return path is not None and path.dotted_name != self._facts(base).home

    def _is_private(self, value: object) -> bool:
        """Whether this is a module that no public name imports."""
        return is_a(value, ModuleType) and "._" in f".{self._facts(value).import_name or ''}"

    def _gifts(self) -> set[int]:
        """The identities of what the package's own `__all__` takes from other packages."""
        listed = names_in_all(self.package)
        gifts = [m.value for m in self._members(self.package) if m.name in listed]
        return {
            id(identity(value))
            for value in gifts
            if not is_a(value, ModuleType)
            and top_level(self._facts(value).module or "") not in sys.stdlib_module_names
        }

    def _is_own(self, value: object, cls: type | None = None) -> bool:
        """Whether a member is a part of the package, and not imported into it from elsewhere.

        cls: the class that holds the member, if any.
        """
        facts = self._facts(value)
        if is_a(value, ModuleType):
            return is_library(facts.home, self.root)
        if id(identity(value)) in self.gifts:
            return True
        if facts.is_alias_of_type:
            return False
        module = facts.module if cls is None or not facts.knows_type_alone else facts.holder
        if module is None:
            return True
        if cls is not None and top_level(module) == top_level(self._facts(cls).module or ""):
            return True
        return any(is_library(module, own) for own in self.own)

    def _members(self, owner: object) -> list[Member]:
        home = text_of(attribute(owner, "__name__"))

        def may_look_up(name: str) -> bool:
            self.tell("look", f"{home}.{name}")
            return f"{home}.{name}" not in self.left_out

        def look() -> list[Member]:
            return list(public_members(owner, may_look_up))

        return self._remembered(("members", id(owner)), owner, look)

    def _facts(self, value: object) -> "Facts":
        return self._remembered(("facts", id(value)), value, lambda: look_at(identity(value)))

    def _remembered(self, key: tuple[str, int], value: object, make: Callable) -> object:
        """What `make` returned for this value. It is kept, so that no other has its identity."""
        if key not in self._memory:
            self._memory[key] = make(), value
        return self._memory[key][0]


# -------------------------------------------------------------------------------------------------
# What an object says of itself


def public_members(owner: object, may_look_up: Callable[[str], bool]) -> Iterator[Member]:
    """What a module or class holds itself, nothing private or inherited; of a module also what its
    `__all__` and its `__dir__` list, which may be made when it is first asked for.
    """
    members = {text_of(name): value for name, value in list(own_attributes(owner).items())}
    if is_a(owner, ModuleType):
        names = names_in_all(owner) + (names_in_dir(owner) if "__dir__" in members else [])
        made = [name for name in dict.fromkeys(names) if name not in members and is_public(name)]
        members |= {name: attribute(owner, name) for name in made if may_look_up(name)}
    for name in sorted(filter(is_public, members)):
        yield Member(name, members[name], owner)


def is_public(name: str | None) -> bool:
    """Whether a user can type this name, and should."""
    return name is not None and name.isidentifier() and not name.startswith("_")


def identity(value: object) -> object:
    """The object behind a class's or an instance's method, which is made again at each look-up."""
    if is_a(value, (classmethod, staticmethod, MethodType)):
        return attribute(value, "__func__")
    if is_a(value, BuiltinFunctionType):
        owner = value.__self__
        if owner is not None and not is_a(owner, ModuleType):
            cls = owner if is_a(owner, type) else type(owner)
            for holder in (cls, *base_classes(cls)):
                if value.__name__ in (attributes := own_attributes(holder)):
                    return attributes[value.__name__]
    return value


class Facts(NamedTuple):
    """What an object says of itself; None and "" for what it does not know.

    module: that made it; holder: the module of the class that holds it, as compiled methods know
    import_name: of a module that this name imports
    home: the dotted name under which it was defined
    is_alias_of_type: `list[int]` and the like, which speak for the class that they are made of
    knows_type_alone: `module` is that of its type
    """

    module: str | None
    holder: str | None
    name: str | None
    qualified_name: str
    import_name: str | None
    home: str
    is_alias_of_type: bool
    knows_type_alone: bool


def look_at(value: object) -> Facts:
    def text(name: str, of: object = value) -> str | None:
        return text_of(attribute(of, name))

    name, qualified_name = text("__name__"), text("__qualname__") or ""
    if is_a(value, ModuleType):
        is_imported = sys.modules.get(name) is value
        return Facts(
            name, None, (name or "").rpartition(".")[2], "", name if is_imported else None,
            name or "", False, False,
        )  # fmt: skip
    holder = text("__module__", attribute(value, "__objclass__"))
    module = text("__module__") or holder
    if module == "builtins" and not hasattr(builtins, name or ""):
        module = None  # a compiled class that does not know
    return Facts(
        module=module,
        holder=holder,
        name=name,
        qualified_name=qualified_name,
        import_name=None,
        home=".".join(filter(None, (module, qualified_name))),
        is_alias_of_type=is_a(value, GenericAlias) or is_a(attribute(value, "__origin__"), type),
        knows_type_alone=not is_a(value, type) and module == text("__module__", type(value)),
    )


def top_level(module: str) -> str:
    return module.partition(".")[0]


def is_made_for_another(qualified_name: str, cls: type) -> bool:
    """Whether a method with this `__qualname__` is of a class from which `cls` does not descend."""
    maker = qualified_name.rpartition(".")[0]
    if not maker or "<locals>" in maker:
        return False
    names = [text_of(attribute(holder, "__qualname__")) for holder in (cls, *base_classes(cls))]
    return maker not in names


# -------------------------------------------------------------------------------------------------
# Docstrings


def own_docstring(member: Member) -> str | None:
    """The docstring of a module, class, function or descriptor, unless it is its type's."""
    value = identity(member.value)
    if is_a(value, type):
        docstring = class_docstring(value)
        inherited = map(class_docstring, base_classes(value))
        if docstring is None or docstring in inherited or is_generated(docstring, value):
            return None
    else:
        in_class = is_a(member.owner, type)
        if not (is_a(value, ModuleType) or in_class or callable(value)):
            return None
        docstring = docstring_unless_of_type(value)
        if docstring is None and in_class:  # a descriptor may have it from what it returns
            docstring = docstring_unless_of_type(attribute(member.owner, member.name))
    if docstring is None or docstring.startswith("Alias for field number "):
        return None
    # Half a character cannot be written to a file.
    return cleandoc(docstring).strip().encode("utf-8", "replace").decode() or None


def class_docstring(cls: type) -> str | None:
    """What stands in the class itself."""
    return text_of(own_attributes(cls).get("__doc__"))


def docstring_unless_of_type(value: object) -> str | None:
    docstring = text_of(attribute(value, "__doc__"))
    holders = (type(value), *base_classes(type(value)))
    return None if docstring in map(class_docstring, holders) else docstring


def is_generated(docstring: str, value: type) -> bool:
    """Whether Python wrote a class's docstring, as for data classes and named tuples."""
    signature = re.escape(text_of(attribute(value, "__name__")) or "") + r"\(.*\)( -> None)?"
    return "\n\n" not in docstring and bool(re.fullmatch(signature, docstring, re.DOTALL))


def foreign_docstrings(own: set[str]) -> set[tuple[str, str]]:
    """Names and docstrings in the standard library and NumPy, which packages copy."""
    known = set()
    for module_name, module in list(sys.modules.items()):
        top = top_level(text_of(module_name) or "")
        if top in own or not (top in sys.stdlib_module_names or top == "numpy"):
            continue
        for name, value in list(own_attributes(module).items()):
            members = own_attributes(value).items() if is_a(value, type) else ()
            for key, found in ((name, value), *members):
                if docstring := text_of(attribute(found, "__doc__")):
                    known.add((key, cleandoc(docstring).strip()))
    return known
