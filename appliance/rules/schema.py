"""The file format: one pydantic model per block. Editors get it as JSON Schema from ``schema()``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, model_validator

from appliance.rules.values import (
    ASKED,
    LISTED,
    QUIET,
    Action,
    Address,
    Contained,
    Day,
    Deadline,
    Decision,
    Direction,
    Domain,
    Id,
    ListMembers,
    Mode,
    Name,
    Network,
    NotYet,
    Patience,
    Ports,
    ProfileName,
    Protocol,
    Reason,
    Severity,
    System,
    Tag,
    User,
    Words,
    wrong,
)

SCHEMA_ID = "urn:parasight:ruleset-v1"


class Block(BaseModel):
    """Unknown keys are mistakes; a number where a text is meant is that text."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, frozen=True)


class Metadata(Block):
    """Who this rule set is."""

    name: Name
    version: Words = "0"
    id: Id | None = None
    description: Words | None = None
    author: Words | None = None
    references: Annotated[list[Words], *LISTED] = []
    status: Literal["draft", "reviewed"] = Field(
        "reviewed", description="A draft is checked and replayed, not watched by"
    )


class AppliesTo(Block):
    """Which guests it is for: this system, and at least one of these tags."""

    os: System | None = None
    tags: Annotated[list[Words], *LISTED] = []


class Excluded(Block):
    """Addresses or names that are left out."""

    ips: Annotated[list[Network], *ASKED] | None = None
    domains: Annotated[list[Domain], *ASKED] | None = None
    lists: Annotated[list[Words], *ASKED] | None = Field(None, alias="list")

    @model_validator(mode="after")
    def _says_something(self) -> Excluded:
        if self.ips is None and self.domains is None and self.lists is None:
            raise wrong("says nothing", "give ips, domains or list")
        return self


class Peers(Block):
    """Where the far end may be; several kinds are alternatives, ``except`` takes some out again."""

    ips: Annotated[list[Network], *ASKED] | None = None
    domains: Annotated[list[Domain], *ASKED] | None = None
    lists: Annotated[list[Words], *ASKED] | None = Field(None, alias="list")
    excluded: Excluded | None = Field(None, alias="except")

    @model_validator(mode="after")
    def _says_something(self) -> Peers:
        if self.ips is None and self.domains is None and self.lists is None and self.excluded is None:
            raise wrong("says nothing", "give ips, domains, list or except")
        return self


class Entry(Block):
    """One exception from the default. A flow must fit everything that is given."""

    direction: Direction | None = None
    protocol: Annotated[list[Protocol], *ASKED] | None = None
    ports: Annotated[list[Ports], *ASKED] | None = Field(
        None, description="The service's port: the local one for in, the remote one for out"
    )
    local_ports: Annotated[list[Ports], *ASKED] | None = None
    remote_ports: Annotated[list[Ports], *ASKED] | None = None
    to: Peers | None = Field(None, description="The remote end of an outgoing connection")
    from_: Peers | None = Field(None, alias="from", description="The remote end of an incoming connection")
    severity: Severity | None = None
    tags: Annotated[list[Tag], *LISTED] = []
    expires: Day | None = None
    id: Id | None = None
    description: Words | None = None
    references: Annotated[list[Words], *LISTED] = []


class Hold(Block):
    """How long new connections may wait for their verdict where it is enforced; what is left out is as in ``spec``."""

    deadline: Deadline | None = Field(None, description="How long one may wait for its process to be known (1s)")
    default: Decision | None = Field(None, description="What becomes of it when nobody has answered by then (allow)")
    incoming: StrictBool | None = Field(None, description="Whether incoming ones wait too (true)")
    ask: Patience | None = Field(None, description="How long a person has, where on_deny says hold (60s)")

    @model_validator(mode="after")
    def _says_something(self) -> Hold:
        if not self.model_fields_set:
            raise wrong("says nothing", "give deadline, default, incoming or ask")
        return self


class Verdicts(Block):
    """What a deny of this block is worth, and what it asks for."""

    severity: Severity | None = None
    tags: Annotated[list[Tag], *LISTED] = []
    on_deny: Annotated[list[Action], *LISTED] | None = None
    mode: Mode | None = None
    hold: Hold | None = None
    description: Words | None = None


class Section(Verdicts):
    """A default and its exceptions, for what no profile speaks about."""

    default: Decision = "allow"
    allow: list[Entry] = []
    deny: list[Entry] = []


class Matching(Block):
    """Which processes: every condition must hold; a list means any of its items."""

    image: Annotated[list[Words], *ASKED] | None = None
    name: Annotated[list[Words], *ASKED] | None = None
    user: Annotated[list[User], *ASKED] | None = None
    service: Annotated[list[Words], *ASKED] | None = None
    command: Annotated[list[Words], *ASKED] | None = None
    parent: Annotated[list[Words], *ASKED] | None = None
    container: Annotated[list[Contained], *ASKED] | None = None
    deleted: StrictBool | None = None
    sha256: NotYet = None
    signer: NotYet = None

    @model_validator(mode="after")
    def _can_be_judged(self) -> Matching:
        if not self.model_fields_set:
            raise wrong("an empty match would be every process", "use spec.otherwise for that")
        return self


class Profile(Section):
    """One kind of process, and what it may do."""

    name: ProfileName
    id: Id | None = None
    match: Matching
    default: Decision  # no default here: the author decides
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    expires: Day | None = None
    references: Annotated[list[Words], *LISTED] = []
    falsepositives: Annotated[list[Words], *LISTED] = []


class Unbound(Verdicts):
    """What to do with a flow that has no process, by the reason why it has none."""

    action: Decision = "allow"
    alert: StrictBool = True
    quiet: Annotated[list[Reason], *LISTED] = Field(list(QUIET), description="Reasons that raise no alert")  # type: ignore[arg-type]
    deny: Annotated[list[Reason], *LISTED] = Field([], description="Reasons that are denied whatever action says")

    @model_validator(mode="after")
    def _agrees(self) -> Unbound:
        both = set(self.quiet) & set(self.deny) if "quiet" in self.model_fields_set else set()
        if both:
            raise wrong(f"{', '.join(sorted(both))} cannot be both quiet and denied")
        return self


class Spec(Block):
    """The rules."""

    mode: Mode = "monitor"
    hold: Hold | None = None
    applies_to: AppliesTo = AppliesTo()
    severity: Severity = "medium"
    on_deny: Annotated[list[Action], *LISTED] = ["alert"]
    tags: Annotated[list[Tag], *LISTED] = []
    unbound: Unbound | None = None
    otherwise: Section | None = None
    kernel: Section | None = Field(None, description="What the guest's own kernel says: answers to ping and the like")
    lists: dict[Name, ListMembers] = {}
    processes: Annotated[list[Profile], Field(max_length=2000)] = []


# -- tests inside the file --


class GivenProcess(Block):
    """The process of a test."""

    image: Words | None = None
    name: Words | None = None
    user: User | None = None
    service: Words | None = None
    command: Words | None = None
    container: Words | None = None
    deleted: StrictBool = False
    parent: Words | None = Field(None, description="The parent's image, or its name")


class GivenConnection(Block):
    """The connection of a test; ``port`` is the local one for in, the remote one for out."""

    direction: Direction
    protocol: Protocol = "tcp"
    remote: Address
    port: Ports | None = None
    local_port: Ports | None = None
    remote_port: Ports | None = None
    names: Annotated[list[Domain], *LISTED] = []
    on: Day | None = Field(None, description="The day it happens, for entries that expire")


class Given(Block):
    """What happens: a connection of a process, of the kernel, or of nobody."""

    connection: GivenConnection
    process: GivenProcess | None = None
    unbound: Reason | None = None
    kernel: StrictBool = False
    os: System | None = None
    tags: Annotated[list[Words], *LISTED] | None = None

    @model_validator(mode="after")
    def _has_one_actor(self) -> Given:
        if (self.process is not None) + (self.unbound is not None) + self.kernel != 1:
            raise wrong("a test needs exactly one of process, unbound and kernel")
        return self


class Expected(Block):
    """What the rules must say of it."""

    action: Decision
    rule: Words | None = Field(None, description="The deciding profile, or otherwise, unbound, kernel")
    severity: Severity | None = None
    alert: StrictBool | None = None


class Case(Block):
    """One test."""

    name: Words
    given: Given
    expect: Expected


class RuleSet(Block):
    """One rule file."""

    model_config = ConfigDict(title="Parasight rule set")

    api_version: Literal["v1"] = Field(alias="apiVersion")
    kind: Literal["RuleSet"]
    metadata: Metadata
    spec: Spec
    tests: list[Case] = []


MATCHING: TypeAdapter[Matching] = TypeAdapter(Matching)


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a rule file, for editors."""
    body = _without_null(RuleSet.model_json_schema(by_alias=True))
    assert isinstance(body, dict)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **body}


def _without_null(node: object) -> object:
    """Take out what only the models need: a key is given or left out, but never null."""
    if isinstance(node, list):
        return [_without_null(item) for item in node if item != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    kept = {key: _without_null(value) for key, value in node.items() if not (key == "default" and value is None)}
    if isinstance(kept.get("title"), str) and ("type" in kept or "anyOf" in kept):
        del kept["title"]
    alternatives = kept.get("anyOf")
    if isinstance(alternatives, list) and len(alternatives) == 1:
        del kept["anyOf"]
        kept = {**alternatives[0], **kept}
    return kept
