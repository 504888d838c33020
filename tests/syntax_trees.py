"""Syntax trees of a package as one: which function is which, who calls it, and of what type a receiver probably is.

Types are read from annotations and constructors; of a receiver without any, a method is ours if a class of ours has one of that
name.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

PRIMITIVES = {"wait", "wait_for", "get", "put", "join", "acquire", "result", "recv", "communicate"}
"""Methods that are never taken to be ours by their name alone."""
TASKS = r"\b(Task|asyncio\.Future)\b"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Function:
    module: "Module"
    node: FunctionNode
    qualname: str
    owner: str
    """The class whose method it is, or lies in; else empty."""
    is_method: bool
    outer: "Function | None"

    @property
    def is_async(self) -> bool:
        return isinstance(self.node, ast.AsyncFunctionDef)

    @cached_property
    def parameters(self) -> list[ast.arg]:
        """As callers give them: without self."""
        given = self.node.args
        return [*given.posonlyargs, *given.args, *given.kwonlyargs][1 if self.is_method else 0 :]

    @cached_property
    def locals(self) -> dict[str, str]:
        """Name -> type, as far as it is known."""
        found = {parameter.arg: type_name(parameter.annotation) for parameter in self.parameters}
        for node in ast.walk(self.node):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, constructed(node.value))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = type_name(node.annotation)
            elif isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
                found[node.optional_vars.id] = constructed(node.context_expr)
        return found

    @cached_property
    def tasks(self) -> set[str]:
        """Names of asyncio tasks and of collections of them; their `result` never waits."""
        found = {p.arg for p in self.parameters if p.annotation and re.search(TASKS, ast.unparse(p.annotation))}
        makes: list[tuple[ast.expr, ast.expr]] = []
        for node in ast.walk(self.node):
            if isinstance(node, ast.Assign):
                makes.append((node.targets[0], node.value))
            elif isinstance(node, ast.comprehension | ast.For):
                makes.append((node.target, node.iter))
        for _ in makes:
            for target, value in makes:
                names = {name.id for name in ast.walk(value) if isinstance(name, ast.Name)}
                if names & found or re.search(r"\b(create_task|ensure_future|first_of)\(", ast.unparse(value)):
                    found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
        return found

    def assigned(self, name: str) -> list[ast.expr]:
        """What a local name is made of."""
        assignments = [node for node in ast.walk(self.node) if isinstance(node, ast.Assign)]
        return [a.value for a in assignments if any(isinstance(t, ast.Name) and t.id == name for t in a.targets)]


def type_name(annotation: ast.expr | None) -> str:
    """The name of a class without its module and parameters; empty where it could be anything."""
    match annotation:
        case ast.Attribute(value=ast.Name(id="asyncio"), attr="Future"):
            return "Task"  # which is one, and unlike the Future of threads never waits
        case ast.Constant(value=str(text)):
            return type_name(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=kind) | ast.Subscript(value=kind):
            return type_name(kind)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return "" if len(name) == 1 or name in ("Any", "object", "type", "Callable") else name
    return ""


def constructed(value: ast.expr) -> str:
    """The class of `Class(...)`."""
    match value:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name.lstrip("_")[:1].isupper():
            return name
    return ""


def _root(path: str) -> str:
    return path.partition(".")[0]


class Module:
    """One syntax tree, and what stands where in it."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.tree = ast.parse(source)
        self.parents: dict[ast.AST, ast.AST] = {}
        self.imports: dict[str, str] = {}
        self.functions: dict[ast.AST, Function] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        for node in ast.walk(self.tree):
            self.parents |= dict.fromkeys(ast.iter_child_nodes(node), node)
            if isinstance(node, ast.Import):
                self.imports |= {a.asname or _root(a.name): a.name if a.asname else _root(a.name) for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        self._read(self.tree, "", "", None)

    def _read(self, node: ast.AST, prefix: str, owner: str, outer: Function | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                self.classes[child.name] = child
                self._read(child, f"{prefix}{child.name}.", child.name, outer)
            elif isinstance(child, FunctionNode):
                is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in child.decorator_list)
                is_method = isinstance(node, ast.ClassDef) and not is_static
                function = Function(self, child, prefix + child.name, owner, is_method, outer)
                self.functions[child] = function
                self._read(child, f"{prefix}{child.name}.", owner, function)
            else:
                self._read(child, prefix, owner, outer)

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while (above := self.parents.get(node)) is not None:
            yield above
            node = above

    def function_of(self, node: ast.AST) -> Function | None:
        return next((self.functions[above] for above in self.ancestors(node) if above in self.functions), None)

    def path(self, node: ast.expr) -> str:
        """`asyncio.wait`, however it was imported; empty for what is no chain of names."""
        match node:
            case ast.Name(id=name):
                return self.imports.get(name, name)
            case ast.Attribute(value=value, attr=attr):
                return f"{base}.{attr}" if (base := self.path(value)) else ""
        return ""


class Tree:
    """All modules together."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        """`sources`: module -> its text."""
        self.modules = {name: Module(name, source) for name, source in sources.items()}
        self.functions = [function for module in self.modules.values() for function in module.functions.values()]
        self.methods: dict[str, list[Function]] = defaultdict(list)
        for function in self.functions:
            if function.is_method:
                self.methods[function.node.name].append(function)
        self.classes = {name: node for module in self.modules.values() for name, node in module.classes.items()}
        self.references: dict[str, list[tuple[Module, ast.expr]]] = defaultdict(list)
        for module in self.modules.values():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Name | ast.Attribute):
                    self.references[node.id if isinstance(node, ast.Name) else node.attr].append((module, node))
        self._types = self._attributes()
        self._targets: dict[ast.expr, list[Function]] = {}

    def _attributes(self) -> dict[tuple[str, str], str]:
        """(class, attribute) -> type, as far as it is known."""
        found: dict[tuple[str, str], str] = {}
        for name, node in self.classes.items():
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    found[name, statement.target.id] = type_name(statement.annotation)
                elif isinstance(statement, ast.FunctionDef) and statement.decorator_list:
                    found[name, statement.name] = type_name(statement.returns)
        for function in self.functions:
            for node in ast.walk(function.node):
                match node:
                    case ast.AnnAssign(
                        target=ast.Attribute(value=ast.Name(id="self"), attr=attr), annotation=annotation
                    ):
                        found[function.owner, attr] = type_name(annotation)
                    case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=attr)], value=value):
                        given = function.locals.get(value.id, "") if isinstance(value, ast.Name) else constructed(value)
                        found.setdefault((function.owner, attr), given)
        return found

    def type_of(self, node: ast.expr, function: Function | None) -> str:
        match node:
            case ast.Name(id="self" | "cls"):
                return function.owner if function else ""
            case ast.Name(id=name):
                while function is not None:
                    if name in function.locals:
                        return function.locals[name]
                    function = function.outer
                return name if name in self.classes else ""
            case ast.Attribute(value=value, attr=attr):
                return self._types.get((self.type_of(value, function), attr), "")
        return constructed(node)

    def targets(self, called: ast.expr, module: Module) -> list[Function]:
        """Functions of ours that an expression may name: one, or all methods of a name."""
        if called not in self._targets:
            self._targets[called] = self._find_targets(called, module)
        return self._targets[called]

    def _find_targets(self, called: ast.expr, module: Module) -> list[Function]:
        function = module.function_of(called)
        match called:
            case ast.Name(id=name) if name in module.imports:
                return self._at(module.imports[name])
            case ast.Name(id=name):
                return [f for f in module.functions.values() if f.node.name == name and not f.is_method]
            case ast.Attribute(value=value, attr=attr):
                if _root(ast.unparse(value)) in module.imports and module.path(value) in self.modules:
                    return self._at(f"{module.path(value)}.{attr}")
                receiver = self.type_of(value, function)
                if (receiver and not self._has(receiver, attr)) or (not receiver and attr in PRIMITIVES):
                    return []
                is_private = attr.startswith("_") and not attr.startswith("__")
                return [method for method in self.methods[attr] if not is_private or method.module is module]
        return []

    def _at(self, path: str) -> list[Function]:
        module, _, name = path.rpartition(".")
        functions = self.modules[module].functions.values() if module in self.modules else ()
        return [function for function in functions if function.qualname == name]

    def _has(self, name: str, attr: str) -> bool:
        """Whether a class of ours, or one that it is made from, defines a method."""
        if name not in self.classes:
            return False
        node = self.classes[name]
        own = any(isinstance(child, FunctionNode) and child.name == attr for child in node.body)
        return own or any(self._has(type_name(base), attr) for base in node.bases)
