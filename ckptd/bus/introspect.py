# SPDX-License-Identifier: LGPL-2.1-or-later
"""Introspection XML from the tables of exported classes (D-Bus specification, "Introspection Data Format")."""

from collections.abc import Iterable, Iterator
from xml.sax.saxutils import quoteattr

from ckptd.bus.export import Annotations, Argument, Interface, Method, Property, SignalMember

DOCTYPE = ('<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
           ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n')


def introspection_xml(interfaces: Iterable[Interface], children: Iterable[str] = ()) -> str:
    """Return the document that Introspect answers and that dbus/*.xml contains."""
    lines = ['<node>']
    for interface in interfaces:
        lines += [' ' + line for line in _interface(interface)]
    lines += [f' <node name={quoteattr(child)}/>' for child in children]
    return DOCTYPE + '\n'.join([*lines, '</node>', ''])


def _interface(interface: Interface) -> Iterator[str]:
    yield f'<interface name={quoteattr(interface.name)}>'
    for method in interface.methods.values():
        yield from _element('method', {'name': method.name}, _method_body(method))
    for signal in interface.signals.values():
        yield from _element('signal', {'name': signal.name}, _signal_body(signal))
    for property_ in interface.properties.values():
        yield from _element('property', {'name': property_.name, 'type': property_.signature, 'access': 'read'},
                            _property_body(property_))
    yield '</interface>'


def _method_body(method: Method) -> Iterator[str]:
    yield from _arguments(method.inputs, 'in')
    yield from _arguments(method.outputs, 'out')
    yield from _annotations(method.annotations)


def _signal_body(signal: SignalMember) -> Iterator[str]:
    yield from _arguments(signal.arguments)
    yield from _annotations(signal.annotations)


def _property_body(property_: Property) -> Iterator[str]:
    return _annotations(property_.annotations)


def _arguments(arguments: Iterable[Argument], direction: str = '') -> Iterator[str]:
    for argument in arguments:
        attributes = {'type': argument.signature, 'name': argument.name}
        yield from _element('arg', attributes | ({'direction': direction} if direction else {}), ())


def _annotations(annotations: Annotations) -> Iterator[str]:
    for name, value in annotations.items():
        yield from _element('annotation', {'name': name, 'value': value}, ())


def _element(tag: str, attributes: dict[str, str], body: Iterable[str]) -> Iterator[str]:
    start = f'<{tag} ' + ' '.join(f'{name}={quoteattr(value)}' for name, value in attributes.items())
    inner = [' ' + line for line in body]
    if not inner:
        yield ' ' + start + '/>'
        return
    yield ' ' + start + '>'
    yield from (' ' + line for line in inner)
    yield f' </{tag}>'
