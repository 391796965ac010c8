"""What the answers of hosts look like: what does not fit is not used, so that no answer can break the doctor."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address, ip_interface
from typing import Any


def fits(value: Any, form: Any) -> bool:
    """Whether a value of JSON has a form.

    A form is a type, None, a function that says yes or no, a tuple of forms (one of them), a list of one form (a list
    of any length), or a dictionary: by name, a key with ``?`` may be missing, and ``str`` stands for every key.
    """
    if isinstance(form, tuple):
        return any(fits(value, each) for each in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(each, form[0]) for each in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_key_fits(value, key, each) for key, each in form.items())
    if form is None or isinstance(form, type):
        return value is None if form is None else type(value) is form  # True is no int
    return bool(form(value))


def _key_fits(value: dict[str, Any], key: Any, form: Any) -> bool:
    if key is str:
        return all(isinstance(name, str) and fits(each, form) for name, each in value.items())
    name = key.removesuffix("?") if key not in value else key  # a path may end so
    return fits(value[name], form) if name in value else name != key


def _text(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and _parses(ip_address, value.partition("%")[0])


def _is_network(value: Any) -> bool:
    """Interface, IPv4 address and prefix length."""
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and type(value[2]) is int):
        return False
    return _is_address(value[1]) and "." in value[1] and _parses(ip_interface, f"{value[1]}/{value[2]}")


def _parses(parse: Callable[[str], Any], text: str) -> bool:
    try:
        parse(text)
    except (ValueError, OverflowError):
        return False
    return True


def _is_pair(*forms: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == 2 and all(map(fits, value, forms))


def _is_probe(value: Any) -> bool:
    """What an agent tells of the packages, as far as the first error."""
    if not fits(value, {"error": TEXT_OR_NONE, "signal?": int}):
        return False
    if "device" not in value:  # MLX does not work
        return value["error"] is not None
    if "code" not in value:  # distclip does not
        return value["error"] is not None and fits(value, IMPORTED)
    if "engine" not in value:  # its kernel does not
        return value["error"] is not None and fits(value, IMPORTED | CODE | {"gpu_problem?": str})
    return fits(value, IMPORTED | CODE | WORKING)


ERROR = {"error": str}
TEXT_OR_NONE = (str, None)
ENGINE = _text("native|gpu|mlx")
IMPORTED = {"device": _text("cpu|gpu"), "versions": dict.fromkeys(("mlx", "mpi4py", "distclip"), TEXT_OR_NONE)}
CODE = {"code": str, "wanted?": TEXT_OR_NONE}
WORKING = {
    "cpu": ENGINE,
    "engine": ENGINE,
    "warning": TEXT_OR_NONE,
    "gpu_problem": str,
    "fast_synch": str,
    "wanted": TEXT_OR_NONE,
}
FACTS: dict[str, Any] = {
    "hostname": str,
    "system": str,
    "python": _is_pair(_text(r"[0-9]{1,9}\.[0-9]{1,9}(\..*)?"), str),
    "networks": [_is_network],
    "met": [_is_address],
    "listening": _is_pair(int, str),
    "daemon": bool,
    "cwd": bool,
    "files": {str: (None, ERROR, {"folder": bool, "bytes": int, "digest": str})},
    "names": {str: (ERROR, lambda value: value != [] and fits(value, [_is_address]))},
    "mpirun": (ERROR, _text(r"[0-9]{1,9}(\..*)?")),
    "probe": (None, _is_probe),
}
CONNECTED = {str: (ERROR, {"to": _is_address, "by": _is_address})}
COUNTS = {str: int}
# What a rank of the self-test prints, in any order, and what is measured of a link.
RANK = {
    "rank": int,
    "library?": TEXT_OR_NONE,
    "version?": str,
    "error?": str,
    "size?": int,
    "mpi4py?": str,
    "loaded?": [str],
    "norm?": lambda value: isinstance(value, str) and _parses(float.fromhex, value),
    "right?": bool,
}
LOADED = {"library": TEXT_OR_NONE, "version": str}  # of a rank
NOT_LOADED = {"library": TEXT_OR_NONE, "error": str}
LINK = {"link": _is_pair(int, int), "latency_us": (int, float), "bandwidth_gbit_s": (int, float)}


def facts_form(files: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """The form of a host's facts, with these files and names among them."""
    file, name = FACTS["files"][str], FACTS["names"][str]
    return FACTS | {"files": dict.fromkeys(files, file), "names": dict.fromkeys(names, name)}
