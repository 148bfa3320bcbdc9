"""The values of a rule file: how each is written, and what is said when it is written wrongly."""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from datetime import date
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from appliance.rules.nets import IpNetwork, PortRange

RESERVED = ("otherwise", "unbound", "kernel", "none")
QUIET = ("closed", "late", "torn", "time-wait", "forwarded", "no-memory")
_ACTIONS = ("alert", "block", "reset", "hold", "snapshot")
_TACTICS = (
    "reconnaissance", "resource-development", "initial-access", "execution", "persistence", "privilege-escalation",
    "defense-evasion", "credential-access", "discovery", "lateral-movement", "collection", "command-and-control",
    "exfiltration", "impact",
)  # fmt: skip
MIN_DEADLINE_S = 0.01  # of a hold: a look at a guest's memory takes well below a millisecond
MAX_DEADLINE_S = 3.0  # a SYN is repeated after one second, then after two more (RFC 6298)
MAX_ASK_S = 3600.0
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\Z")


def wrong(message: str, suggestion: str | None = None) -> PydanticCustomError:
    """A mistake, in the words that the author of the file will read."""
    text = message.replace("{", "(").replace("}", ")")
    return PydanticCustomError("rule", text, {"suggestion": suggestion})


class _OneOrMany:
    """Where a list may be written as its only item."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        many = handler(core)
        return {"anyOf": [many["items"], many]}


def listed(value: object) -> object:
    """Take a lone item as a list of one."""
    return value if isinstance(value, list) else [value]


LISTED = (BeforeValidator(listed), _OneOrMany())
ASKED = (*LISTED, Field(min_length=1))  # an empty condition would be a riddle


def parse_ports(value: object) -> PortRange:
    """Read ``80`` or ``"8000-8080"``."""
    found = re.fullmatch(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?", str(value)) if not isinstance(value, bool) else None
    if found is None:
        raise wrong(f"a port is a number or a range like 8000-8080, not '{str(value).lower()}'")
    if len(found[1]) > 1 and found[1].startswith("0"):
        raise wrong(f"'{value}' could be octal", f"write {int(found[1])}")
    low, high = int(found[1]), int(found[2] or found[1])
    if not (1 <= low <= 65535 and 1 <= high <= 65535):
        raise wrong(f"a port is between 1 and 65535, not {value}")
    if low > high:
        raise wrong(f"the range {value} is backwards", f"write {high}-{low}")
    return low, high


def parse_network(value: object) -> IpNetwork:
    """Read an address or a network in CIDR form."""
    text = str(value)
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise wrong(f"'{text}' is no IP address or network") from None
    if "/" in text and int(network.network_address) != int(ip_address(text.partition("/")[0])):
        raise wrong(f"{text} has bits set beyond its prefix", f"write {network}, or the address alone")
    return network


def parse_domain(value: object) -> str:
    """Read a domain name, or ``*.name`` for everything below it; in lower case, in ASCII, without a final dot."""
    text = str(value).lower().rstrip(".")
    name = text.removeprefix("*.")
    if "*" in name or "?" in name:
        raise wrong(f"'{value}': a wildcard is only possible as the whole first label", "write *.example.org")
    if "/" in name or ":" in name:
        raise wrong(f"'{value}' is no domain name", "give the host name alone")
    try:
        ascii_name = name if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError:
        raise wrong(f"'{value}' is no domain name") from None
    labels = ascii_name.split(".")
    if len(ascii_name) > 253 or not all(_LABEL.match(label) for label in labels) or labels[-1].isdigit():
        raise wrong(f"'{value}' is no domain name")
    return text[: len(text) - len(name)] + ascii_name


def parse_member(value: object) -> IpNetwork | str:
    """Read a member of a list: an address, a network or a domain name, told apart by their looks."""
    text = str(value)
    if ":" in text or re.fullmatch(r"[0-9./]+", text):
        return parse_network(value)
    try:
        return parse_domain(value)
    except PydanticCustomError as error:
        if "/" in text or "*" not in text:
            raise wrong(f"'{text}' is neither an address nor a network nor a domain name") from error
        raise


def refuse(value: object) -> object:
    """Refuse a condition that no guest can answer yet; ignoring it would widen the rule."""
    raise wrong("is not applicable yet: no guest tells it", "match by image instead")


def not_reserved(name: str) -> str:
    """Keep the names of the sections that are no profiles."""
    if name in RESERVED:
        raise wrong(f"the name '{name}' is taken", "choose another one")
    return name


def parse_tag(value: object) -> str:
    """Read a tag; those that begin with ``attack.`` must name a technique or a tactic of ATT&CK."""
    text = str(value)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", text):
        raise wrong(f"'{value}' is no tag", "use lower-case letters, digits, '.', '_' and '-'")
    if text.startswith("attack.") and not re.fullmatch(r"attack\.(t\d{4}(\.\d{3})?|[gs]\d{4})", text):
        name = text.removeprefix("attack.")
        if name not in _TACTICS:
            raise wrong(
                f"'{text}' is no ATT&CK technique or tactic",
                guess(name, _TACTICS) or "write attack.t1055 or .t1055.001",
            )
    return text


def parse_action(value: object) -> str:
    """Read one action of ``on_deny``."""
    text = str(value)
    if text in _ACTIONS or re.fullmatch(r"redirect:[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        return text
    options = (*_ACTIONS, "redirect:NAME")
    raise wrong(f"'{text}' is no action; there are {', '.join(options)}", guess(text, options))


def parse_duration(value: object, low_s: float, high_s: float, why: str) -> float:
    """Read ``500ms``, ``1.5s``, ``5m`` or ``1h``, in seconds; between ``low_s`` and ``high_s``."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s|m|h)", str(value)) if not isinstance(value, bool) else None
    if found is None:
        hint = f"write {value}ms or {value}s" if isinstance(value, int) and not isinstance(value, bool) else None
        raise wrong(f"a duration is a number with its unit, like 500ms or 1s, not '{str(value).lower()}'", hint)
    seconds = float(found[1]) * _UNIT_S[found[2]]
    if seconds < low_s:
        raise wrong(f"{value} is too short", f"at least {_shown(low_s)}")
    if seconds > high_s:
        raise wrong(f"{value} is too long: {why}", f"at most {_shown(high_s)}")
    return seconds


def parse_deadline(value: object) -> float:
    """Read how long a new flow may wait for its verdict, in seconds."""
    return parse_duration(value, MIN_DEADLINE_S, MAX_DEADLINE_S, "a guest gives up, or repeats what waits, after that")


def parse_patience(value: object) -> float:
    """Read how long a person may think, in seconds."""
    return parse_duration(value, 1.0, MAX_ASK_S, "no connection waits for so long")


def _shown(seconds: float) -> str:
    return f"{seconds * 1000:g}ms" if seconds < 1 else f"{seconds:g}s" if seconds < 3600 else f"{seconds / 3600:g}h"


def parse_user(value: object) -> int | str:
    """Read a uid or a user name."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32:
        return value
    if isinstance(value, str) and value:
        return value
    raise wrong(f"a user is a name or a uid, not '{value}'")


def parse_day(value: object) -> date:
    """Read a date; only the form 2026-12-31 is taken."""
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
        with suppress(ValueError):
            return date.fromisoformat(value)
    raise wrong(f"'{value}' is no date", "write it as 2026-12-31")


def parse_uuid(value: object) -> str:
    """Read a UUID."""
    try:
        return str(UUID(str(value)))
    except ValueError:
        raise wrong(f"'{value}' is no UUID", "make one with uuidgen") from None


def parse_contained(value: object) -> bool | str:
    """Read ``true`` (in any container), ``false`` (in none) or a pattern for its name."""
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise wrong(f"a container is true, false or a name, not '{value}'")


def guess(word: str, options: tuple[str, ...] | list[str]) -> str | None:
    """Did you mean ...? None when nothing is near."""
    near = difflib.get_close_matches(word[:100].lower(), options, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else None


def _text(schema: dict[str, Any], description: str) -> WithJsonSchema:
    return WithJsonSchema({**schema, "description": description})


def parse_ip(value: object) -> str:
    """Read one IP address."""
    try:
        return str(ip_address(str(value)))
    except ValueError:
        raise wrong(f"'{value}' is no IP address") from None


_STRING: dict[str, Any] = {"type": "string"}
Words = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ProfileName = Annotated[Name, AfterValidator(not_reserved)]
NotYet = Annotated[object, PlainValidator(refuse), WithJsonSchema({"not": {}, "description": "Not applicable yet"})]
Tag = Annotated[str, PlainValidator(parse_tag), _text({**_STRING, "pattern": "^[a-z0-9][a-z0-9._-]*$"}, "attack.t1055")]
Action = Annotated[
    str,
    PlainValidator(parse_action),
    _text({"anyOf": [{"enum": list(_ACTIONS)}, {**_STRING, "pattern": "^redirect:.+$"}]}, "What a deny asks for"),
]
Ports = Annotated[
    PortRange,
    PlainValidator(parse_ports),
    _text({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, _STRING]}, "80 or 8000-8080"),
]
Network = Annotated[IPv4Network | IPv6Network, PlainValidator(parse_network), _text(_STRING, "10.0.0.1 or 10.0.0.0/8")]
Domain = Annotated[str, PlainValidator(parse_domain), _text(_STRING, "example.org or *.example.org")]
Member = Annotated[
    IPv4Network | IPv6Network | str, PlainValidator(parse_member), _text(_STRING, "an address, a network or a domain")
]
ListMembers = Annotated[list[Member], BeforeValidator(listed), Field(max_length=100_000)]
User = Annotated[int | str, PlainValidator(parse_user), _text({"type": ["integer", "string"]}, "a name or a uid")]
Day = Annotated[date, PlainValidator(parse_day), _text({**_STRING, "format": "date"}, "the last day it counts, in UTC")]
Id = Annotated[str, PlainValidator(parse_uuid), _text({**_STRING, "format": "uuid"}, "a UUID that never changes")]
Contained = Annotated[
    bool | str, PlainValidator(parse_contained), _text({"type": ["boolean", "string"]}, "true, false or a name")
]
_DURATION = {**_STRING, "pattern": r"^[0-9]+(\.[0-9]+)?\s*(ms|s|m|h)$"}
Deadline = Annotated[float, PlainValidator(parse_deadline), _text(_DURATION, "500ms or 1s; at most 3s")]
Patience = Annotated[float, PlainValidator(parse_patience), _text(_DURATION, "60s or 5m; at most 1h")]
Decision = Literal["allow", "deny"]
Mode = Literal["monitor", "enforce"]
Severity = Literal["info", "low", "medium", "high", "critical"]
System = Literal["linux", "windows"]
Direction = Literal["in", "out"]
Protocol = Literal["tcp", "udp", "icmp", "raw"]
Reason = Literal[
    "late", "torn", "orphan", "time-wait", "forwarded", "raw", "hidden", "closed", "no-memory", "ambiguous"
]
Address = Annotated[str, PlainValidator(parse_ip), _text(_STRING, "an IP address")]
