"""P10-P16: what the rules say of a connection."""

import ast
from pathlib import Path

import pytest

from appliance.model import Decision, Match, Missing, Reason, Severity, Transport
from appliance.rules import RuleBook, load_text
from tests.rules.builders import HEAD, book, flow, process, subject

ALLOW, DENY = Decision.ALLOW, Decision.DENY


@pytest.mark.parametrize(
    ("default", "allowed", "denied", "expected"),
    [
        # P12-P14: default x matches an allow entry x matches a deny entry
        ("allow", False, False, ALLOW),
        ("allow", True, False, ALLOW),
        ("allow", False, True, DENY),
        ("allow", True, True, DENY),
        ("deny", False, False, DENY),
        ("deny", True, False, ALLOW),
        ("deny", False, True, DENY),
        ("deny", True, True, DENY),
    ],
)
@pytest.mark.parametrize("inbound", [False, True])
@pytest.mark.parametrize("protocol", [Transport.TCP, Transport.UDP])
def test_the_truth_table_of_default_allow_and_deny(default, allowed, denied, expected, inbound, protocol):
    direction = "in" if inbound else "out"
    entry = f"{{direction: {direction}, protocol: {protocol}, ports: %d}}"
    rules = book(f"""
        processes:
          - name: nginx
            match: {{image: /usr/sbin/nginx}}
            default: {default}
            allow: [{entry % (80 if allowed else 81)}]
            deny: [{entry % (80 if denied else 82)}]
    """)
    judgement = rules.judge(subject(process(), flow=flow(port=80, inbound=inbound, protocol=protocol)))
    assert judgement.decision is expected
    assert judgement.rule.profile == "nginx"
    assert judgement.alert is (expected is DENY)
    assert judgement.rule.line == (10 if denied else 9 if allowed else 8)


def test_a_default_deny_says_what_happened_in_one_sentence():
    rules = book("""
        severity: low
        tags: [attack.t1055]
        processes:
          - name: nginx
            match: {image: /usr/sbin/nginx}
            default: deny
            severity: high
            tags: [site]
            on_deny: [alert, block, "redirect:honeypot-1"]
            allow: [{direction: in, protocol: tcp, ports: [80, 443]}]
    """)
    judgement = rules.judge(subject(process(), flow=flow("10.77.0.1", 5001)))
    assert judgement.because == "nginx (default deny): tcp out to 10.77.0.1:5001 matches no allow entry"
    assert (judgement.severity, judgement.tags) == (Severity.HIGH, ("attack.t1055", "site"))
    assert judgement.actions == ("alert", "block", "redirect:honeypot-1")
    assert (judgement.rule.file, judgement.rule.line) == ("site.yaml", 10)
    assert judgement.rule.ruleset == "site"
    assert not judgement.enforce


@pytest.mark.parametrize(
    ("spec", "profile", "enforced"),
    [
        ("monitor", "", False),
        ("enforce", "", True),
        ("monitor", "mode: enforce", True),
        ("enforce", "mode: monitor", False),
    ],
)
def test_a_profile_may_override_the_mode(spec, profile, enforced):
    rules = book(f"""
        mode: {spec}
        processes: [{{name: a, match: {{name: nginx}}, default: deny, {profile}}}]
    """)
    assert rules.judge(subject(process(), flow=flow())).enforce is enforced


def test_the_most_severe_deny_entry_is_told_wherever_it_stands():
    entries = ["{ports: 5001, severity: low}", "{ports: 5000-6000, severity: critical, tags: worst}", "{protocol: tcp}"]
    for order in (entries, entries[::-1]):
        rules = book(f"processes: [{{name: a, match: {{name: nginx}}, default: allow, deny: [{', '.join(order)}]}}]")
        judgement = rules.judge(subject(process(), flow=flow(port=5001)))
        assert (judgement.severity, judgement.tags) == (Severity.CRITICAL, ("worst",))


# -- which profile --


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("image: /usr/sbin/nginx", "service: nginx"),
        ("image: /usr/sbin/nginx", "user: www-data"),
        ("image: /usr/sbin/nginx", "name: nginx"),
        ("service: nginx", "name: nginx"),
        ("user: 33", "name: nginx"),
        ("{service: nginx, user: 33, name: nginx}", "image: /usr/sbin/nginx"),
        ("{image: '/usr/sbin/*', user: 33}", "image: /usr/sbin/nginx"),
        ("image: /usr/sbin/nginx", "image: '/usr/sbin/*'"),
        ("image: '/usr/sbin/*'", "image: '/usr/**'"),
        ("image: /usr/sbin/nginx", "{image: '/usr/**', deleted: false}"),
        ("{image: /usr/sbin/nginx, command: '*worker*'}", "image: /usr/sbin/nginx"),
        ("name: nginx", "{command: '*worker*', container: false}"),
        ("name: nginx", "deleted: false"),
    ],
)
def test_the_most_specific_profile_decides_wherever_it_stands(more, less):
    def block(name, match):
        return f"{{name: {name}, match: {match if match.startswith('{') else '{' + match + '}'}, default: deny}}"

    for order in ([("more", more), ("less", less)], [("less", less), ("more", more)]):
        rules = book(f"processes: [{', '.join(block(*pair) for pair in order)}]")
        assert rules.judge(subject(process(), flow=flow())).rule.profile == "more"


def test_a_priority_decides_between_equals():
    rules = book("""
        processes:
          - {name: a, match: {service: nginx}, default: deny}
          - {name: b, match: {user: 33}, default: allow, priority: 1}
    """)
    assert rules.judge(subject(process(), flow=flow())).rule.profile == "b"


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ("image: /usr/sbin/nginx", True),
        ("image: /usr/sbin/NGINX", False),
        ("image: '/usr/*'", False),
        ("image: '/usr/**'", True),
        ("image: '/usr/*/ngin?'", True),
        ("image: [/bin/x, /usr/sbin/nginx]", True),
        ("name: ngi*", True),
        ("name: apache", False),
        ("user: www-data", True),
        ("user: 33", True),
        ("user: [root, 34]", False),
        ("service: nginx", True),
        ("service: nginx.service", True),
        ("service: 'ng*'", True),
        ("service: apache2", False),
        ("command: '*worker*'", True),
        ("command: worker", False),
        ("parent: init", True),
        ("parent: /usr/lib/systemd/systemd", True),
        ("parent: [bash, /usr/bin/*]", False),
        ("container: false", True),
        ("container: true", False),
        ("container: web", False),
        ("deleted: true", False),
        ("deleted: false", True),
    ],
)
def test_every_condition(match, fits):
    rules = book(f"processes: [{{name: a, match: {{{match}}}, default: deny}}]")
    parent = process("/usr/lib/systemd/systemd", name="init", pid=1, parent_pid=0, cgroup="/init.scope")
    judgement = rules.judge(subject(process(), flow=flow(), parent=parent))
    assert (judgement.decision is DENY) is fits
    assert judgement.rule.profile == ("a" if fits else "otherwise")


@pytest.mark.parametrize(
    ("cgroup", "service"),
    [
        ("/system.slice/nginx.service", "nginx"),
        ("/system.slice/docker.service/worker", "docker"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/sync.service", "sync"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope", None),
        ("/user.slice/user-1000.slice/session-3.scope", None),
        ("/", None),
        (Missing.UNKNOWN, None),
    ],
)
def test_the_service_of_a_linux_process_is_its_unit(cgroup, service):
    rules = book(f"processes: [{{name: a, match: {{service: '{service or '*'}'}}, default: deny}}]")
    judgement = rules.judge(subject(process(cgroup=cgroup), flow=flow()))
    assert judgement.decision is (DENY if service else ALLOW)
    assert judgement.alert is bool(service)


def test_windows_looks_at_no_case_and_finds_the_service_on_the_command_line():
    rules = book(r"""
        applies_to: {os: windows}
        processes:
          - {name: dns, match: {image: 'C:\Windows\System32\svchost.exe', service: Dnscache}, default: deny}
          - {name: user, match: {user: system, name: 'A.EXE'}, default: deny}
    """)
    svchost = process(
        r"c:\windows\system32\SVCHOST.EXE",
        command=r"svchost.exe -k NetworkService -p -s DNSCACHE",
        cgroup=Missing.UNKNOWN,
    )
    assert rules.judge(subject(svchost, flow=flow(), os="windows")).rule.profile == "dns"
    system = process(r"C:\a.exe", name="a.exe", user=r"NT AUTHORITY\SYSTEM", uid=1)
    assert rules.judge(subject(system, flow=flow(), os="windows")).rule.profile == "user"


@pytest.mark.parametrize("path", ["/tmp/x", "/tmp/a/b/c", "/dev/shm/.x", "/var/tmp/x"])
def test_programs_in_temporary_places_can_be_named(path):
    rules = book("processes: [{name: t, match: {image: ['/tmp/**', '/dev/shm/**', '/var/tmp/**']}, default: deny}]")
    assert rules.judge(subject(process(path), flow=flow())).decision is DENY
    assert rules.judge(subject(process("/usr" + path), flow=flow())).decision is ALLOW


def test_deleted_programs_can_be_named():
    rules = book("processes: [{name: d, match: {deleted: true}, default: deny}]")
    assert rules.judge(subject(process(deleted=True), flow=flow())).decision is DENY
    assert rules.judge(subject(process(), flow=flow())).decision is ALLOW


# -- what the guest did not let us know --

NGINX = "processes: [{name: nginx, match: {image: /usr/sbin/nginx}, default: deny, allow: [{ports: 80}]}]"


@pytest.mark.parametrize("missing", [Missing.UNREADABLE, Missing.IMPLAUSIBLE, Missing.UNKNOWN])
def test_an_unreadable_image_matches_nothing_and_is_never_silently_allowed(missing):
    judgement = book(NGINX).judge(subject(process(missing), flow=flow(port=5001)))
    assert (judgement.decision, judgement.alert, judgement.rule.profile) == (ALLOW, True, "otherwise")
    assert "it may be nginx" in judgement.because
    assert not book(NGINX).judge(subject(process(missing), flow=flow(port=80))).alert


def test_a_kernel_thread_has_no_image_and_is_no_doubt():
    assert not book(NGINX).judge(subject(process(Missing.NOT_APPLICABLE), flow=flow())).alert


def test_a_path_longer_than_any_path_is_a_doubt():
    assert (
        book("processes: [{name: t, match: {image: '/tmp/**'}, default: deny}]")
        .judge(subject(process("/usr/" + "x" * 9000), flow=flow()))
        .alert
    )


@pytest.mark.parametrize(
    ("match", "given"),
    [
        ("user: www-data", {"user": None, "uid": 33}),
        ("command: '*evil*'", {"command": Missing.UNREADABLE}),
        ("service: evil", {"cgroup": Missing.UNREADABLE}),
        ("parent: bash", {}),
    ],
)
def test_whatever_else_is_not_known_is_a_doubt_too(match, given):
    rules = book(f"processes: [{{name: a, match: {{{match}}}, default: deny, severity: critical}}]")
    judgement = rules.judge(subject(process(**given), flow=flow()))
    assert (judgement.decision, judgement.alert, judgement.severity) == (ALLOW, True, Severity.MEDIUM)


def test_root_is_known_without_passwd():
    rules = book("processes: [{name: a, match: {user: root}, default: deny}]")
    assert rules.judge(subject(process(user=None, uid=0), flow=flow())).decision is DENY
    other = rules.judge(subject(process(user=None, uid=5), flow=flow()))
    assert (other.decision, other.alert) == (ALLOW, False)


# -- several owners --


def test_the_worst_owner_decides():
    rules = book("""
        processes:
          - {name: good, match: {image: /usr/sbin/nginx}, default: allow}
          - {name: bad, match: {image: /usr/bin/bash}, default: deny}
    """)
    good, bad = process(), process("/usr/bin/bash", name="bash", pid=101, parent_pid=100)
    for owners in ((good, bad), (bad, good), (good, good, bad)):
        judgement = rules.judge(subject(*owners, flow=flow(), reason=Reason.AMBIGUOUS))
        assert (judgement.decision, judgement.rule.profile) == (DENY, "bad")


def test_a_parent_that_holds_the_socket_too_is_known():
    rules = book("processes: [{name: child, match: {parent: /usr/sbin/nginx}, default: deny}]")
    master, worker = process(pid=100, parent_pid=0), process(pid=101, parent_pid=100)
    assert rules.judge(subject(master, worker, flow=flow())).decision is DENY


# -- no process --


@pytest.mark.parametrize("reason", list(Reason))
def test_unbound_is_never_silent_but_for_the_quiet_reasons(reason):
    quiet = {Reason.CLOSED, Reason.LATE, Reason.TORN, Reason.TIME_WAIT, Reason.FORWARDED, Reason.NO_MEMORY}
    for rules in (RuleBook(), book("processes: []"), book("unbound: {}")):
        judgement = rules.judge(subject(flow=flow(), reason=reason))
        assert judgement.decision is ALLOW
        assert judgement.alert is (reason not in quiet)
        assert judgement.rule.profile == "unbound"
        assert str(reason) in judgement.because


def test_unbound_without_a_reason_alerts():
    assert RuleBook().judge(subject(flow=flow())).alert


def test_unbound_by_reason():
    rules = book("""
        mode: enforce
        unbound: {quiet: [hidden], deny: [raw], severity: low, on_deny: [alert, block]}
    """)
    hidden, raw, late = (rules.judge(subject(flow=flow(), reason=r)) for r in (Reason.HIDDEN, Reason.RAW, Reason.LATE))
    assert (hidden.decision, hidden.alert) == (ALLOW, False)
    assert (raw.decision, raw.alert, raw.actions, raw.enforce) == (DENY, True, ("alert", "block"), True)
    assert (late.decision, late.alert, late.severity, late.enforce) == (ALLOW, True, Severity.LOW, False)
    assert raw.rule.line == 6


def test_unbound_can_deny_everything():
    rules = book("unbound: {action: deny}")
    assert rules.judge(subject(flow=flow(), reason=Reason.HIDDEN)).decision is DENY
    assert rules.judge(subject(flow=flow(), reason=Reason.CLOSED)).decision is DENY


def test_what_the_kernel_answers_is_not_unbound():
    ping = flow(inbound=True, protocol=Transport.ICMP, port=0, other_port=0)
    judgement = RuleBook().judge(subject(flow=ping, match=Match.KERNEL))
    assert (judgement.decision, judgement.alert, judgement.rule.profile) == (ALLOW, False, "kernel")
    rules = book("kernel: {default: allow, deny: [{protocol: icmp, direction: out}]}")
    assert rules.judge(subject(flow=ping, match=Match.KERNEL)).decision is ALLOW
    out = flow(protocol=Transport.ICMP, port=0)
    assert rules.judge(subject(flow=out, match=Match.KERNEL)).decision is DENY


def test_a_process_without_a_profile_goes_to_otherwise():
    rules = book("otherwise: {default: allow, deny: [{direction: out, protocol: tcp, ports: 25}]}")
    curl = process("/usr/bin/curl", name="curl")
    mail = rules.judge(subject(curl, flow=flow(port=25)))
    assert (mail.decision, mail.rule.profile, mail.rule.line) == (DENY, "otherwise", 5)
    assert mail.because.startswith("/usr/bin/curl has no profile; otherwise: ")
    web = rules.judge(subject(curl, flow=flow(port=443)))
    assert (web.decision, web.alert) == (ALLOW, False)


def test_without_any_rules_a_process_is_allowed():
    judgement = RuleBook().judge(subject(process(), flow=flow()))
    assert (judgement.decision, judgement.alert) == (ALLOW, False)


# -- entries --


@pytest.mark.parametrize(
    ("entry", "given", "covered"),
    [
        ("direction: out", {}, True),
        ("direction: in", {}, False),
        ("protocol: tcp", {}, True),
        ("protocol: [udp, icmp]", {}, False),
        ("ports: 5001", {}, True),
        ("ports: 40000", {}, False),
        ("ports: 5000-5002", {}, True),
        ("ports: ['1-5000', 5002]", {}, False),
        ("ports: 5001", {"inbound": True}, True),
        ("local_ports: 40000", {}, True),
        ("local_ports: 5001", {}, False),
        ("local_ports: 5001", {"inbound": True}, True),
        ("remote_ports: 40000", {"inbound": True}, True),
        ("to: {ips: 10.77.0.0/24}", {}, True),
        ("to: {ips: [10.77.0.2, 10.78.0.0/16]}", {}, False),
        ("to: {ips: 10.77.0.1}", {"inbound": True}, False),
        ("from: {ips: 10.77.0.1}", {"inbound": True}, True),
        ("to: {ips: 'fd00::/8'}", {"remote": "fd00::1"}, True),
        ("to: {ips: '::/0'}", {}, False),
        ("to: {ips: 10.77.0.0/24}", {"remote": "::ffff:10.77.0.1"}, True),
        ("to: {ips: '::ffff:10.77.0.0/120'}", {}, True),
        ("to: {domains: www.example.org}", {}, True),
        ("to: {domains: '*.example.org'}", {}, True),
        ("to: {domains: example.org}", {}, False),
        ("to: {domains: '*.www.example.org'}", {}, False),
        ("to: {domains: '*.ample.org'}", {}, False),
        ("to: {list: nets}", {}, True),
        ("to: {list: [names, nets]}", {}, True),
        ("to: {list: names}", {}, False),
        ("to: {list: empty}", {}, False),
        ("to: {except: {list: nets}}", {}, False),
        ("to: {except: {list: names}}", {}, True),
        ("to: {ips: 10.0.0.0/8, except: {ips: 10.77.0.1}}", {}, False),
        ("ports: 1-65535", {"protocol": Transport.ICMP}, False),
        ("protocol: icmp", {"protocol": Transport.ICMP}, True),
        ("protocol: raw", {"protocol": Transport.RAW}, True),
    ],
)
def test_every_condition_of_an_entry(entry, given, covered):
    rules = book(f"""
        lists: {{nets: [10.77.0.0/16, 'fe80::/10'], names: [example.net], empty: []}}
        otherwise: {{default: allow, deny: [{{{entry}}}]}}
    """)
    judgement = rules.judge(subject(process(), flow=flow(**given), names=("WWW.example.org.",)))
    assert (judgement.decision is DENY) is covered


def test_an_entry_ends_with_its_last_day_by_the_flow_s_own_time():
    rules = book(
        "processes: [{name: a, match: {name: nginx}, default: deny, allow: [{ports: 80, expires: 2026-11-22}]}]"
    )
    midnight = 1_795_392_000 * 1_000_000_000  # 2026-11-23 00:00 UTC
    assert rules.judge(subject(process(), flow=flow(port=80, at_ns=midnight - 1))).decision is ALLOW
    assert rules.judge(subject(process(), flow=flow(port=80, at_ns=midnight))).decision is DENY


def test_a_profile_ends_with_its_last_day():
    rules = book("processes: [{name: a, match: {name: nginx}, default: deny, expires: 2026-11-22}]")
    midnight = 1_795_392_000 * 1_000_000_000
    assert rules.judge(subject(process(), flow=flow(at_ns=midnight - 1))).decision is DENY
    assert rules.judge(subject(process(), flow=flow(at_ns=midnight))).decision is ALLOW


def test_a_deny_says_when_a_name_was_not_seen():
    rules = book("processes: [{name: a, match: {name: nginx}, default: deny, allow: [{to: {domains: example.org}}]}]")
    assert "no DNS answer for this address was seen" in rules.judge(subject(process(), flow=flow())).because


def test_a_midstream_flow_says_that_its_direction_is_a_guess():
    rules = book("otherwise: {default: deny}")
    assert "a guess" in rules.judge(subject(process(), flow=flow(midstream=True))).because


def test_guest_text_in_a_sentence_is_short_and_harmless():
    rules = book("otherwise: {default: deny}")
    judgement = rules.judge(subject(process("/\x1b[31m\u202e" + "x" * 5000), flow=flow(), names=("a\nb",)))
    assert judgement.because.isprintable()
    assert len(judgement.because) < 400


# -- several rule sets --


def sets(*specs):
    texts = [(f"{i}.yaml", HEAD.replace("site", f"set-{i}") + "spec: " + spec) for i, spec in enumerate(specs)]
    return RuleBook(tuple(load_text(text, file).sets[0] for file, text in texts))


def test_rule_sets_apply_by_system_and_tag():
    rules = sets(
        "{applies_to: {os: linux}, otherwise: {default: deny}}",
        "{applies_to: {tags: [prod, lab]}, otherwise: {default: deny, severity: critical}}",
    )

    def judged(os, *tags):
        judgement = rules.judge(subject(process(), flow=flow(), os=os, tags=tags))
        return judgement.decision, judgement.rule.file

    assert judged("linux") == (DENY, "0.yaml")
    assert judged("linux", "prod") == (DENY, "1.yaml")
    assert judged("windows", "lab", "x") == (DENY, "1.yaml")
    assert judged("windows", "x")[0] is ALLOW
    assert judged("") == (DENY, "0.yaml")  # an unknown system gets every system's rules


def test_the_most_specific_profile_of_all_sets_decides():
    rules = sets(
        "{processes: [{name: a, match: {name: nginx}, default: deny}]}",
        "{processes: [{name: b, match: {image: /usr/sbin/nginx}, default: allow}]}",
    )
    assert rules.judge(subject(process(), flow=flow())).rule.profile == "b"


def test_a_set_that_is_silent_about_unbound_does_not_loosen_another_one():
    rules = sets("{unbound: {action: deny}}", "{processes: []}")
    assert rules.judge(subject(flow=flow(), reason=Reason.HIDDEN)).decision is DENY


def test_the_version_follows_the_content():
    one, two = book("mode: monitor"), book("mode: enforce")
    assert one.version.startswith("site@sha256:")
    assert one.version != two.version
    assert one.version == book("mode: monitor").version


def test_what_judges_touches_nothing():
    room = Path(__file__).parents[2] / "appliance" / "rules"
    allowed = {"__future__", "collections", "dataclasses", "enum", "functools", "hashlib", "ipaddress", "re", "typing"}
    for name in ("match", "conditions", "globs", "nets", "book", "suite"):
        for node in ast.walk(ast.parse((room / f"{name}.py").read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                ours = ("appliance.model", "appliance.errors", "appliance.rules")
                assert module.split(".")[0] in allowed or module.startswith(ours), (name, module)
                assert module not in {"appliance.rules.load", "appliance.rules.schema", "appliance.rules.text"}
