# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rights are shed before anything through which memory of the user steers a task (restore/shed.py)."""

import ast
import importlib
from pathlib import Path

from ckptd.objects.attributes.base import Stage
from ckptd.objects.attributes.registry import ATTRIBUTES

PACKAGE = Path(__file__).parents[2] / 'ckptd'
RESTORE, ATTRIBUTE_FILES = PACKAGE / 'restore', PACKAGE / 'objects' / 'attributes'
# calls after which memory or a signal of the user's can lead a task anywhere
STEERING = {'rseq', 'rt_sigaction', 'timer_create', 'timer_settime', 'setitimer', 'rt_sigqueueinfo',
            'rt_tgsigqueueinfo'}
AFTER_THE_SHED = {Stage.AFTER_RIGHTS, Stage.FILTERS}
# the module that works on tasks that have shed
AFTER = 'leave.py'
# the first stub takes default actions for what we ignore, before it has any memory of the image
BEFORE_ANY_MEMORY = {('bootstrap.py', 'start_bootstrap')}


def _functions(path: Path) -> dict[str, ast.AST]:
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def _remote_calls(node: ast.AST) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in ('call', 'call_now', 'call_with_pointer') and call.args]


def _calls(node: ast.AST) -> list[str]:
    """Names of the remote system calls that a function puts into a batch or script."""
    return [call.args[0].value for call in _remote_calls(node) if isinstance(call.args[0], ast.Constant)]


def test_an_attribute_that_steers_is_set_after_the_shed() -> None:
    """Every attribute of a file that makes a steering call, whichever of its functions does."""
    steering = set()
    for path in ATTRIBUTE_FILES.glob('*.py'):
        calls = _remote_calls(ast.parse(path.read_text()))
        assert all(isinstance(call.args[0], ast.Constant) for call in calls), f'{path.name}: a call without a name'
        if not STEERING & set(_calls(ast.parse(path.read_text()))):
            continue
        module = importlib.import_module(f'ckptd.objects.attributes.{path.stem}')
        found = [one for one in ATTRIBUTES if type(one).__module__ == module.__name__]
        assert found, f'{path.name} makes a steering call and has no attribute'
        for one in found:
            assert one.stage in AFTER_THE_SHED, f'{path.name}: {one.name} steers tasks before the shed'
        steering |= {path.stem}
    assert {'rseq', 'signal_actions', 'interval_timers', 'posix_timers', 'pending_signals'} <= steering


def test_stages_after_the_shed_are_reached_when_tasks_leave_their_stubs_only() -> None:
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob('*.py'):
        if path.parent == ATTRIBUTE_FILES:
            continue        # names its own stage
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                    and isinstance(call.func.value, ast.Attribute) and call.func.value.attr == '_attributes'
                    and call.func.attr == 'set'):
                continue
            stage = call.args[0]
            assert isinstance(stage, ast.Attribute), f'{path.name}:{call.lineno}: a stage that is not named'
            used.setdefault(stage.attr, set()).add(path.name)
    assert used.keys() <= {stage.name for stage in Stage}
    assert {name for stage in AFTER_THE_SHED for name in used[stage.name]} == {AFTER}
    assert used['RIGHTS'] == {'shed.py'}
    assert not used.keys() & {'AFTER_RIGHTS', 'FILTERS'} - {stage.name for stage in AFTER_THE_SHED}
    # TaskAttributes.set alone gives a stage on
    passing = {path.name for path in RESTORE.rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Attribute) and node.attr == 'restore' and isinstance(node.value, ast.Attribute)
               and node.value.attr == '_kept'}
    assert passing == {'attributes.py'}


def test_every_attribute_is_set_at_a_stage_that_a_restart_has() -> None:
    """Stages that restore/ never asks for would lose an attribute without a word."""
    asked = {node.attr for path in RESTORE.rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'Stage'}
    assert {one.stage.name for one in ATTRIBUTES} <= asked


def test_no_steering_call_outside_of_attributes() -> None:
    for path in RESTORE.rglob('*.py'):
        for name, node in _functions(path).items():
            if (path.name, name) not in BEFORE_ANY_MEMORY:
                assert not STEERING & set(_calls(node)), f'{path.name}: {name} makes a steering call'


def test_the_shed_comes_after_the_service_fds_and_before_what_acts_for_the_tree() -> None:
    body = _functions(RESTORE / 'run.py')['_rebuild']
    lines = {word: min(node.lineno for node in ast.walk(body)
                       if (isinstance(node, ast.Attribute) and node.attr == word)
                       or (isinstance(node, ast.Name) and node.id == word))
             for word in ('_process', '_close_service_fds', 'Shed', 'finish', '_become_zombies')}
    assert len(set(lines.values())) == len(lines)
    assert sorted(lines, key=lines.__getitem__) == ['_process', '_close_service_fds', 'Shed', 'finish',
                                                    '_become_zombies']


def test_tasks_leave_their_stubs_after_the_shed() -> None:
    body = _functions(RESTORE / 'run.py')['run']
    lines = {word: [node.lineno for node in ast.walk(body)
                    if (isinstance(node, ast.Attribute) and node.attr == word)
                    or (isinstance(node, ast.Name) and node.id == word)] for word in ('_rebuild', 'Leave')}
    assert [len(found) for found in lines.values()] == [1, 1]
    assert lines['_rebuild'] < lines['Leave']
