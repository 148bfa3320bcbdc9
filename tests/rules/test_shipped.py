"""The rule sets that come with Parasight, its schema, and the examples of its manual."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from appliance.model import Decision
from appliance.rules import load, load_text, schema
from tests.rules.builders import HEAD, flow, process, subject

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "rules").glob("*.yaml"))
MANUAL = (ROOT / "docs" / "how-to" / "write-a-rule.md").read_text()
SCHEMA = ROOT / "docs" / "ruleset-v1.schema.json"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_shipped_set_passes_its_own_tests_without_a_warning(file):
    rules = load([file])
    assert rules.warnings == ()
    assert [str(result) for result in rules.test() if not result.ok] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_tests_of_a_shipped_set_reach_every_profile_in_every_way(file):
    rules = load([file])
    seen = {(result.judgement.rule.profile, result.judgement.decision) for result in rules.test()}
    for profile in rules.sets[0].profiles:
        section = profile.section
        if section.allow or section.default is Decision.ALLOW:
            assert (section.name, Decision.ALLOW) in seen
        if section.deny or section.default is Decision.DENY:
            assert (section.name, Decision.DENY) in seen


def test_the_shipped_sets_load_together():
    assert len(load([ROOT / "rules"]).sets) == len(FILES) >= 2


def test_a_set_names_its_profiles_once():
    names = load([ROOT / "rules" / "debian-server.yaml"]).sets[0].profile_names
    assert len(names) == len(set(names)) == 22


def test_ids_are_unique():
    ids = [found for file in FILES for found in re.findall(r"\bid: (\S+)", file.read_text())]
    assert len(ids) == len(set(ids)) > 30


@pytest.mark.parametrize(
    ("remote", "port", "inbound", "decision"),
    [
        ("10.77.0.1", 80, True, Decision.ALLOW),
        ("fd77::1", 443, True, Decision.ALLOW),
        ("10.77.0.1", 5001, False, Decision.DENY),
        ("fd77::1", 443, False, Decision.DENY),
    ],
)
def test_nginx_on_debian(remote, port, inbound, decision):
    rules = load([ROOT / "rules" / "debian-server.yaml"])
    master = process(pid=10, parent_pid=1, uid=0, user=None)
    worker = process(pid=11, parent_pid=10, user=None)
    judgement = rules.judge(subject(worker, master, flow=flow(remote, port, inbound=inbound)))
    assert (judgement.decision, judgement.rule.profile) == (decision, "nginx")
    assert judgement.alert is (decision is Decision.DENY)


# -- schema --


def test_the_committed_schema_is_current():
    assert json.loads(SCHEMA.read_text()) == schema(), "run: parasight rules schema > docs/ruleset-v1.schema.json"


def test_the_schema_is_a_schema_and_accepts_the_shipped_sets():
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    for file in FILES:
        validator.validate(yaml.load(file.read_text(), Loader=yaml.BaseLoader) and _plain(file))


def test_the_schema_finds_a_typo():
    document = _plain(FILES[0])
    document["spec"]["processes"][0]["defualt"] = "deny"
    with pytest.raises(jsonschema.ValidationError, match="defualt"):
        jsonschema.validate(document, schema())


def _plain(file):
    from appliance.rules.text import parse

    return parse(file.read_text(), file.name).data


# -- the manual --

BLOCKS = re.findall(r"<!-- (file|spec|profile|entry)( of .*?)? -->\n```yaml\n(.*?)```", MANUAL, re.S)


@pytest.mark.parametrize(("kind", "_", "text"), BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_an_example_of_the_manual_loads_and_passes_its_tests(kind, _, text):
    indented = "".join(f"      {line}\n" for line in text.splitlines())
    whole = {
        "file": text,
        "spec": HEAD + "spec:\n" + text,
        "profile": HEAD + "spec:\n  lists: {private: [10.0.0.0/8]}\n  processes:\n" + text,
        "entry": HEAD + "spec:\n  lists: {private: [10.0.0.0/8]}\n  otherwise:\n    allow:\n" + indented,
    }[kind]
    assert all(result.ok for result in load_text(whole).test())


def test_every_example_of_the_manual_is_tested():
    assert len(BLOCKS) == MANUAL.count("```yaml") >= 5


def test_the_manual_names_every_key():
    properties = {key for block in schema()["$defs"].values() for key in block.get("properties", {})}
    missing = sorted(key for key in properties if f"`{key}" not in MANUAL and f"{key}:" not in MANUAL)
    assert missing == []
