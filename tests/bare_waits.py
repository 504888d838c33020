"""Finds waits that bypass ray_rl/deadlines.py, in syntax trees.

What is found, and where the line runs:

- `await X` where X is no call of our own coroutine functions (they are searched themselves), of `ray_rl.deadlines` or of
  `asyncio.sleep`: a Ray reference, a future, a queue, an event, another library's coroutine. Where X is a parameter, what the
  callers hand in. Likewise `async with` and `async for`, and what a TaskGroup waits for.
- In a coroutine function that is called nowhere but inside the arguments of `deadlines.wait` (or of a function of ours that hands
  them on to it) everything may be awaited: its caller's deadline ends it.
- A call that blocks its thread: `ray.get`, `ray.wait`, and without a timeout `result`, `join`, `wait`, `get`, `acquire`, `recv`,
  `communicate`, `subprocess.run`, `flock` and their like.

Collectives of `torch.distributed` are not seen: their deadline is the process group's.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.syntax_trees import Function, Module, Tree, constructed

DEADLINES = "ray_rl.deadlines"
SUBPROCESS = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output")}
EXECUTORS = ("ThreadPoolExecutor", "ProcessPoolExecutor")


@dataclass(frozen=True)
class Wait:
    """One that was found."""

    where: str
    """module:function"""
    line: int
    code: str


class Finder(Tree):
    """Knows of every coroutine function whether a deadline of its callers ends it."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        """`sources`: module -> its text."""
        super().__init__(sources)
        self.awaitable_types = {"Awaitable", "Coroutine", *self._aliases()}
        self.waiters: set[Function] = set()
        """Functions that await under a deadline whatever they are given to await."""
        self.bounded: set[Function] = set()
        """Coroutine functions that are called only where a deadline ends them."""
        self._settle()

    def _aliases(self) -> Iterator[str]:
        for module in self.modules.values():
            for node in module.tree.body:
                is_name = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                if is_name and re.search(r"\bAwaitable\[", ast.unparse(node.value)):
                    yield node.targets[0].id

    def _settle(self) -> None:
        while True:
            waiters = {function for function in self.functions if self._hands_on(function)}
            bounded = {function for function in self.functions if function.is_async and self._is_bounded(function)}
            if (waiters, bounded) == (self.waiters, self.bounded):
                return
            self.waiters, self.bounded = waiters, bounded

    def _hands_on(self, function: Function) -> bool:
        """Whether whatever it is given to await is awaited under a deadline."""
        names = self.awaited_parameters(function)
        uses = [node for node in ast.walk(function.node) if isinstance(node, ast.Name) and node.id in names]
        return bool(uses) and all(self.has_deadline(use, function.module) for use in uses)

    def _is_bounded(self, function: Function) -> bool:
        """Whether it is called, and only where a deadline ends it."""
        found = False
        for module, reference in self.references[function.node.name]:
            if function in self.targets(reference, module):
                found = True
                call = module.parents.get(reference)
                if not (isinstance(call, ast.Call) and call.func is reference and self.ends(call, module)):
                    return False
        return found

    def ends(self, node: ast.expr, module: Module) -> bool:
        """Whether a deadline ends what is awaited here."""
        return self.has_deadline(node, module) or module.function_of(node) in self.bounded

    def has_deadline(self, node: ast.expr, module: Module) -> bool:
        """Whether an expression stands, or its name, in the arguments of a call that awaits them under a deadline."""
        child: ast.AST = node
        for above in module.ancestors(node):
            match above:
                case ast.Await() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    return False
                case ast.Call(func=called) if child is not called and self._is_waiter(called, module):
                    return True
                case ast.Assign(targets=[ast.Name(id=name)]) if not isinstance(node, ast.Name):
                    uses = [
                        use for scope, use in self.references[name] if scope is module and _reads(module, use, above)
                    ]
                    return bool(uses) and all(self.has_deadline(use, module) for use in uses)
            child = above
        return False

    def _is_waiter(self, called: ast.expr, module: Module) -> bool:
        if module.path(called).startswith(f"{DEADLINES}."):
            return True
        targets = self.targets(called, module)
        return bool(targets) and all(target in self.waiters for target in targets)

    def awaited_parameters(self, function: Function) -> set[str]:
        """Names of parameters that are awaitables or make some."""
        words = {p.arg: re.findall(r"\w+", ast.unparse(p.annotation)) for p in function.parameters if p.annotation}
        return {name for name, found in words.items() if self.awaitable_types & set(found)}

    def is_fine(self, node: ast.expr, module: Module) -> bool:
        """Whether an awaitable may be awaited bare: it comes from a coroutine function of ours."""
        function = module.function_of(node)
        given = set() if function is None else self.awaited_parameters(function)
        match node:
            case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name in given:
                return True  # as good as what the callers hand in
            case ast.Name(id=name) if function is not None and (values := function.assigned(name)):
                return all(self.is_fine(value, module) for value in values)
            case ast.Name() | ast.Attribute():
                return any(target.is_async for target in self.targets(node, module))
            case ast.Starred(value=inner) | ast.Lambda(body=inner):
                return self.is_fine(inner, module)
            case ast.GeneratorExp(elt=inner) | ast.ListComp(elt=inner):
                return self.is_fine(inner, module)
            case ast.Call(func=called, args=arguments):
                path = module.path(called)
                if path == "asyncio.sleep" or self._is_waiter(called, module):
                    return True
                if path == "asyncio.gather":
                    return all(self.is_fine(argument, module) for argument in arguments)
                if path == "functools.partial" or path.endswith(("create_task", "ensure_future")):
                    return self.is_fine(arguments[0], module)
                return any(target.is_async for target in self.targets(called, module))
        return False

    def waits(self) -> list[Wait]:
        """All that bypass the deadlines."""
        found = []
        for module in self.modules.values():
            if module.name != DEADLINES:
                for node in ast.walk(module.tree):
                    for code in self._waits_at(node, module):
                        function = module.function_of(node)
                        where = f"{module.name}:{function.qualname if function else '<module>'}"
                        found.append(Wait(where, getattr(node, "lineno", code.lineno), ast.unparse(code)))
        return found

    def _waits_at(self, node: ast.AST, module: Module) -> Iterator[ast.expr]:
        function = module.function_of(node)
        if isinstance(node, ast.With):
            yield from (item.context_expr for item in node.items if constructed(item.context_expr) in EXECUTORS)
        elif isinstance(node, ast.Call):
            if self._blocks(node, function, module):
                yield node
            if function not in self.bounded:
                yield from (
                    argument for argument in self._handed_in(node, module) if not self.is_fine(argument, module)
                )
        elif function in self.bounded:
            return
        elif isinstance(node, ast.Await) and not self.is_fine(node.value, module):
            yield node
        elif isinstance(node, ast.AsyncWith):
            yield from (item.context_expr for item in node.items if not self._is_entered(item.context_expr, module))
        elif (
            isinstance(node, ast.AsyncFor) or (isinstance(node, ast.comprehension) and node.is_async)
        ) and not self.is_fine(node.iter, module):
            yield node.iter

    def _handed_in(self, call: ast.Call, module: Module) -> Iterator[ast.expr]:
        """Arguments that the called function, or a group of tasks, awaits as they are."""
        match call.func:
            case ast.Attribute(value=group, attr="create_task"):
                if self.type_of(group, module.function_of(call)) == "TaskGroup":
                    yield call.args[0]
        for target in self.targets(call.func, module):
            if target.module.name == DEADLINES or target in self.waiters or target in self.bounded:
                continue
            names = self.awaited_parameters(target)
            by_place = zip((parameter.arg for parameter in target.parameters), call.args, strict=False)
            by_name = ((keyword.arg, keyword.value) for keyword in call.keywords)
            awaited = {node.value for node in ast.walk(target.node) if isinstance(node, ast.Await)}
            bare = {name for name in names for value in awaited if re.match(rf"{name}\b", ast.unparse(value))}
            yield from (argument for name, argument in (*by_place, *by_name) if name in bare)

    def _is_entered(self, context: ast.expr, module: Module) -> bool:
        """Whether `async with` on it waits for nothing but our own code or a group of tasks."""
        if not isinstance(context, ast.Call):
            return self.type_of(context, module.function_of(context)) in self.classes
        if module.path(context.func) in ("asyncio.TaskGroup", "asyncio.timeout"):
            return True
        return constructed(context) in self.classes or bool(self.targets(context.func, module))

    def _blocks(self, call: ast.Call, function: Function | None, module: Module) -> bool:
        path, given = module.path(call.func), {keyword.arg for keyword in call.keywords}
        if path in ("ray.get", "ray.wait"):
            return True
        if path in SUBPROCESS:
            return "timeout" not in given
        if path == "fcntl.flock":
            return not re.search("LOCK_NB|LOCK_UN", ast.unparse(call.args[1]))
        if path == "socket.create_connection":
            return len(call.args) < 2 and "timeout" not in given
        if not isinstance(call.func, ast.Attribute) or self._is_coroutine(call, module):
            return False
        return self._method_blocks(call, call.func, given, function, module)

    def _method_blocks(
        self, call: ast.Call, called: ast.Attribute, given: set[str | None], function: Function | None, module: Module
    ) -> bool:
        timed, receiver = "timeout" in given, called.value
        kind = self.type_of(receiver, function)
        match called.attr:
            case "result" | "exception":
                is_task = kind == "Task" or (
                    function is not None and isinstance(receiver, ast.Name) and receiver.id in function.tasks
                )
                return not (call.args or timed or is_task)
            case "join" | "wait":
                return not (call.args or given)
            case "get" | "acquire":
                return not (call.args or timed or "blocking" in given)
            case "wait_for":
                return len(call.args) < 2 and not timed
            case "communicate":
                return not timed
            case "recv" | "recv_bytes" | "accept":
                return not self._was_polled(call, module)
            case "poll":
                return not call.args and self._is_select(receiver, function)
            case "shutdown":
                return kind in EXECUTORS and "wait" not in given
        return False

    def _is_coroutine(self, call: ast.Call, module: Module) -> bool:
        """Whether the call only makes what is awaited there or by a task, or under a deadline."""
        if self.has_deadline(call, module):
            return True
        above = module.parents[call]
        makes_task = isinstance(above, ast.Call) and module.path(above.func).endswith(("create_task", "ensure_future"))
        return isinstance(above, ast.Await) or makes_task

    def _was_polled(self, call: ast.Call, module: Module) -> bool:
        tests = [above.test for above in module.ancestors(call) if isinstance(above, ast.If | ast.IfExp)]
        return any(re.search(r"\.poll\(.+\)", ast.unparse(test)) for test in tests)

    def _is_select(self, receiver: ast.expr, function: Function | None) -> bool:
        made = function.assigned(receiver.id) if function and isinstance(receiver, ast.Name) else []
        return any(ast.unparse(value) == "select.poll()" for value in made)


def _reads(module: "Module", use: ast.expr, assignment: ast.Assign) -> bool:
    """Whether a name is read in the function in which it is assigned."""
    is_read = isinstance(use, ast.Name) and isinstance(use.ctx, ast.Load)
    return is_read and module.function_of(use) is module.function_of(assignment)
