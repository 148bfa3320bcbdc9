"""Every mistake of every file at once, each where it stands and with the way out."""
# ruff: noqa: E501  # messages stand on one line each, to be found by searching

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import RuleError
from appliance.rules import RuleBook, load, load_text
from appliance.rules.text import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse
from tests.rules.builders import HEAD, book


def problems(text: str) -> list[str]:
    with pytest.raises(RuleError) as error:
        load_text(text, "f")
    return str(error.value).splitlines()


def spec_problems(spec: str) -> list[str]:
    with pytest.raises(RuleError) as error:
        book(spec)
    return str(error.value).splitlines()


def entry_problems(entry: str) -> list[str]:
    found = spec_problems(f"otherwise: {{allow: [{{{entry}}}]}}")
    return [line.partition(": ")[2] for line in found]


FIVE = """\
apiVersion: v1
kind: RuleSet
metadata: {name: five}
spec:
  mode: enforced
  processes:
    - name: nginx
      match: {image: /usr/sbin/nginx}
      defualt: deny
      allow:
        - {direction: in, ports: 80800}
        - {direction: out, to: {list: resolvrs}}
      severity: hihg
  lists: {resolvers: [10.0.0.53]}
"""


def test_five_mistakes_are_five_lines():
    assert problems(FIVE) == [
        "f:5:9: mode: must be one of monitor, enforce, not 'enforced' (did you mean 'enforce'?)",
        "f:9:7: unknown key 'defualt' (did you mean 'default'?)",
        "f:11:34: ports: a port is between 1 and 65535, not 80800",
        "f:12:39: there is no list 'resolvrs' (did you mean 'resolvers'?)",
        "f:13:17: severity: must be one of info, low, medium, high, critical, not 'hihg' (did you mean 'high'?)",
    ]


def test_the_mistakes_of_several_files_come_together(tmp_path):
    (tmp_path / "b.yml").write_text(FIVE)
    (tmp_path / "a.yaml").write_text(HEAD + "spec: {mode: x}\n")
    (tmp_path / "c.txt").write_text("not a rule file")
    (tmp_path / ".#a.yaml").write_text("an editor's lock")
    with pytest.raises(RuleError) as error:
        load([tmp_path, tmp_path / "missing.yaml"])
    files = [Path(problem.path).name for problem in error.value.problems]
    assert files == ["a.yaml", "b.yml", "b.yml", "b.yml", "b.yml", "b.yml", "missing.yaml"]
    assert error.value.exit_code == 3


def test_a_file_that_is_named_twice_is_loaded_once(tmp_path):
    (tmp_path / "a.yaml").write_text(HEAD + "spec: {}\n")
    assert len(load([tmp_path, tmp_path / "a.yaml"]).sets) == 1


def test_no_files_are_no_rules():
    assert load([]) == RuleBook()
    assert load([]).version.startswith("empty@")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "1:1: this is not UTF-8 text"),
        (b"a: b\nc: \xe9\n", "2:4: this is not UTF-8 text"),
        (b"a" * (MAX_BYTES + 1), "1:1: the file is larger than 2 MiB (split it)"),
        (b"", "1:1: this is no rule set (it begins with apiVersion: v1 and kind: RuleSet)"),
        (b"[]", "1:1: this is no rule set (it begins with apiVersion: v1 and kind: RuleSet)"),
        (b"a: \x00", "1:4: this is not YAML: control characters are not allowed (remove the character U+0000)"),
    ],
)
def test_files_that_are_no_text_or_no_rules(tmp_path, content, message):
    file = tmp_path / "f.yaml"
    file.write_bytes(content)
    with pytest.raises(RuleError) as error:
        load([file])
    assert str(error.value) == f"{file}:{message}"


def test_an_empty_directory_and_a_path_that_leads_nowhere(tmp_path):
    with pytest.raises(RuleError, match="no rule files are here"):
        load([tmp_path])
    (tmp_path / "site.yaml").write_text("")
    with pytest.raises(RuleError, match="cannot be read: Not a directory"):
        load([tmp_path / "site.yaml" / "x"])
    with pytest.raises(RuleError, match=r"cannot be read: No such file or directory \(did you mean 'site.yaml'\?\)"):
        load([tmp_path / "sit.yaml"])


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + (HEAD + "spec: {}\n").encode())
    assert load([file]).sets[0].name == "site"


# -- YAML --


def test_duplicate_keys_are_refused():
    assert problems(HEAD + "spec: {mode: enforce, mode: monitor}\n") == [
        "f:4:23: 'mode' is given twice (the first one is in line 4)"
    ]


def test_what_stands_under_a_duplicate_key_is_not_taken():
    found = problems(HEAD + "spec: {otherwise: {default: deny}, otherwise: {default: allow, x: 1}}\n")
    assert found == ["f:4:36: 'otherwise' is given twice (the first one is in line 4)"]


def test_aliases_anchors_tags_and_second_documents_are_refused():
    found = problems(HEAD + "spec: {lists: {a: &x [1.1.1.1], b: *x, c: !!str a.org}}\n---\na: b\n")
    assert [line.split(" ", 1)[1].split(" (")[0] for line in found] == [
        "an anchor",
        "an alias",
        "a tag",
        "a second YAML document",
    ]


def test_the_billion_laughs_are_one_problem_each():
    lines = ["a: &a [x, x]"] + [f"{c}: &{c} [*{p}, *{p}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)]
    assert all(
        "not allowed" in line or "unknown key" in line or "missing" in line for line in problems("\n".join(lines))
    )


def test_depth_and_size_are_bounded():
    assert "levels deep" in problems("[" * 100_000)[0]
    assert f"more than {MAX_NODES} values" in problems("[" + "1," * (MAX_NODES + 10) + "]")[0]
    assert parse("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "f").problems == []


def test_a_syntax_error_has_its_place():
    found = problems("apiVersion: v1\nkind: [RuleSet\nmetadata: {}\n")
    assert found[0].startswith("f:3:")
    assert problems("a:\n\t- b\n")[0].endswith("(write blanks, not tabs)")


def test_text_stays_text():
    rules = load_text(
        HEAD.replace("name: site", "name: no, version: 1.10")
        + "spec: {processes: [{name: on, match: {name: [off, yes, 012, 1:30, 2026-01-01, 0x1f, 1e3]}, default: deny}]}\n"
    )
    patterns = [pattern.pattern for pattern in rules.sets[0].profiles[0].conditions[0].patterns]
    assert patterns == ["off", "yes", "012", "1:30", "2026-01-01", "0x1f", "1e3"]
    assert (rules.sets[0].name, rules.sets[0].version[:5]) == ("no", "1.10+")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unbound: {alert: no}", "5:20: alert: must be true or false, not 'no' (write false)"),
        ("unbound: {alert: 1}", "5:20: alert: must be true or false, not '1'"),
        ("otherwise: {allow: [{ports: 022}]}", "5:31: ports: '022' could be octal (write 22)"),
        (
            "otherwise: {allow: [{ports: 22:22}]}",
            "5:31: ports: a port is a number or a range like 8000-8080, not '22:22'",
        ),
        (
            "otherwise: {allow: [{ports: true}]}",
            "5:31: ports: a port is a number or a range like 8000-8080, not 'true'",
        ),
        ("otherwise: {allow: [{ports: }]}", "5:24: ports: is empty (leave the key out, or give a value)"),
        ("otherwise: {allow: [{ports: []}]}", "5:31: ports: is empty (leave it out or give a value)"),
        ("processes: ", "5:3: processes: is empty (leave the key out, or give a value)"),
        ("otherwise: [x]", "5:14: otherwise: must be a mapping, not a list"),
        ("processes: {a: b}", "5:14: processes: must be a list, not a mapping"),
    ],
)
def test_what_could_be_misread_is_refused(spec, message):
    assert spec_problems(spec) == [f"site.yaml:{message}"]


# -- meaning --


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("ports: 100-50", "ports: the range 100-50 is backwards (write 50-100)"),
        ("ports: 0", "ports: a port is between 1 and 65535, not 0"),
        ("protocol: tpc", "protocol: must be one of tcp, udp, icmp, raw, not 'tpc' (did you mean 'tcp'?)"),
        ("protocol: icmp, ports: 1", "icmp has no ports (leave them out)"),
        ("direction: in, to: {ips: 1.1.1.1}", "direction in has no 'to' (write from)"),
        ("direction: out, from: {ips: 1.1.1.1}", "direction out has no 'from' (write to)"),
        ("to: {ips: 1.1.1.1}, from: {ips: 1.1.1.1}", "an entry has either to or from (write two entries)"),
        ("to: {}", "to: says nothing (give ips, domains, list or except)"),
        ("to: {ips: 10.0.0.1/8}", "ips: 10.0.0.1/8 has bits set beyond its prefix (write 10.0.0.0/8, or the address alone)"),
        ("to: {ips: 10.0.0.300}", "ips: '10.0.0.300' is no IP address or network"),
        ("to: {domains: 'a.*.org'}", "domains: 'a.*.org': a wildcard is only possible as the whole first label (write *.example.org)"),
        ("to: {domains: 'https://a.org'}", "domains: 'https://a.org' is no domain name (give the host name alone)"),
        ("to: {domains: 'a..org'}", "domains: 'a..org' is no domain name"),
        ("to: {lst: a}", "unknown key 'lst' (did you mean 'list'?)"),
        ("tags: attack.t10", "tags: 'attack.t10' is no ATT&CK technique or tactic (write attack.t1055 or .t1055.001)"),
        ("tags: attack.exfiltraton", "tags: 'attack.exfiltraton' is no ATT&CK technique or tactic (did you mean 'exfiltration'?)"),
        ("expires: 2026-02-30", "expires: '2026-02-30' is no date (write it as 2026-12-31)"),
        ("id: 5", "id: '5' is no UUID (make one with uuidgen)"),
        ("port: 80", "unknown key 'port' (did you mean 'ports'?)"),
    ],
)  # fmt: skip
def test_mistakes_in_an_entry(entry, message):
    assert entry_problems(entry) == [message]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("name: a, match: {image: /x}", "the key 'default' is missing"),
        ("name: a, default: deny", "the key 'match' is missing"),
        ("name: a, match: {}, default: deny", "match: an empty match would be every process (use spec.otherwise for that)"),
        ("name: otherwise, match: {image: /x}, default: deny", "name: the name 'otherwise' is taken (choose another one)"),
        ("name: a b, match: {image: /x}, default: deny", "name: 'a b' is no name (letters, digits, '.', '_' and '-', at most 63)"),
        ("name: a, match: {sha256: ab}, default: deny", "sha256: is not applicable yet: no guest tells it (match by image instead)"),
        ("name: a, match: {signer: ab}, default: deny", "signer: is not applicable yet: no guest tells it (match by image instead)"),
        ("name: a, match: {imgae: /x}, default: deny", "unknown key 'imgae' (did you mean 'image'?)"),
        ("name: a, match: {user: -1}, default: deny", "user: a user is a name or a uid, not '-1'"),
        ("name: a, match: {image: /x}, default: deni", "default: must be one of allow, deny, not 'deni' (did you mean 'deny'?)"),
        ("name: a, match: {image: /x}, default: deny, on_deny: blok", "on_deny: 'blok' is no action; there are alert, block, reset, hold, snapshot, redirect:NAME (did you mean 'block'?)"),
        ("name: a, match: {image: /x}, default: deny, on_deny: 'redirect:'", "on_deny: 'redirect:' is no action; there are alert, block, reset, hold, snapshot, redirect:NAME (did you mean 'redirect:NAME'?)"),
        ("name: a, match: {image: /x}, default: deny, priority: 1.5", "priority: must be a whole number, not '1.5'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_profile(profile, message):
    found = [line.partition(": ")[2] for line in spec_problems(f"processes: [{{{profile}}}]")]
    assert message in found
    assert len(found) == 1


def test_lists_hold_one_kind():
    assert "either addresses or domain names" in spec_problems("lists: {a: [10.0.0.1, example.org]}")[0]
    assert "'1.2.3.400' is no IP address" in spec_problems("lists: {a: [1.2.3.400]}")[0]
    assert "neither an address nor a network nor a domain name" in spec_problems("lists: {a: [a_b/c]}")[0]


def test_unbound_reasons_are_known_words_and_do_not_contradict():
    assert "did you mean 'time-wait'?" in spec_problems("unbound: {quiet: [timewait]}")[0]
    assert "both quiet and denied" in spec_problems("unbound: {quiet: [raw], deny: [raw]}")[0]
    assert book("unbound: {deny: [late]}").sets[0].unbound.deny == {"late"}


def test_names_are_unique():
    found = spec_problems(
        "processes: [{name: a, match: {name: x}, default: deny}, {name: a, match: {name: y}, default: deny}]"
    )
    assert found[0].endswith("a profile 'a' exists already (it is in line 5)")


def test_two_rule_sets_cannot_share_a_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(HEAD + "spec: {}\n")
    with pytest.raises(RuleError, match="a rule set 'site' exists already"):
        load([tmp_path])


# -- ties --


@pytest.mark.parametrize(
    ("one", "two", "tie"),
    [
        ("image: /usr/sbin/nginx", "image: /usr/sbin/nginx", True),
        ("image: /usr/sbin/nginx", "image: /usr/sbin/apache2", False),
        ("image: ['/a', '/b']", "image: ['/c', '/b']", True),
        ("image: '/usr/*/a'", "image: '/usr/*/?'", True),
        ("image: '/usr/*/a'", "image: '/usr/*/b'", False),
        ("image: '/u*/*/a'", "image: '/u**/b'", False),
        ("image: '/u**a'", "image: '/u*/*'", True),
        ("image: '/u?*'", "image: '/u/*'", False),
        ("image: 'C:\\a.exe'", "image: 'c:\\A.EXE'", True),
        ("service: nginx", "service: apache2", False),
        ("service: 'ng*'", "service: '*x'", True),
        ("service: nginx", "user: root", True),
        ("user: root", "user: www-data", False),
        ("user: root", "user: 0", True),
        ("user: www-data", "user: 33", True),
        ("user: 32", "user: 33", False),
        ("name: a", "name: 'b*'", False),
        ("name: 'a*'", "name: '*b'", True),
        ("{image: /a, service: x}", "{image: /a, user: root}", True),
        ("{image: /a, service: x}", "{image: /a, service: y}", False),
        ("{name: a, deleted: true}", "{name: a, deleted: false}", False),
        ("{name: a, deleted: true}", "{name: a, container: x}", True),
        ("{name: a, container: false}", "{name: a, container: x}", False),
        ("{name: a, container: true}", "{name: a, container: x}", True),
        ("{name: a, parent: bash}", "{name: a, parent: /bin/sh}", True),
        ("{name: a, parent: bash}", "{name: a, parent: zsh}", False),
        ("{name: a, command: '*x*'}", "{name: a, command: 'y*'}", True),
        ("image: /a", "name: a", False),
    ],
)
def test_a_tie_that_can_match_one_process_is_refused(one, two, tie):
    def block(name, match):
        return f"{{name: {name}, match: {match if match.startswith('{') else '{' + match + '}'}, default: deny}}"

    spec = f"processes:\n  - {block('one', one)}\n  - {block('two', two)}"
    if tie:
        (problem,) = spec_problems(spec)
        assert problem.startswith("site.yaml:7:")
        assert "'two' and 'one' (line 6) are equally specific and can match the same process" in problem
        book(spec.replace("name: two", "name: two, priority: 1"))
    else:
        book(spec)


def test_ties_across_files_are_refused_unless_no_guest_gets_both(tmp_path):
    for name, system in (("a", "linux"), ("b", "windows"), ("c", "linux")):
        (tmp_path / f"{name}.yaml").write_text(
            HEAD.replace("site", name)
            + f"spec: {{applies_to: {{os: {system}}}, processes: [{{name: x, match: {{name: x}}, default: deny}}]}}\n"
        )
    load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    with pytest.raises(RuleError, match=r"'x' and 'x' \(.*a\.yaml:4\) are equally specific"):
        load([tmp_path / "a.yaml", tmp_path / "c.yaml"])


# -- warnings --


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lists: {a: [1.1.1.1]}", "the list 'a' is not used"),
        ("processes: [{name: a, match: {name: x}, default: deny}]", "'a' has no id"),
        ("processes: [{name: a, match: {image: nginx}, default: deny}]", "can never match: an image is a whole path"),
        ("{applies_to: {os: linux}, processes: [{name: a, match: {image: 'C:\\a'}, default: deny}]}", "never match on Linux"),
        ("{applies_to: {os: windows}, processes: [{name: a, match: {image: /a}, default: deny}]}", "never match on Windows"),
        ("{applies_to: {os: linux}, processes: [{name: a, match: {name: systemd-resolved}, default: deny}]}", "write systemd-resolve)"),
        ("processes: [{name: a, match: {name: x}, default: allow, allow: [{ports: 1}]}]", "have no effect"),
        ("processes: [{name: a, match: {name: x}, default: deny, allow: [{description: all}]}]", "allows 'a' everything"),
    ],
)  # fmt: skip
def test_what_is_surely_not_meant_is_a_warning(spec, message):
    assert any(message in str(warning) for warning in book(spec).warnings)


# -- tests inside the file --


def test_a_failing_test_says_what_differs():
    rules = load_text(
        HEAD
        + """\
spec: {processes: [{name: a, match: {image: /a}, default: deny}]}
tests:
  - name: it
    given: {process: {image: /a}, connection: {direction: out, remote: 1.1.1.1, port: 1}}
    expect: {action: allow, rule: otherwise, severity: high, alert: false}
  - name: fine
    given: {process: {image: /a}, connection: {direction: in, remote: 1.1.1.1, port: 1}}
    expect: {action: deny}
"""
    )
    bad, good = rules.test()
    assert not bad.ok
    assert bad.line == 6
    assert bad.why.startswith(
        "action is deny, not allow; rule is a, not otherwise; severity is medium, not high; alert is True, not False"
    )
    assert good.ok
    assert str(good) == "<text>:9: ok: fine"


@pytest.mark.parametrize(
    ("process", "match"),
    [
        ("{image: /a, service: s}", "{service: s}"),
        ("{image: 'C:\\a.exe', service: s}", "{service: s}"),
        ("{image: /a, parent: bash}", "{parent: bash}"),
        ("{image: /a, parent: /bin/bash}", "{parent: /bin/bash}"),
        ("{image: /a, container: c}", "{container: c}"),
        ("{image: /a, user: 5}", "{user: 5}"),
        ("{image: /a, user: root}", "{user: 0}"),
        ("{image: /a, command: a -b}", "{command: '*-b'}"),
        ("{name: a}", "{name: a}"),
        ("{image: /a, deleted: true}", "{deleted: true}"),
    ],
)
def test_a_test_can_state_everything_that_a_match_asks(process, match):
    rules = load_text(
        HEAD
        + f"""\
spec: {{processes: [{{name: p, match: {match}, default: deny}}]}}
tests:
  - name: it
    given: {{process: {process}, connection: {{direction: out, remote: "::1", port: 1, on: 2026-11-22}}}}
    expect: {{action: deny, rule: p}}
"""
    )
    assert all(result.ok for result in rules.test())


def test_a_test_names_a_profile_that_exists_and_one_actor():
    text = HEAD + "spec: {processes: [{name: nginx, match: {name: x}, default: deny}]}\ntests:\n"
    connection = "connection: {direction: out, remote: 1.1.1.1}"
    one = f"  - {{name: t, given: {{kernel: true, {connection}}}, expect: {{action: deny, rule: ngnix}}}}\n"
    assert problems(text + one)[0].endswith("there is no profile 'ngnix' (did you mean 'nginx'?)")
    two = f"  - {{name: t, given: {{{connection}}}, expect: {{action: deny}}}}\n"
    assert "exactly one of process, unbound and kernel" in problems(text + two)[0]


# -- anything at all --

WORDS = st.sampled_from(
    ["apiVersion", "v1", "kind", "RuleSet", "metadata", "name", "spec", "processes", "match", "image", "default", "deny",
     "allow", "ports", "to", "list", "lists", "tests", "given", "process", "connection", "unbound", "a", "/x", "80",
     "1-2", "no", "~", "10.0.0.0/8", "otherwise", "expect", "rule", "user", "-1", "tags", "except", "deleted", "true"]
)  # fmt: skip
TREES = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=30,
)


def is_book_or_error(text: str) -> None:
    try:
        assert isinstance(load_text(text), RuleBook)
    except RuleError as error:
        assert error.problems
        assert all(problem.line >= 1 and problem.column >= 1 for problem in error.problems)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="{}[]:,-&*!|>'\"# \n\tab01~?%@`"))
def test_any_text_is_a_rule_book_or_a_rule_error(text):
    is_book_or_error(text)


@settings(max_examples=100, deadline=None)
@given(spec=TREES, metadata=TREES, tests=TREES)
def test_any_tree_is_a_rule_book_or_a_rule_error(spec, metadata, tests):
    import yaml

    document = {"apiVersion": "v1", "kind": "RuleSet", "metadata": {"name": "x"}, "spec": spec}
    is_book_or_error(yaml.safe_dump(document, allow_unicode=True))
    is_book_or_error(yaml.safe_dump({**document, "spec": {"processes": spec, "otherwise": tests}, "tests": tests}))
    is_book_or_error(yaml.safe_dump({**document, "metadata": metadata, "spec": {"lists": spec, "unbound": tests}}))


SHIPPED = Path(__file__).parents[2] / "rules" / "debian-server.yaml"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_damage_to_a_shipped_file_is_a_rule_book_or_a_rule_error(data):
    lines = SHIPPED.read_text().splitlines()[:120]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        column = data.draw(st.integers(0, len(lines[at])))
        lines[at] = (
            lines[at][:column] + data.draw(st.text(max_size=3)) + lines[at][column + data.draw(st.integers(0, 3)) :]
        )
    is_book_or_error("\n".join(lines))
