"""Verdicts told to a person: one row each, the alert's evidence under it, the summary, and the whole story."""

from __future__ import annotations

from typing import Any

from appliance.cli.render import console, endpoint_text, safe

Json = dict[str, Any]
_ARROW = {"out": "->", "in": "<-"}
_ACTS = {
    "release": "released",
    "block": "blocked",
    "reset": "reset",
    "hold": "held for a person to decide",
    "redirect": "redirected",
}


def print_row(body: Json) -> None:
    """One verdict in one row; what was found in a denied process stands below it."""
    flow, binding = body["flow"], body["binding"]
    flagged = body["verdict"] == "deny" or body["alert"]
    word = "PARASITE" if body["parasitic"] else "DENY" if body["verdict"] == "deny" else "ALERT" if flagged else "allow"
    colour = "bold red" if body["verdict"] == "deny" else "yellow" if flagged else "green"
    connection = connection_text(flow)
    rule = body["rule"]
    out = console()
    out.print(
        f"{body['time'][11:23]} [{colour}]{word:8}[/] {safe(body['vm'])}  {process_text(body)}  {connection}  "
        f"[dim]{_match(binding)}  {safe(rule['profile'])} {safe(rule['file'])}:{rule['line']}  {body['id']}[/]"
        f"{_act(body, '  ')}"
    )
    if flagged:
        out.print(f"             [{colour}]{safe(body['because'], 300)}[/]")
        for item in body["evidence"]:
            out.print(f"             [{colour}]*[/] {_evidence(item)}")


def print_more(body: Json, before: Json, new: list[Json], *, same_as: str | None = None) -> None:
    """A verdict that was shown is told again: one line, and only what is new in it.

    ``new`` is its new evidence, ``same_as`` the verdict under which that was shown just before.
    """
    colour = "bold red" if body["verdict"] == "deny" else "yellow"
    act = _act(body, "  ") if _act(body) != _act(before) else ""
    word = "PARASITE" if body["parasitic"] and not before["parasitic"] else "more"
    when, which = body["time"][11:23], f"[dim]{body['id']}[/]"
    out = console()
    out.print(f"{when} [{colour}]{word:8}[/] {safe(body['vm'])}  {process_text(body)}  {which}{act}")
    if body["because"] != before["because"]:
        out.print(f"             [{colour}]{safe(body['because'], 300)}[/]")
    if same_as is not None:
        out.print(f"             [{colour}]*[/] the same as {same_as}")
        return
    for item in new:
        out.print(f"             [{colour}]*[/] {_evidence(item)}")


def print_summary(body: Json) -> None:
    """What was seen, how it was bound, what was lost and what it cost."""
    out = console()
    out.print(
        f"\n[bold]summary[/]  {body['packets']} packets, {body['bytes']} bytes, {body['flows']} flows, "
        f"{body['events']} events, {body['lost']} lost; {body['cpu_seconds']} s CPU"
    )
    worse = {key: body[key] for key in ("evicted", "torn", "gaps", "unshown", "acts_failed") if body[key]}
    if worse:
        out.print("  " + ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in worse.items()))
    for title in ("verdicts", "acts", "bound", "unbound", "ignored", "guest_errors", "opinions"):
        if body[title]:
            out.print(f"  {title.replace('_', ' '):12} " + ", ".join(f"{safe(k)} {n}" for k, n in body[title].items()))
    for guest in body["guests"]:
        if guest["ended"]:
            out.print(f"  [red]{safe(guest['vm'])}: {safe(guest['ended'], 300)}[/]")


def print_story(body: Json) -> None:
    """Everything about one verdict, for ``explain``."""
    flow, rule = body["flow"], body["rule"]
    console().print(f"[bold]{body['verdict'].upper()}[/]  {safe(body['because'], 400)}")
    _line(
        "verdict",
        f"{body['id']} at {body['time']}, severity {body['severity']}, {', '.join(body['tags']) or 'no tags'}",
    )
    named = [safe(text) for key in ("vm_name", "vm_uuid") if (text := body.get(key)) not in {None, "", body["vm"]}]
    _line("guest", ", ".join((safe(body["vm"]), *named)))
    _line("connection", f"{connection_text(flow)}, begun {flow['started']}, {safe(flow['community_id'])}")
    _line("names", safe(", ".join(flow["names"]) or "none seen in DNS"))
    _line("binding", f"{_match(body['binding'])} after the first packet")
    _line("act", _act(body) or "none: nothing was asked of the hand, or there was none")
    _line("rule", f"{safe(rule['file'])}:{rule['line']}, profile {safe(rule['profile'])} of {safe(rule['ruleset'])}")
    _line("rules", safe(body["rules_version"]))
    for owner in body["owners"]:
        who = f"{safe(owner['name'], 16)}\\[{owner['pid']}] {safe(owner['path'] or '?')}"
        user = safe(owner["user"] or owner["uid"])
        _line("owner", f"{who}, user {user}, parent {owner['parent_pid']}, started {owner['started'] or '?'}")
        _line("", safe(owner["command"] or "", 400))
    if not body["owners"]:
        _line("owner", "none: see binding")
    for item in body["evidence"]:
        _line("evidence", _evidence(item))


def _line(title: str, text: str) -> None:
    console().print(f"  {title:11} {text}")


def connection_text(flow: Json) -> str:
    """The two ends of a flow, the arrow from who began it."""
    ends = f"{endpoint_text(flow['local'])} {_ARROW[flow['direction']]} {endpoint_text(flow['remote'])}"
    return safe(f"{flow['protocol']} {ends}", 160)


def process_text(body: Json) -> str:
    """The process of a verdict, as markup."""
    one = body["process"]
    if one is None:
        return "(kernel)" if body["binding"]["match"] == "kernel" else "(nobody)"
    others = len(body["owners"]) - 1
    more = f" +{others}" if others > 0 else ""
    return f"[bold]{safe(one['name'], 16)}[/]\\[{one['pid']}]{more} {safe(one['path'] or '?', 48)}"


def _match(binding: Json) -> str:
    why = f" ({binding['reason']})" if binding["reason"] else ""
    return f"{binding['match']}{why} {binding['latency_us'] / 1000:.2f} ms"


def _act(body: Json, before: str = "") -> str:
    """What was done to the flow; "" where nothing was, or by an appliance that had no hand yet."""
    act, held_us = body.get("act"), body.get("held_us")
    if act is None:
        return ""
    done = _ACTS[act]
    if not body["act_done"]:
        return f"{before}[red]not {done}: the flow was gone, or the host refused[/]"
    waited = f"held, then {done} after {_span(held_us)}" if held_us is not None else done
    return f"{before}[{'dim' if act == 'release' else 'bold'}]{waited}[/]"


def _span(us: float) -> str:
    return f"{us / 1000:.1f} ms" if us < 1_000_000 else f"{us / 1_000_000:.1f} s"


def _evidence(item: Json) -> str:
    place = "" if item["address"] in item["claim"] else f" at {item['address']}"
    where = f"{place}, {item['size']} bytes" if item["size"] else ""
    digest = f", sha256 {item['sha256'][:16]}…" if item["sha256"] else ""
    detail = f": {safe(item['detail'], 160)}" if item["detail"] else ""
    return f"{safe(item['claim'], 200)}{where}{digest}{detail}"
